"""The signals that ask a run to stop: a Stop that SIGINT and SIGTERM reach. Knows the process; no run, no stage."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger("bitmend")


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
