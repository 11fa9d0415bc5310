"""A fault at any operation that changes a file: one line and the right code, then the same command makes the same bits."""

import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..faults import KINDS
from ..runs import CHAIN, Processes, hashes, write_recipe

STAGES = ("baseline", "prune", "quantize", "decompose", "recover", "fuse")
SHORT = [*CHAIN[:3], {"recover": {**CHAIN[3]["recover"], "steps": 2, "eval_every": 2}}, CHAIN[4]]


@dataclass(frozen=True)
class Undisturbed:
    """A run directory at its only place, and copies of it as it was before each stage; per stage, how many operations on the run's files it
    takes (its measurement and the page included), and the hashes of what it makes."""

    place: Path
    command: list[str]
    operations: dict[str, int]
    hashes: dict[str, dict[str, str]]

    def of(self, stage: str) -> list[str]:
        return [*self.command, "--until", stage]

    def restore(self, stage: str) -> None:
        shutil.rmtree(self.place / "run", ignore_errors=True)
        if stage != "baseline":
            shutil.copytree(self.place / stage, self.place / "run")


@pytest.fixture(scope="module")
def before(commands: Processes, tmp_path_factory: pytest.TempPathFactory, small_model: Path, small_text: Path) -> Undisturbed:
    place = tmp_path_factory.mktemp("faults")
    recipe = write_recipe(place / "recipe.yaml", SHORT)
    command = ["run", str(recipe), "-m", str(small_model), "--data", str(small_text), "-o", str(place / "run"), "--device", "cpu"]
    made = Undisturbed(place, command, {}, {})
    for stage in STAGES:
        if stage != "baseline":
            shutil.copytree(place / "run", place / stage)
        code, log = commands.run(made.of(stage), place / "log", fault=(None, 0, str(place / "run"))), (place / "log").read_text()
        assert code == 0, log
        made.operations[stage] = int(log.splitlines()[-1])
        made.hashes[stage] = hashes(place / "run", str(STAGES.index(stage)))
    return made


def struck(commands: Processes, before: Undisturbed, stage: str, kind: str, step: int) -> None:
    before.restore(stage)
    run, file = before.place / "run", before.place / "log"
    code, log = commands.run(before.of(stage), file, fault=(kind, step, str(run))), file.read_text()
    where = f"{stage}, {kind} at operation {step}: exit {code}\n{log}"
    if code != 0 or kind == "kill":  # 0: whatever asked could do without, as a directory that is there already
        assert code == (-signal.SIGKILL if kind == "kill" else 3 if kind == "EIO" else 5), where
        assert "Traceback" not in log and log.count("error: ") == (kind != "kill"), where
        assert commands.run(before.of(stage), file) == 0, where + file.read_text()
    assert hashes(run, str(STAGES.index(stage))) == before.hashes[stage], where
    assert not list(run.glob("stages/*.partial")), where


@pytest.mark.parametrize(("number", "stage"), list(enumerate(STAGES)))
def test_a_fault_in_every_stage(number: int, stage: str, commands: Processes, before: Undisturbed) -> None:
    """Of each stage an operation near its begin and one near its end; the kinds take turns."""
    for turn, share in enumerate((0.3, 0.8)):
        struck(commands, before, stage, KINDS[(2 * number + turn) % 4], round(share * before.operations[stage]))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_at_every_operation(stage: str, commands: Processes, before: Undisturbed) -> None:
    faults = [(kind, step) for step in range(1, before.operations[stage] + 1) for kind in (KINDS if step % 3 == 0 else KINDS[:2])]
    for kind, step in faults:
        struck(commands, before, stage, kind, step)
    print(f"{stage}: {before.operations[stage]} operations, {len(faults)} faults, all survived")
