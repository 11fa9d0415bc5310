"""The commands that read a run's JSON, or tell of the program, import nothing heavy; and a run's directory is there before what is."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bitmend.pipelines.bench import command_times
from bitmend.pipelines.commands import about
from bitmend.pipelines.errors import InputError, UsageError
from bitmend.pipelines.store import files
from bitmend.pipelines.store.files import write_json
from bitmend.pipelines.store.manifest import MANIFEST, SCHEMA
from bitmend.pipelines.store.rundir import TRAINING_STATE, RunDirectory
from bitmend.reports.record import Protocol, RunRecord, StageRecord

HEAVY = {"torch", "transformers", "datasets", "numpy", "scipy", "matplotlib", "jinja2", "safetensors", "tokenizers"}
EACH = """
import json, sys
from bitmend.pipelines.cli import main
for arguments in json.loads(sys.argv[1]):
    code = main(arguments)
    print(json.dumps([arguments, code, sorted(set(json.loads(sys.argv[2])) & set(sys.modules))]), file=sys.stderr)
"""


def made_run(path: Path) -> Path:
    """A run's directory without its weights: one stage done, one under way."""
    run = RunDirectory(path)
    run.create()
    rows = [
        {"address": name, "method": "scales", "key": "k" * 64, "name": f"0{place}-{name}-{'k' * 8}", "settings": {}}
        for place, name in enumerate(("baseline", "recover"))
    ]
    run.write({"stages": rows, "model": "demo", "recipe": "x"})
    baseline = run.artifact(rows[0]["name"])
    baseline.mkdir()
    (baseline / "config.json").write_text("{}")
    entry = {"sha256": files.sha256(baseline / "config.json"), "bytes": 2}
    manifest = {"schema": SCHEMA, "key": "k" * 64, "stage": {"name": "baseline"}, "files": {"config.json": entry}, "linears": {}}
    write_json(baseline / MANIFEST, manifest)
    run.metrics(rows[0]["name"]).mkdir()
    write_json(run.metrics(rows[0]["name"]) / "01234567.json", {"nll": [3.0, 3.0], "kl": None, "top1": None})
    run.scratch(rows[1]["name"]).mkdir()
    header = json.dumps({"__metadata__": {"meta": json.dumps({"step": 40})}}).encode()
    (run.scratch(rows[1]["name"]) / TRAINING_STATE).write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    stages = (StageRecord("baseline", perplexity=20.1, total_bytes=1000), StageRecord("quantize", "gptq", perplexity=25.0, total_bytes=100))
    write_json(path / "record.json", RunRecord(path.name, "demo", Protocol("demo", seq_len=64), stages).to_json())
    return path


def test_the_package_itself_imports_nothing() -> None:
    code = "import sys; import importlib.machinery; before = set(sys.modules); import bitmend; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "['bitmend']\n", done.stderr


