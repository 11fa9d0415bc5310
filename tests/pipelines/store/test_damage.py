"""A bit flipped in any file of a run: whoever reads it either gives the same numbers or says so in one line."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from ..runs import Processes, hashes

SHORT = (
    "run.json", "record.json", "environment.json", "recipe.resolved.yaml", "log.jsonl", "00-baseline*/artifact.json",
    "01-prune*/block-00001.matrices.safetensors", "02-quantize*/artifact.json", "03-decompose*/block-00002.vectors.safetensors",
    "04-recover*/config.json", "05-fuse*/tokenizer.json", "00-baseline*.metrics/*.hidden.safetensors", "02-quantize*.metrics/*.json",
)  # fmt: skip


def flip(file: Path, draw: random.Random) -> str:
    data = bytearray(file.read_bytes())
    place, bit = draw.randrange(len(data)), draw.randrange(8)
    data[place] ^= 1 << bit
    file.chmod(0o644)
    file.write_bytes(data)
    return f"{file.name}: bit {bit} of byte {place} of {len(data)}"


def read_back(commands: Processes, place: Path, finished: Path, what: str) -> None:
    """`report`, `eval` and `resume` on the damaged run: the numbers of the undamaged one, or a line."""
    log, run = place / "log", place / "run"
    stages = json.loads((finished / "record.json").read_text())["stages"]

    def answer(arguments: list[str]) -> str | None:
        code, text = commands.run(arguments, log), log.read_text()
        assert "Traceback" not in text and code in (0, 2, 3), f"{what}: {' '.join(arguments)} ends in {code}\n{text}"
        assert code == 0 or text.count("error: ") == 1, f"{what}: {text}"
        return text if code == 0 else None

    shown = answer(["report", "export", str(run), "--format", "json"])
    assert shown is None or _numbers(json.loads(shown)["stages"]) == _numbers(stages), what
    measured = answer(["eval", str(run), "--device", "cpu", "--json"])
    assert measured is None or json.loads(measured[measured.index("{") :])["perplexity"] == stages[-1]["perplexity"], what
    if answer(["resume", str(run), "--device", "cpu"]) is not None:
        assert hashes(run) == hashes(finished), what
        assert _numbers(json.loads((run / "record.json").read_text())["stages"]) == _numbers(stages), what


def _numbers(stages: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(s["stage"], s["perplexity"], s["kl_to_baseline"], s["total_bytes"], s["sparsity"]) for s in stages]


def _damaged(commands: Processes, finished: Path, place: Path, name: str, draw: random.Random) -> None:
    run = place / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(finished, run)
    file = next(iter(sorted([*run.glob(name), *run.glob(f"stages/{name}")])))
    if file.stat().st_size:
        read_back(commands, place, finished, flip(file, draw))


@pytest.mark.parametrize("name", SHORT)
def test_a_bit_of_a_file(name: str, commands: Processes, finished: Path, tmp_path: Path) -> None:
    _damaged(commands, finished, tmp_path, name, random.Random(name))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_bit_of_every_file(commands: Processes, finished: Path, tmp_path: Path) -> None:
    files = [str(path.relative_to(finished)) for path in sorted(finished.rglob("*")) if path.is_file() and path.name != ".lock"]
    for turn in range(3):
        for name in files:
            _damaged(commands, finished, tmp_path, name, random.Random(f"{name} {turn}"))
    print(f"{len(files)} files, {3 * len(files)} bits, none gave a wrong number")
