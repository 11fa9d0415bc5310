"""What another program makes is made once, and says whose fault it is when it cannot be made."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.pipelines.errors import InputError
from bitmend.pipelines.publish import other_programs

ASKED = {"program": "auto_round", "bits": 3, "group_size": 64, "iterations": 200, "samples": 8, "batch_size": 2}


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment whose interpreter is ours, and a program in it of which each test says what it does."""
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setenv("VENV_RIVALS", str(tmp_path / "env"))
    monkeypatch.setattr(other_programs, "_SCRIPTS", tmp_path)
    return tmp_path


def _program(environment: Path, version: str, ends: str = "") -> None:
    (environment / f"{ASKED['program']}_runs.py").write_text(
        "import json, pathlib, sys\n"
        "job = json.load(open(sys.argv[1]))\n"
        "open(job['output'] + '/../runs', 'a').write('x')\n"
        "open('log', 'w').write('its own')\n"
        f"{ends}\n"
        "made = pathlib.Path(job['output']) / 'model-w3g64'; made.mkdir(exist_ok=True); (made / 'config.json').write_text('{}')\n"
        f"json.dump({{'version': '{version}', 'seconds': 1.0, 'peak_bytes': 2}}, open(sys.argv[2], 'w'))\n"
    )


def _made(environment: Path) -> tuple[Path, dict[str, Any]]:
    return other_programs.made(environment / "rivals", environment / "dense", torch.arange(64).view(2, 32), ASKED)


def test_a_checkpoint_is_made_once_from_our_windows_cut_to_its_number_of_samples(environment: Path) -> None:
    from safetensors.torch import load_file

    _program(environment, "0.16.1")
    checkpoint, answer = _made(environment)
    assert (checkpoint / "config.json").is_file() and answer["seconds"] == 1.0
    place = checkpoint.parents[1]
    job = json.loads((place / "job.json").read_text())
    assert load_file(job["calibration"])["ids"].tolist() == torch.arange(64).view(8, 8).tolist()
    assert _made(environment) == (checkpoint, answer)
    assert (place / "runs").read_text() == "x" and (place / "log").read_text() == "its own"


def test_a_run_that_failed_is_no_run(environment: Path) -> None:
    _program(environment, "0.16.1", "sys.exit('out of memory at block 3')")
    with pytest.raises(InputError, match="auto_round ended with 1: out of memory at block 3"):
        _made(environment)
    _program(environment, "0.16.1")
    assert _made(environment)[1]["peak_bytes"] == 2


def test_another_version_is_refused(environment: Path) -> None:
    _program(environment, "0.12.0")
    with pytest.raises(InputError, match="0.12.0, the table is of 0.16.1"):
        _made(environment)


def test_without_the_environment_the_way_to_it_is_named(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENV_RIVALS", str(environment / "nowhere"))
    with pytest.raises(InputError, match="make rivals"):
        _made(environment)
