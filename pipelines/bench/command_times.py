"""`pipeline bench commands`: seconds from the start of a process to its end, of the commands that read a run or describe the program."""

import resource
import statistics
import subprocess
import sys
import time
from typing import Any

from ..errors import InputError, UsageError

ALONE = (["--version"], ["--help"], ["status", "--help"], ["list"], ["list", "gptq"], ["show", "compress_and_recover"])
OF_A_RUN = (
    ["status"],
    ["report", "show"],
    *(["report", "export", "--format", kind] for kind in ("json", "md", "csv")),
    ["compare"],
    ["gc", "--dry-run"],
)


def command_rows(run: str | None, repeats: int) -> list[dict[str, Any]]:
    """A row a command: the least and the median of its seconds, and the least of the processor's (which other work on the machine leaves
    alone), after one start that fills the file cache. `run` is the directory to read."""
    if run is None:
        raise UsageError("bench commands reads a run: name its directory with -m RUN_DIR")
    of_run = [[*words, run, run] if words == ["compare"] else [*words, run] for words in OF_A_RUN]
    rows = []
    for words in [*ALONE, *of_run]:
        taken = [_seconds(words) for _ in range(repeats + 1)][1:]
        walls, processor = zip(*taken, strict=True)
        name = " ".join(word for word in words if word != run)
        rows.append(
            {"command": name, "least_seconds": min(walls), "seconds": statistics.median(walls), "processor_seconds": min(processor)}
        )
    return rows


def _seconds(words: list[str]) -> tuple[float, float]:
    """(of the clock, of the processor)"""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-P", "-m", "bitmend.pipelines.cli", *words], capture_output=True, text=True)
    taken, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise InputError(f"pipeline {' '.join(words)}: {done.stderr.strip().removeprefix('error: ') or f'exit code {done.returncode}'}")
    return taken, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
