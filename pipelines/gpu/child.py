"""One call of `make gpu`: its time limit and directory, and child processes that are stopped in time.

Knows processes and the clock; not what runs in them. Needs the standard library alone.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.3
PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


@dataclass(frozen=True)
class CardPlan:
    """What is measured. `shape` is a name in synthetic.SHAPES and a number of blocks, `shape_rows` (stage, method) of its table or all;
    `decode` are options of `pipeline bench generate`, `sets` settings of the demo, `training` those of train."""

    tests: tuple[str, ...] = ("tests/device", "tests/kernels")
    model: str = "demo"
    data: str = "demo"
    sets: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    shape: tuple[str, int] = ("8b", 2)
    shape_rows: tuple[tuple[str, str], ...] = ()
    kernels: tuple[str, ...] = ("--quick",)
    decode: tuple[str, ...] = ("--shape", "8b")
    training: tuple[str, ...] = ("recover.steps=300", "recover.batch_size=8", "recover.seq_len=512", "recover.eval_every=50")


@dataclass(frozen=True)
class Call:
    """One part's two minutes: it is over at `until` (time.monotonic), what still runs `grace` seconds before is signalled to stop. `place` keeps
    what makes the next call go on. `launcher` runs a module: python -m, or a script that pretends a card first."""

    plan: CardPlan
    place: Path
    until: float
    grace: float
    launcher: tuple[str, ...] = (sys.executable, "-P", "-m")

    def over(self) -> bool:
        """Too late to begin anything."""
        return time.monotonic() > self.until - 2 * self.grace

    def run(self, module: str, arguments: Sequence[str], name: str, watch: Callable[[], None] = lambda: None) -> int | None:
        """Exit code of `module ARGUMENTS`; None when it had to be stopped. What it writes is in `log(name)`; `watch` is called meanwhile,
        and once after its end."""
        return self.process([*self.launcher, module, *arguments], name, watch)

    def process(self, command: Sequence[str], name: str, watch: Callable[[], None] = lambda: None) -> int | None:
        self.place.mkdir(parents=True, exist_ok=True)
        with self.log(name).open("w", encoding="utf-8") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT, env=os.environ | {"PYTHONSAFEPATH": "1"},
                start_new_session=True, preexec_fn=_end_with_parent,
            )  # fmt: skip
        stopping = False
        try:
            while process.poll() is None:
                watch()
                left = self.until - time.monotonic()
                if left < self.grace and not stopping:
                    stopping = True
                    os.killpg(process.pid, signal.SIGTERM)
                elif left < 0:
                    break
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        watch()
        return None if stopping else process.returncode

    def log(self, name: str) -> Path:
        return self.place / f"{name}.log"

    def last_line(self, name: str) -> str:
        """The last line a process printed."""
        lines = [line for line in self.log(name).read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else "it printed nothing"


def _end_with_parent() -> None:
    """On Linux a process is signalled to stop when this one is killed, else it would hold the card and the run's lock."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)
