"""What killed processes leave among the temporary files and next to a report goes with the next command of the kind; what others hold stays."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from bitmend.pipelines.store.files import SCRATCH, scratch_directory, write_fresh

from ..runs import Processes

HOLD = """
import sys, time
from bitmend.pipelines.store.files import scratch_directory
with scratch_directory() as place:
    (place / "shard").write_text("half a model")
    print(place, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@pytest.fixture
def holder(temporary: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-P", "-c", HOLD], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_process_left_goes_and_what_a_living_one_holds_stays(holder: subprocess.Popen[str], temporary: Path) -> None:
    assert holder.stdout is not None
    place = Path(holder.stdout.readline().strip())
    assert place.parent == temporary and place.name.startswith(f"{SCRATCH}{holder.pid}-")
    with scratch_directory() as own:
        assert own != place and (place / "shard").is_file()
    assert not own.exists()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (place / "shard").is_file()
    with scratch_directory() as own:
        assert not place.exists() and list(temporary.iterdir()) == [own]


def test_what_cannot_be_told_stays(temporary: Path, dead: int) -> None:
    """Of a process whose number means nothing here but whose lock is held, and whatever has another name."""
    import fcntl

    held, nobodys = temporary / f"{SCRATCH}{dead}-abc", [temporary / name for name in (f"{SCRATCH}abc", "bitmend-abc", f"{SCRATCH}0-abc")]
    for place in (held, *nobodys):
        place.mkdir()
    handle = os.open(held, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with scratch_directory():
            assert held.is_dir() and all(place.is_dir() for place in nobodys)
    finally:
        os.close(handle)
    with scratch_directory():
        assert not held.exists() and all(place.is_dir() for place in nobodys)


def test_a_report_that_was_killed_half_written(tmp_path: Path, dead: int) -> None:
    alive = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        left = {number: tmp_path / f".page[1].html.{number}.partial" for number in (dead, alive.pid)}
        others = [tmp_path / f".page1.html.{dead}.partial", tmp_path / f".page[1].html.x{dead}.partial"]
        for file in (*left.values(), *others):
            file.write_text("half")
        write_fresh(tmp_path / "page[1].html", "whole\n")
        assert (tmp_path / "page[1].html").read_text() == "whole\n"
        assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "page[1].html", left[alive.pid], *others])
    finally:
        alive.kill()
        alive.wait()


def test_a_killed_eval_leaves_nothing_to_the_next(commands: Processes, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    command = ["eval", str(small_model), "--eval", str(small_text), "--seq-len", "64", "--windows", "2", "--device", "cpu"]
    before = set(Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"))
    code = commands.run(command, tmp_path / "log", {"signal": signal.SIGKILL, "path": "artifact.json", "step": 1})
    left = set(Path(tempfile.gettempdir()).glob(f"{SCRATCH}*")) - before
    assert code == -signal.SIGKILL and len(left) == 1, (tmp_path / "log").read_text()
    assert commands.run(command, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert not any(place.exists() for place in left)