def test_small_commands_import_nothing_heavy(tmp_path: Path) -> None:
    one, two = str(made_run(tmp_path / "one")), str(made_run(tmp_path / "two"))
    commands = [
        ["--version"], ["--help"], ["status", "--help"], ["run", "--help"], ["list"], ["list", "gptq"], ["list", "--json"],
        ["show", "compress_and_recover"], ["show", "recover", "-m", "org/model", "--profile", "demo", "--json"],
        ["status", one], ["status", one, "--json"], ["status", one, "--verify"], ["report", "show", one], ["report", "show", one, "--json"], ["gc", one, "--dry-run"],
        *(["report", "export", one, "--format", kind] for kind in ("json", "md", "csv")),
        ["compare", one, two], ["compare", one, two, "--json"], ["gc", two],
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", EACH, json.dumps(commands), json.dumps(sorted(HEAVY))], capture_output=True, text=True, timeout=120
    )
    actual = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[[")]
    assert actual == [[arguments, 0, []] for arguments in commands], done.stderr
    assert '"finished_steps": 40' in done.stdout


TIP = "0123456789abcdef" * 2 + "01234567"
LAYOUTS: dict[str, dict[str, str]] = {
    "a branch": {".git/HEAD": "ref: refs/heads/a/b\n", ".git/refs/heads/a/b": f"{TIP}\n"},
    "a packed branch": {".git/HEAD": "ref: refs/heads/b\n", ".git/packed-refs": f"# pack-refs\n{'f' * 40} refs/heads/a/b\n{TIP} refs/heads/b\n"},
    "a commit": {".git/HEAD": f"{TIP}\n"},
    "a worktree": {
        ".git": "gitdir: ../main/.git/worktrees/x\n", "../main/.git/worktrees/x/HEAD": "ref: refs/heads/x\n",
        "../main/.git/worktrees/x/commondir": "../..\n", "../main/.git/refs/heads/x": f"{TIP}\n",
    },
}  # fmt: skip
UNREADABLE: dict[str, dict[str, str]] = {
    "no commit yet": {".git/HEAD": "ref: refs/heads/main\n"},
    "a branch that is none": {".git/HEAD": "ref: refs/heads/main\n", ".git/packed-refs": f"{TIP} refs/heads/x\n"},
    "an empty directory": {".git/description": ""},
    "a worktree that was removed": {".git": "gitdir: ../main/.git/worktrees/x\n"},
    "something else": {".git/HEAD": "\x1b[31mred\n"},
}


@pytest.mark.parametrize("layout", [*LAYOUTS, *UNREADABLE])
def test_the_version_of_a_checkout_names_its_commit(layout: str, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name, text in (LAYOUTS | UNREADABLE)[layout].items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text)
    assert about.version(checkout).endswith(f" (commit {TIP[:12] if layout in LAYOUTS else 'unknown'})")


def test_the_version_of_a_wheel_is_its_number_alone(tmp_path: Path) -> None:
    assert about.version(tmp_path).replace(".", "").isdecimal()


WATCH = """
import os, sys
from pathlib import Path
from bitmend.pipelines import cli

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "datasets"):
            from bitmend.pipelines.run import ledger
            print(name, ledger.status(Path(sys.argv[1]))["stages"], flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
sys.exit(cli.main(sys.argv[2:]))
"""


SWEEP = ["sweep", "compress_and_recover", "--over", "quantize.bits=3,4"]
COMMANDS = [
    (["run", "compress_and_recover"], "runs/compress_and_recover"),
    (["run", "compress_and_recover", "-o", "out/mine"], "out/mine"),
    (["run", "compress_and_recover", "--set", "prune.pattern=2:4"], "runs/compress_and_recover"),
    (SWEEP, "runs/compress_and_recover-sweep"),
    ([*SWEEP, "--over", "model=org/a,org/b", "--budget", "3bpw"], "runs/compress_and_recover-a-sweep"),
    ([*SWEEP, "-o", "out/mine"], "out/mine"),
]


@pytest.mark.parametrize(("arguments", "place"), COMMANDS)
def test_a_runs_directory_is_there_before_the_first_heavy_import(arguments: list[str], place: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WATCH, place, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "torch []\n", done.stderr


def test_a_refusal_leaves_no_directory_behind_and_takes_none_that_was_there(tmp_path: Path) -> None:
    def refused(path: Path) -> None:
        with pytest.raises(UsageError), RunDirectory(path).created():
            assert RunDirectory(path).read()["stages"] == []
            raise UsageError("no")

    refused(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []
    before = made_run(tmp_path / "run")
    with pytest.raises(UsageError), RunDirectory(before).created():
        raise UsageError("no")
    assert RunDirectory(before).read()["model"] == "demo"


def test_a_directory_that_another_process_took_up_meanwhile_stays(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(UsageError), run.created():
        run.write({"stages": [{"address": "baseline"}]})
        raise UsageError("no")
    assert run.read()["stages"]
    with pytest.raises(UsageError), RunDirectory(tmp_path / "held").created(), RunDirectory(tmp_path / "held").held():
        raise UsageError("no")


@pytest.mark.parametrize("torn", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0{}", b"\x09\0\0\0\0\0\0\0[1, 2"])
def test_a_torn_training_state_is_not_read(torn: bytes, tmp_path: Path) -> None:
    from bitmend.pipelines.run import ledger

    run = made_run(tmp_path / "run")
    next(run.glob(f"stages/*/{TRAINING_STATE}")).write_bytes(torn)
    rows: list[dict[str, Any]] = ledger.status(run)["stages"]
    assert [row["state"] for row in rows] == ["done", "partial"] and "finished_steps" not in rows[1]


def test_the_benchmark_times_each_of_them_and_names_the_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="-m RUN_DIR"):
        command_times.command_rows(None, 1)
    with pytest.raises(InputError, match=r"^pipeline status nowhere: nowhere: no such run directory"):
        command_times._seconds(["status", "nowhere"])
    started: list[list[str]] = []
    monkeypatch.setattr(command_times, "_seconds", lambda words: started.append(words) or (1.0 / len(started), 0.1))
    rows = command_times.command_rows("RUN", 2)
    assert [row["command"] for row in rows][-2:] == ["compare", "gc --dry-run"] and ["compare", "RUN", "RUN"] in started
    assert len(started) == 3 * len(rows) and rows[0]["least_seconds"] == 1 / 3 and rows[0]["seconds"] == (1 / 2 + 1 / 3) / 2


def test_a_cache_that_cannot_be_read_or_written_costs_a_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"text")
    known = files.sha256(tmp_path / "file")
    monkeypatch.setenv("BITMEND_CACHE", "/dev/null/cache")
    assert files.cached_sha256(tmp_path / "file") == known

    def refused(*arguments: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(
        Path, "stat", lambda self, plain=Path.stat, **options: refused() if "cache" in self.parts else plain(self, **options)
    )
    monkeypatch.setattr(Path, "read_text", refused)
    assert files.cached_sha256(tmp_path / "file") == known
