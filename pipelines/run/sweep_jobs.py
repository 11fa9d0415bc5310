"""`pipeline sweep --jobs N`: combinations in parallel, a process each, which share the sweep's stages. Nothing else passes between them.

A process runs its combination in a directory of its own, whose `stages` are the sweep's; of stages that combinations share one process makes
each, the others wait for it. On GPUs a process has one to itself. Results are those of one combination after the other, bit for bit: afterwards
each is processed in the sweep's own directory, where nothing is left to do.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import errors
from ..devices.environment import compute_of
from ..errors import PipelineError, UsageError
from ..recipes.recipe import Recipe, resolve
from ..store.rundir import RunDirectory
from .signals import signals

log = logging.getLogger("bitmend")

SHARED = ("stages", "teacher-states", "allocation")
"""What lies in the sweep's directory and not in those of its processes."""
RECIPE, ERROR, OUTPUT, LOCKS, ENVIRONMENT = "point.yaml", "error.json", "output", "locks", "environment.json"


@dataclass(frozen=True)
class Job:
    """A combination under way."""

    number: int
    process: "subprocess.Popen[bytes]"
    place: Path
    slot: int


def check_jobs(jobs: int, directory: Path, recipe: Recipe, device: str) -> None:
    """UsageError where there are more processes than GPUs to give them."""
    place = RunDirectory(directory) if directory.is_dir() else None
    if compute_of(place, device, recipe.dtype, recipe.deterministic).device.type == "cuda" and jobs > (count := torch.cuda.device_count()):
        raise UsageError(
            f"--jobs {jobs}: torch sees {count} GPU{'s' * (count > 1)}, and each process needs one to itself; give --jobs {count}"
        )


def made_ahead(recipes: Sequence[tuple[str, Recipe]], directory: Path, device: str, jobs: int) -> dict[int, PipelineError]:
    """Make the stages of (label, recipe) in `directory`, up to `jobs` at once; the errors of those that failed, by number. The baseline is
    there. A process that is killed leaves its combination to the next process. KeyboardInterrupt once all have stopped."""
    result: dict[int, PipelineError] = {}
    run = RunDirectory(directory.resolve())
    for name in SHARED:
        (run.path / name).mkdir(exist_ok=True)
    waiting, running, free = order([recipe for _, recipe in recipes]), list[Job](), list(range(jobs))[::-1]
    with run.held() as lock, tempfile.TemporaryDirectory(prefix="bitmend-sweep-") as scratch, signals(), _ended(running):
        (Path(scratch) / LOCKS).mkdir()
        while waiting or running:
            while waiting and free:
                number, slot = waiting.pop(0), free.pop()
                label, recipe = recipes[number]
                log.info("combination %d of %d begins: %s", number + 1, len(recipes), label)
                running.append(_started(number, slot, recipe, run, Path(scratch), device, lock))
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                free.append(job.slot)
                label = recipes[job.number][0]
                if (job.place / ERROR).is_file():
                    failure = json.loads((job.place / ERROR).read_text(encoding="utf-8"))
                    result[job.number] = getattr(errors, failure["kind"])(failure["message"])
                elif job.process.returncode != 0:
                    last = (job.place / OUTPUT).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
                    log.warning("%s: its process ended with %d (%s); it is processed again", label, job.process.returncode, *last or [""])
                log.info("combination %d of %d ends: %s", job.number + 1, len(recipes), label)
            time.sleep(0.05)
    for name in SHARED[1:]:
        if not any((run.path / name).iterdir()):
            (run.path / name).rmdir()
    return result


def order(recipes: Sequence[Recipe]) -> list[int]:
    """Numbers of the recipes, those first that begin otherwise than any before: they have no stage but the baseline to wait for."""
    seen: dict[str, int] = {}
    ranks = []
    for recipe in recipes:
        begin = json.dumps([recipe.model, recipe.settings()["stages"][:-1]], sort_keys=True, default=str)
        ranks.append(seen.setdefault(begin, 0))
        seen[begin] += 1
    return sorted(range(len(recipes)), key=lambda number: (ranks[number], number))


def _started(number: int, slot: int, recipe: Recipe, run: RunDirectory, scratch: Path, device: str, lock: int | None) -> Job:
    """A process in a directory of its own, which shares the stages and begins as the sweep began. It holds the sweep's lock as well: what it
    makes is its own even when the process that started it is killed."""
    place = RunDirectory(scratch / str(number))
    place.create()
    place.stages.rmdir()
    for name in SHARED:
        (place.path / name).symlink_to(run.path / name)
    (place.path / LOCKS).symlink_to(scratch / LOCKS)
    (place.path / ENVIRONMENT).write_bytes((run.path / ENVIRONMENT).read_bytes())
    (place.path / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
    environment = dict(os.environ)
    if torch.cuda.is_available():
        visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % torch.cuda.device_count()]
        device = device.partition(":")[0]
    command = [sys.executable, "-P", "-m", __name__, str(place.path), device]
    with (place.path / OUTPUT).open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment,
            pass_fds=() if lock is None else (lock,), process_group=0,
        )  # fmt: skip
    return Job(number, process, place.path, slot)


@contextmanager
def _ended(running: list[Job]) -> Iterator[None]:
    """Whatever happens, no process goes on: each is signalled to stop at its next block or step, as a run is."""
    try:
        yield
    finally:
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.wait()


def _ends_with(parent: int) -> None:
    """Stop, as by SIGTERM, once the process that started this one is no longer there."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), 15)


def main(arguments: list[str]) -> int:
    """One combination: DIRECTORY DEVICE."""
    from . import runner

    threading.Thread(target=_ends_with, args=(os.getppid(),), daemon=True).start()
    place, device = Path(arguments[0]), arguments[1]
    try:
        runner.run(resolve(str(place / RECIPE)), place, device=device, page=False)
    except PipelineError as error:
        failure = {"kind": type(error).__name__, "message": str(error)}
        (place / ERROR).write_text(json.dumps(failure), encoding="utf-8")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
