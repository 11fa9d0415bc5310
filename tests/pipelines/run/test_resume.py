"""Killed at any moment, then the same command: every file of every stage is bit for bit that of a run nobody disturbed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bitmend.pipelines.run import runner

from ..runs import Processes, hashes, stage_directory, write_recipe


@pytest.fixture
def command(tmp_path: Path, small_model: Path, small_text: Path) -> list[str]:
    recipe = write_recipe(tmp_path / "recipe.yaml")
    return ["run", str(recipe), "-m", str(small_model), "--data", str(small_text), "-o", str(tmp_path / "run"), "--device", "cpu"]


def same(run: Path, finished: Path, stages: str = "012345") -> None:
    assert hashes(run, stages) == hashes(finished, stages)
    assert len(hashes(run)) > 9 * len(stages)
    assert not list(run.glob("stages/*.partial")), "nothing unfinished is left"


def numbers(run: Path) -> list[tuple[object, ...]]:
    """What the report says of the stages, times and memory left out."""
    stages = json.loads((run / "record.json").read_text())["stages"]
    return [(s["stage"], s["perplexity"], s["total_bytes"], s["trainable_parameters"], s["notes"], s["layers"]) for s in stages]


KILLS = [
    ("00-baseline", 1),  # the first file of all
    ("01-prune", 2),  # a block's first shard is there, its second is not
    ("01-prune", 6),  # its marker is
    ("02-quantize", 8),  # two blocks are finished
    (".metrics/stage.json", 1),  # a stage is finished and has not its name
    ("02-quantize", 8),  # while it is being sealed: some markers are removed
    ("03-decompose", 11),
    (".metrics/", 2),  # sealed and not measured
    ("04-recover", 2),  # a training state is there, one step of it written
    ("04-recover", 5),  # while it is written back
    ("05-fuse", 7),
    ("report.html", 1),
]


def test_killed_in_every_stage(commands: Processes, command: list[str], tmp_path: Path, finished: Path) -> None:
    for path, step in KILLS:
        code = commands.run(command, tmp_path / "log", {"signal": signal.SIGKILL, "path": path, "step": step})
        assert code == -signal.SIGKILL, f"{path}, step {step}: {(tmp_path / 'log').read_text()}"
        if (path, step) == ("04-recover", 2):  # and what a power cut may leave of it: the training starts anew
            state = next(tmp_path.glob("run/stages/04-recover*.partial/training.safetensors"))
            state.write_bytes(state.read_bytes()[:-8])
    assert commands.run(command, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    same(tmp_path / "run", finished)
    assert numbers(tmp_path / "run") == numbers(finished)


def test_killed_at_random(commands: Processes, command: list[str], tmp_path: Path, finished: Path) -> None:
    draw, kills = random.Random(1), 0
    while kills < 30:
        end = {"signal": signal.SIGKILL, "path": str(tmp_path / "run"), "step": draw.randrange(1, 90)}
        if (code := commands.run(command, tmp_path / "log", end)) != -signal.SIGKILL:
            break
        kills += 1
    assert code == 0, (tmp_path / "log").read_text()
    assert kills >= 2
    same(tmp_path / "run", finished)
    assert numbers(tmp_path / "run") == numbers(finished)


def test_killed_from_outside(command: list[str], tmp_path: Path, finished: Path) -> None:
    """The command as a user starts it, without any help from the test inside it."""
    started = subprocess.Popen(
        [sys.executable, "-P", "-m", "bitmend.pipelines.cli", *command, "--dtype", "float32"],  # which `finished` was made in
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 120
    while not list(tmp_path.glob("run/stages/0[1-4]-*.partial/*.part.json")):
        assert started.poll() is None and time.monotonic() < until, "the process ended before it was killed"
        time.sleep(0.002)
    started.kill()
    assert started.wait() == -signal.SIGKILL
    assert runner.status(tmp_path / "run")["stages"][-1]["state"] == "missing"
    runner.resume(tmp_path / "run", until_stage="quantize")
    same(tmp_path / "run", finished, "012")


def test_sigterm_ends_at_the_next_block(commands: Processes, command: list[str], tmp_path: Path, finished: Path) -> None:
    end = {"signal": signal.SIGTERM, "path": "block-00001.part.json", "step": 3}  # written, removed by sealing, and then that of quantize
    assert commands.run(command, tmp_path / "log", end) == 130
    log = (tmp_path / "log").read_text()
    assert "interrupted" in log and "Traceback" not in log
    rows = {row["stage"]: row for row in runner.status(tmp_path / "run")["stages"]}
    assert [row["state"] for row in rows.values()] == ["done", "done", "partial", "missing", "missing", "missing"]
    assert rows["quantize"]["finished_parts"] == 2
    untouched = stage_directory(tmp_path / "run", "quantize").with_suffix(".partial") / "block-00000.matrices.safetensors"
    before = untouched.stat().st_ino
    assert commands.run([*command, "--until", "quantize"], tmp_path / "log") == 0
    assert (stage_directory(tmp_path / "run", "quantize") / untouched.name).stat().st_ino == before, "finished blocks are not done again"
    same(tmp_path / "run", finished, "012")


def test_sigint_in_training_keeps_the_steps(commands: Processes, command: list[str], tmp_path: Path, finished: Path) -> None:
    end = {"signal": signal.SIGINT, "path": "training.safetensors", "step": 1}  # while the state after step 5 is written
    assert commands.run(command, tmp_path / "log", end) == 130
    row = next(row for row in runner.status(tmp_path / "run")["stages"] if row["stage"] == "recover")
    assert row["state"] == "partial" and row["finished_steps"] in (5, 6)
    before = json.loads((stage_directory(tmp_path / "run", "recover").with_suffix(".metrics") / "interrupted.json").read_text())
    assert commands.run(command, tmp_path / "log") == 0
    same(tmp_path / "run", finished)
    attempts = json.loads((stage_directory(tmp_path / "run", "recover").with_suffix(".metrics") / "stage.json").read_text())
    assert attempts["seconds"] > before["seconds"], "the first attempt counts as well"


def test_sigterm_outside_a_stage_ends_at_once(commands: Processes, command: list[str], tmp_path: Path) -> None:
    end = {"signal": signal.SIGTERM, "path": "recipe.resolved.yaml", "step": 1}
    assert commands.run(command, tmp_path / "log", end) == 130
    assert not list(tmp_path.glob("run/stages/*"))
    assert commands.run([*command, "--until", "prune"], tmp_path / "log") == 0


def test_torn_files_are_done_again(commands: Processes, command: list[str], tmp_path: Path, finished: Path) -> None:
    """What a power cut may leave: a marker that is not whole, a shard cut short."""
    end = {"signal": signal.SIGKILL, "path": "block-00002.part.json", "step": 1}
    assert commands.run(command, tmp_path / "log", end) == -signal.SIGKILL
    partial = stage_directory(tmp_path / "run", "prune").with_suffix(".partial")
    (partial / "block-00000.part.json").write_bytes((partial / "block-00000.part.json").read_bytes()[:40])
    shard = partial / "block-00001.matrices.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert commands.run([*command, "--until", "prune"], tmp_path / "log") == 0, (tmp_path / "log").read_text()
    same(tmp_path / "run", finished, "01")
