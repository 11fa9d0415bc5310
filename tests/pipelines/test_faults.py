"""A fault at any operation that changes a file: one line and the right code, then the same command makes the same bits."""

import shutil
import signal
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest

from .faults import KINDS
from .runs import Processes, hashes, write_recipe

STAGES = ("baseline", "prune", "quantize", "decompose", "recover", "fuse")


@pytest.fixture(scope="module")
def before(commands: Processes, tmp_path_factory: pytest.TempPathFactory, small_model: Path, small_text: Path) -> Iterator[Path]:
    """A run directory at its only place, and copies of it as it is before each stage."""
    place = tmp_path_factory.mktemp("faults")
    recipe = write_recipe(place / "recipe.yaml")
    command = ["run", str(recipe), "-m", str(small_model), "--data", str(small_text), "-o", str(place / "run"), "--device", "cpu"]
    (place / "command").write_text("\n".join(command))
    for stage in STAGES:
        if stage != "baseline":
            assert commands.run([*command, "--until", STAGES[STAGES.index(stage) - 1]], place / "log") == 0, (place / "log").read_text()
            shutil.copytree(place / "run", place / stage)
    yield place


def operations(commands: Processes, place: Path, stage: str) -> int:
    """How many operations on the run's files the stage takes, its measurement and the page included."""
    _restore(place, stage)
    assert commands.run(_command(place, stage), place / "log", fault=(None, 0, str(place / "run"))) == 0
    return int((place / "log").read_text().splitlines()[-1])


def struck(commands: Processes, place: Path, stage: str, kind: str, step: int, expected: dict[str, str]) -> None:
    _restore(place, stage)
    code, log = commands.run(_command(place, stage), place / "log", fault=(kind, step, str(place / "run"))), (place / "log").read_text()
    where = f"{stage}, {kind} at operation {step}: exit {code}\n{log}"
    if code != 0 or kind == "kill":  # 0: whatever asked could do without, as a directory that is there already
        assert code == (-signal.SIGKILL if kind == "kill" else 3 if kind == "EIO" else 5), where
        assert "Traceback" not in log and log.count("error: ") == (kind != "kill"), where
        assert commands.run(_command(place, stage), place / "log") == 0, where + (place / "log").read_text()
    assert hashes(place / "run", str(STAGES.index(stage))) == expected, where
    assert not list((place / "run").glob("stages/*.partial")), where


def _command(place: Path, stage: str) -> list[str]:
    return [*(place / "command").read_text().split("\n"), "--until", stage]


def _restore(place: Path, stage: str) -> None:
    shutil.rmtree(place / "run", ignore_errors=True)
    if stage != "baseline":
        shutil.copytree(place / stage, place / "run")


def _expected(place: Path, finished: Path, stage: str) -> dict[str, str]:
    return hashes(finished, str(STAGES.index(stage)))


@pytest.mark.parametrize(("number", "stage"), list(enumerate(STAGES)))
def test_a_fault_in_every_stage(number: int, stage: str, commands: Processes, before: Path, finished: Path) -> None:
    """Of each stage a few operations from its first to its last; the kinds take turns."""
    count = operations(commands, before, stage)
    kinds = cycle(KINDS[number % 4 :] + KINDS[: number % 4])
    for share in (0.3, 0.8):
        struck(commands, before, stage, next(kinds), 1 + round(share * (count - 1)), _expected(before, finished, stage))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_at_every_operation(stage: str, commands: Processes, before: Path, finished: Path) -> None:
    count, expected = operations(commands, before, stage), _expected(before, finished, stage)
    for step in range(1, count + 1):
        for kind in KINDS[:2] if step % 3 else KINDS:
            struck(commands, before, stage, kind, step, expected)
    print(f"{stage}: {count} operations, all survived")
