"""Combinations side by side make the same bits as one after the other, share their stages, and outlive kills."""

import fcntl
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from bitmend.pipelines.run import sweep, sweep_jobs

from ..runs import hashes, write_recipe
from ..toy import RTN

pytestmark = pytest.mark.usefixtures("no_pages")

FEW: dict[str, Any] = {"calibration": {"samples": 4, "seq_len": 32}, "evaluation": {"seq_len": 32, "windows": 2}}
OVER = ["quantize.bits=3,4", "decompose.rank=2,4"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "r.yaml", [RTN, {"decompose": {"method": "zeroquant_v2", "rank": 2}}], **FEW)


def swept(recipe: Path, options: dict[str, str], place: Path, over: list[str], jobs: int) -> sweep.SweepOutcome:
    return sweep.sweep(sweep.combinations(str(recipe), over, options=options), place, device="cpu", jobs=jobs)


def rows(outcome: sweep.SweepOutcome) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in outcome.rows()]


def test_side_by_side_is_one_after_the_other(recipe: Path, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    """What fails says why, and is not tried again."""
    options = {"model": str(small_model), "data": str(small_text)}
    over = ["decompose.rank=2,4", "evaluation.seq_len=32,100000"]
    plain = swept(recipe, options, tmp_path / "plain", over[:1], 1)
    parallel = swept(recipe, options, tmp_path / "together", over, 2)
    actual, failed = rows(parallel)[:2], rows(parallel)[2:]
    assert [{k: v for k, v in row.items() if k not in ("error", "evaluation.seq_len")} for row in actual] == rows(plain)
    assert len(failed) == 2 and all(row["perplexity"] is None and "100000" in row["error"] for row in failed)
    assert hashes(tmp_path / "together") == hashes(tmp_path / "plain")
    assert (tmp_path / "together" / "log.jsonl").read_text().count('"finished"') == 3, "the baseline, and what works"
    assert not list(tmp_path.glob("together/stages/*.partial")) and not (tmp_path / "together" / "teacher-states").exists()


@pytest.mark.slow
def test_stages_that_are_shared_are_made_once(recipe: Path, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    options = {"model": str(small_model), "data": str(small_text)}
    plain = swept(recipe, options, tmp_path / "plain", OVER, 1)
    parallel = swept(recipe, options, tmp_path / "together", OVER, 3)
    assert rows(parallel) == rows(plain) and len(rows(plain)) == 4
    assert hashes(tmp_path / "together") == hashes(tmp_path / "plain")


@pytest.mark.slow
def test_killed_the_next_one_goes_on(recipe: Path, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    """Its processes stop by themselves; until then the directory is in use."""
    run, options = tmp_path / "run", {"model": str(small_model), "data": str(small_text)}
    arguments = ["sweep", str(recipe), "-m", str(small_model), "--data", str(small_text), "-o", str(run), "--device", "cpu", "--jobs", "2"]
    for over in OVER:
        arguments += ["--over", over]
    with (tmp_path / "log").open("wb") as log:
        started = subprocess.Popen([sys.executable, "-P", "-m", "bitmend.pipelines.cli", *arguments], stdout=log, stderr=log, cwd=tmp_path)
    until = time.monotonic() + 120
    while not list(run.glob("stages/01-quantize-*")):
        assert started.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
        time.sleep(0.005)
    started.send_signal(signal.SIGKILL)
    started.wait()
    with (run / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the test's timeout ends it where a process goes on for ever
    swept(recipe, options, run, OVER, 2)
    swept(recipe, options, tmp_path / "plain", OVER, 1)
    assert hashes(run) == hashes(tmp_path / "plain")


def test_those_that_share_least_come_first(recipe: Path) -> None:
    recipes = [point.recipe for point in sweep.combinations(str(recipe), OVER)]
    assert sweep_jobs.order(recipes) == [0, 2, 1, 3], "3 bits and 4 bits, then their second ranks"
