"""Stop requests: a `Stop` that SIGINT and SIGTERM set. Knows the process and its ranks; no run, no stage."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..ranks.exchange import ONE, Ranks

log = logging.getLogger("bitmend")
TWICE_SECONDS = 5.0
"""Of several ranks, signals so close to one another are one."""


@dataclass
class Stop:
    """SIGINT and SIGTERM. While a stage is at work (`patient`) they ask it to end at its next block or step; a second one, or one at any
    other time, ends the run at once: everything on disk is whole at every moment. Several ranks agree, so that they end at the same one; a launcher
    and the watchdog may hand each the same signal twice."""

    requested: threading.Event = field(default_factory=threading.Event)
    working: bool = False
    ranks: Ranks = ONE
    since: float = 0.0

    def agreed(self) -> bool:
        """Whether any rank was requested to stop; all call it."""
        return self.ranks.agree(self.requested.is_set())

    @contextmanager
    def patient(self) -> Iterator[None]:
        self.working = True
        try:
            yield
        finally:
            self.working = False
        if self.agreed():
            raise KeyboardInterrupt

    def ask(self, number: int, frame: object) -> None:
        if self.requested.is_set() and self.ranks.size > 1 and time.monotonic() - self.since < TWICE_SECONDS:
            return
        if self.requested.is_set() or not self.working:
            raise KeyboardInterrupt
        self.requested.set()
        self.since = time.monotonic()
        log.warning("stopping; everything finished so far is kept, the same command goes on")


@contextmanager
def signals(ranks: Ranks = ONE) -> Iterator[Stop]:
    """A Stop that SIGINT and SIGTERM reach; in a thread that is not the main one nothing does."""
    stop = Stop(ranks=ranks)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Callable[..., object] | int | None] = {n: signal.signal(n, stop.ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
