"""A run's directory: whose it is, and who is in it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bitmend.pipelines.errors import InputError
from bitmend.pipelines.run import runner
from bitmend.pipelines.store import rundir
from bitmend.pipelines.store.rundir import RunDirectory

from ..runs import chosen

HOLD = """
import sys, time
from pathlib import Path
from bitmend.pipelines.store.rundir import RunDirectory
place = RunDirectory(Path(sys.argv[1]))
place.create()
with place.held():
    print("held", flush=True)
    time.sleep(120)
"""


def test_create_makes_it_once(tmp_path: Path) -> None:
    place = RunDirectory(tmp_path / "deep" / "run")
    place.create()
    place.write({"stages": [{"address": "baseline"}]})
    place.create()
    assert place.read()["stages"] == [{"address": "baseline"}]


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"holds 'thesis.tex' but no run.json, so it is not a run directory; give another one with -o"):
        RunDirectory(tmp_path).create()
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be a run directory"):
        RunDirectory(tmp_path / "file").create()
    with pytest.raises(InputError, match="cannot be a run directory"):
        RunDirectory(tmp_path / "file" / "run").create()


def test_a_start_killed_at_its_first_write_is_not_foreign(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("")
    (tmp_path / ".run.json.4711").write_text("{")
    RunDirectory(tmp_path).create()
    assert RunDirectory(tmp_path).read()["stages"] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema": 99, "program": "bitmend"}', "written with run schema 99, this program uses 1; give a new directory with -o"),
        ('{"schema": 1, "program": "other"}', "give a new directory with -o"),
        ('{"schema": 1,', "not JSON"),
    ],
)
def test_another_schema_is_refused_and_kept(text: str, words: str, tmp_path: Path, small_model: Path, small_text: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(text)
    for action in (lambda: runner.run(chosen(tmp_path, small_model, small_text), run), lambda: runner.status(run), lambda: runner.gc(run)):
        with pytest.raises(InputError, match=words) as caught:
            action()
        assert caught.value.exit_code == 3
    assert (run / "run.json").read_text() == text and len(list(run.iterdir())) == 1


def test_missing_directories(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run directory"):
        runner.status(tmp_path / "no")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no run\.json"):
        runner.resume(tmp_path / "empty")
    place = RunDirectory(tmp_path / "run")
    place.create()
    with pytest.raises(InputError, match="nothing says what to resume"):
        runner.resume(place.path)
    with pytest.raises(InputError, match="no stage has been measured yet"):
        runner.record(place.path)


def test_one_process_at_a_time(tmp_path: Path, small_model: Path, small_text: Path) -> None:
    run = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        for action in (lambda: runner.run(chosen(tmp_path, small_model, small_text), run), lambda: runner.gc(run)):
            with pytest.raises(InputError, match=f"in use by process {holder.pid} on .*; wait for it, or give another directory with -o"):
                action()
        assert runner.status(run)["stages"] == [], "looking is allowed"
    finally:
        holder.kill()
        holder.wait()
    with RunDirectory(run).held():  # the lock died with its process
        assert f"process {os.getpid()} on" in (run / ".lock").read_text()


def test_a_heartbeat_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(rundir.fcntl, "flock", refuse)
    monkeypatch.setattr(rundir, "HEARTBEAT_SECONDS", 0.01)
    place = RunDirectory(tmp_path)
    place.create()
    beat = tmp_path / ".heartbeat"
    with place.held():
        first = beat.stat().st_mtime_ns
        with pytest.raises(InputError, match=f"in use by process {os.getpid()}"), place.held():
            pass
        until = time.monotonic() + 10
        while beat.stat().st_mtime_ns == first and time.monotonic() < until:
            time.sleep(0.01)
        assert beat.stat().st_mtime_ns > first
    assert not beat.exists()
    beat.write_text("process 1 on nowhere")
    os.utime(beat, (0, 0))
    with place.held():
        assert f"process {os.getpid()}" in beat.read_text(), "one left behind an hour ago holds nothing"


def test_the_log_is_json_lines(finished: Path) -> None:
    events = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    begun = [e["stage"] for e in events if e["event"] == "stage begins"]
    assert begun == [e["stage"] for e in events if e["event"] == "stage ends"]
    assert begun == ["baseline", "prune", "quantize", "decompose", "recover", "fuse"]
    assert events[-1]["event"] == "finished"
