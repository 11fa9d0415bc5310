"""Checkpoints that another program makes of the same dense model from the same text, for the rows of a reference table.

Each runs in an environment of its own, which `make rivals` builds, and shares nothing with ours but files.
"""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError

VERSIONS = {"auto_round": "0.16.1", "gptqmodel": "7.7.0"}
"""Program → the version that `make rivals` installs."""
ENVIRONMENTS = {"auto_round": ("VENV_RIVALS", ".venv-rivals"), "gptqmodel": ("VENV_GPTQMODEL", ".venv-gptqmodel")}
"""Program → the variable that says where its environment is, and where that is without it."""
_SCRIPTS = Path("tests/interop")


def made(directory: Path, dense: Path, ids_NT: Tensor, asked: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The rival's checkpoint and what its run reported (seconds, peak_bytes), made once in `directory`.

    dense: a Hugging Face directory in float32; ids: the calibration windows; asked: program, bits, group_size, samples, batch_size,
    of AutoRound iterations. InputError without the environment, or with the program's last words when it fails.
    """
    place = place_of(directory, asked).resolve()
    answer, checkpoint = place / "run.json", place / "checkpoint"
    if not answer.is_file():
        python = _interpreter(asked["program"])
        checkpoint.mkdir(parents=True, exist_ok=True)
        save_file({"ids": ids_NT.reshape(asked["samples"], -1).contiguous()}, place / "calibration.safetensors")
        job = {**asked, "dense": str(dense.resolve()), "calibration": str(place / "calibration.safetensors"), "output": str(checkpoint)}
        (place / "job.json").write_text(json.dumps(job))
        program = [python.absolute(), "-P", _SCRIPTS.resolve() / f"{asked['program']}_runs.py", place / "job.json", place / "said.json"]
        ran = subprocess.run(program, cwd=place, capture_output=True, text=True, check=False)  # what it logs lies there, too
        if ran.returncode:
            raise InputError(f"{asked['program']} ended with {ran.returncode}: {ran.stderr.strip()[-2000:]}")
        (place / "said.json").rename(answer)
    result = json.loads(answer.read_text())
    if result["version"] != VERSIONS[asked["program"]]:
        raise InputError(
            f"{answer}: made by {asked['program']} {result['version']}, the table is of {VERSIONS[asked['program']]}; `make rivals`, delete {place}"
        )
    return next(checkpoint.rglob("config.json")).parent, result


def place_of(directory: Path, asked: Mapping[str, object]) -> Path:
    return directory / "-".join(str(value) for value in asked.values())


def _interpreter(program: str) -> Path:
    variable, default = ENVIRONMENTS[program]
    python = Path(os.environ.get(variable, default)) / "bin" / "python"
    if not python.is_file():
        raise InputError(f"{python}: no such program; `make rivals` builds the environment, {variable} says where another one is")
    return python
