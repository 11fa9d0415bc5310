"""A run's directory: its lock, the recipe and environment it was started with, its log, and where each stage lies.

Knows files and locks; no models, no maths.

    runs/<name>/{run.json, recipe.resolved.yaml, environment.json, log.jsonl, stages/NN-<stage>-<key8>[.metrics], teacher-states/, report.html}
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import InputError, UsageError
from ..ranks.exchange import Ranks
from .files import PARTIAL, checksum, disk_errors, read_json, write_bytes, write_json

SCHEMA = 1
HEARTBEAT_SECONDS = 10
STALE_SECONDS = 60
APPEARING_SECONDS = 60.0
"""How long a network's file system may take to show one machine what another one wrote."""
RECIPE_CHECKSUM = "# checksum of the lines above: "
TRAINING_STATE = "training.safetensors"
"""In the scratch directory of a stage that trains: where it is, to go on from."""
TRAINING_PARTS, PARTS_META = "training.parts", "meta.json"
"""The same where ranks hold parts: a directory, and what in it is no tensor."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run. `stages` in run.json is the plan of the last command: address, key, directory name, settings."""

    path: Path

    @property
    def stages(self) -> Path:
        return self.path / "stages"

    @property
    def teacher_states(self) -> Path:
        return self.path / "teacher-states"

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.resolved.yaml"

    def checked_recipe(self) -> str:
        """The path of the recipe that `write_recipe` wrote. InputError where it is another one now: it decides every stage's key."""
        try:
            text = self.recipe.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"{self.recipe}: cannot be read ({error}); run the recipe again with -o {self.path}") from error
        body, mark, recorded = text.rpartition(RECIPE_CHECKSUM)
        if "stages:" not in text or (mark and recorded.strip() != checksum(body)):
            raise InputError(
                f"{self.recipe}: has changed since it was written; run its recipe again with -o {self.path}, with --set for what is to be another"
            )
        return str(self.recipe)

    def write_recipe(self, text: str) -> None:
        write_bytes(self.recipe, f"{text}{RECIPE_CHECKSUM}{checksum(text)}\n".encode())

    def read(self) -> dict[str, Any]:
        """run.json. InputError when this is no run directory, or one of another schema."""
        file = self.path / "run.json"
        if not self.path.is_dir():
            raise InputError(f"{self.path}: no such run directory; `pipeline run compress_and_recover -o {self.path}` makes one")
        if not file.is_file():
            raise InputError(f"{self.path}: no run.json, so this is not a run directory; give another one with -o")
        state = read_json(file, "start again in a new directory with -o")
        if state.get("schema") != SCHEMA or state.get("program") != "bitmend":
            raise InputError(
                f"{self.path}: written with run schema {state.get('schema')}, this program uses {SCHEMA}; give a new directory with -o"
            )
        return state

    def write(self, state: Mapping[str, object]) -> None:
        write_json(self.path / "run.json", {"schema": SCHEMA, "program": "bitmend", **state})

    def create(self) -> None:
        """Make the directory, or accept one that is empty (but for what a killed start left) or a run's. InputError for anything else:
        nothing is overwritten. UsageError inside another run's directory."""
        refuse_inside_run(self.path, itself=False)
        with disk_errors(self.path):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                foreign = [p.name for p in self.path.iterdir() if p.name != ".lock" and not p.name.startswith(".run.json.")]
            except (NotADirectoryError, FileExistsError, PermissionError) as error:
                raise InputError(f"{self.path}: cannot be a run directory ({error.strerror}); give another one with -o") from error
            if (self.path / "run.json").is_file():
                self.read()
            elif foreign:
                raise InputError(
                    f"{self.path}: holds {foreign[0]!r} but no run.json, so it is not a run directory; give another one with -o"
                )
            else:
                self.write({"stages": []})
            self.stages.mkdir(exist_ok=True)

    @contextmanager
    def created(self) -> Iterator[None]:
        """`create`, before work that may refuse: it is then as if nothing had been made. Where another process has taken the directory up it
        stays."""
        new = [place for place in (self.path, *self.path.parents) if not place.exists()]
        mine = not (self.path / "run.json").is_file()
        self.create()
        try:
            yield
        except Exception:
            if mine:
                with suppress(InputError, OSError), self.held():
                    self._withdraw()
                with suppress(OSError):
                    for place in new:
                        place.rmdir()
            raise

    def _withdraw(self) -> None:
        """What `create` made and `held` left, if nothing has been planned since."""
        if not self.read()["stages"]:
            self.stages.rmdir()
            for name in ("run.json", ".lock"):
                (self.path / name).unlink()

    def log(self, event: str, **fields: object) -> None:
        """One line of log.jsonl."""
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}, default=str)
        with disk_errors(self.path), (self.path / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    def artifact(self, name: str) -> Path:
        return self.stages / name

    def scratch(self, name: str) -> Path:
        return self.stages / f"{name}{PARTIAL}"

    def metrics(self, name: str) -> Path:
        return self.stages / f"{name}.metrics"

    def state(self, name: str) -> str:
        """Of a stage: done, partial or missing."""
        return "done" if self.artifact(name).is_dir() else "partial" if self.scratch(name).is_dir() else "missing"

    @contextmanager
    def stage_held(self, name: str) -> Iterator[None]:
        """Where processes share the stages (a sweep's, which have a directory of locks): this one to itself, once another has made it."""
        locks = self.path / "locks"
        if not locks.is_dir():
            yield
            return
        with (locks / name).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def held(self) -> Iterator[int | None]:
        """Exclusive use by this process; InputError names the holder. The lock dies with its process and with those that it hands the file
        descriptor to (None on file systems without flock)."""
        lock = self.path / ".lock"
        with lock.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    with _heartbeat(self.path):
                        yield None
                    return
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise InputError(f"{self.path}: in use by {holder}; wait for it, or give another directory with -o") from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield file.fileno()


@contextmanager
def _heartbeat(path: Path) -> Iterator[None]:
    """For file systems without flock: a file that its holder touches; older than a minute, it counts as left behind."""
    beat = path / ".heartbeat"
    if beat.is_file() and time.time() - beat.stat().st_mtime < STALE_SECONDS:
        raise InputError(f"{path}: in use by {beat.read_text()}; wait for it, or give another directory with -o")
    beat.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    done = threading.Event()

    def keep() -> None:
        while not done.wait(HEARTBEAT_SECONDS):
            beat.touch()

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        beat.unlink(missing_ok=True)


def appears(path: Path, seconds: float = APPEARING_SECONDS) -> bool:
    """Whether a file or directory that another rank wrote is here, now or before long."""
    until = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
        with suppress(OSError):
            os.listdir(path.parent)  # has a client of NFS ask again
    return True


def check_shared(directory: Path, ranks: Ranks) -> None:
    """InputError that names a rank to which rank 0's run directory is another place, or none."""
    path = directory / f".seen-by-all-{ranks.broadcast(os.urandom(4).hex())}"
    if ranks.leads:
        path.touch()
    ranks.barrier()
    blind = [host for host in ranks.gathered(None if appears(path, APPEARING_SECONDS / 4) else socket.gethostname()) if host is not None]
    if ranks.leads:
        path.unlink()
    if blind:
        raise InputError(
            f"{directory}: rank 0 wrote a file there that {blind[0]} does not see; all machines need one file system for the run: give -o on one "
            "that they share"
        )


def holding_run(path: Path) -> RunDirectory | None:
    """The run whose directory `path` is or, links followed, lies in; `path` need not be there."""
    path = path.expanduser().resolve()
    result = (directory for directory in (path, *path.parents) if (directory / "run.json").is_file() and (directory / "stages").is_dir())
    return next(map(RunDirectory, result), None)


def refuse_inside_run(output: Path, itself: bool = True) -> None:
    """UsageError for an output below a run's directory (or, with `itself`, for that directory): `gc` drops there what is not the run's."""
    place = output.expanduser().resolve()
    if (run := holding_run(place if itself else place.parent)) is not None:
        raise UsageError(f"{output}: lies in the run directory {run.path}, which holds nothing but its run; give another place with -o")


OUTSIDE = "outside.safetensors"
"""Of a budget's table of errors, the matrices outside the blocks."""


def finished_blocks(table: Path) -> int:
    """Of a budget's table of errors, one file a block."""
    return len(list(table.glob("block-?????.safetensors")))


def run_of(place: Path) -> RunDirectory | None:
    """The run that `place` is or lies in, or None where it is no directory or its run has no recipe."""
    run = holding_run(place) if place.expanduser().is_dir() else None
    return run if run is not None and run.recipe.is_file() else None
