"""What a run finds around it: device, threads and versions (environment.json), and the signals that ask it to stop.

Knows torch's settings and the process; no recipe, no stage.
"""

import json
import logging
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .artifact import write_json
from .errors import UsageError
from .rundir import RunDirectory

log = logging.getLogger("bitmend")


def environment(place: RunDirectory, device: str) -> dict[str, Any]:
    """environment.json: written at the first start; a later one continues with its threads, device and dtype."""
    path = place.path / "environment.json"
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if chosen.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("--device cuda: this torch sees no CUDA device; use --device cpu")
    if path.is_file():
        found = json.loads(path.read_text())
        if device != "auto" and found["device"] != chosen:
            found["device"] = chosen
            write_json(path, found)
        if found["device"].startswith("cuda") and not torch.cuda.is_available():
            found["device"] = "cpu"
    else:
        import transformers

        found = {
            "device": chosen, "dtype": "float32", "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "platform": platform.platform(), "cores": os.cpu_count(),
        }  # fmt: skip
        write_json(path, found)
    torch.set_num_threads(found["threads"])
    return found


@dataclass
class Stop:
    """SIGINT and SIGTERM. While a stage is at work (`patient`) they ask it to end at its next block or step; a second one, or one at any
    other time, ends the run at once: everything on disk is whole at every moment."""

    asked: threading.Event = field(default_factory=threading.Event)
    working: bool = False

    @contextmanager
    def patient(self) -> Iterator[None]:
        self.working = True
        try:
            yield
        finally:
            self.working = False
        if self.asked.is_set():
            raise KeyboardInterrupt

    def ask(self, number: int, frame: Any) -> None:
        if self.asked.is_set() or not self.working:
            raise KeyboardInterrupt
        self.asked.set()
        log.warning("stopping; everything finished so far is kept, the same command goes on")


@contextmanager
def signals() -> Iterator[Stop]:
    """A Stop that SIGINT and SIGTERM reach; in a thread that is not the main one nothing does."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Callable[..., Any] | int | None] = {n: signal.signal(n, stop.ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
