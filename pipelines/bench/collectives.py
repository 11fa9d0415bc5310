"""Counts collectives: their bytes, the processor's time between them and in them, and how long a rank waited; one list per rank.

All ranks call the same collectives in the same order, so that their lists correspond entry by entry: what takes longest between two is on the critical
path, on a core of its own, whoever else uses the machine. Knows torch.distributed; no ranks' work.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypedDict, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class EventRow(TypedDict):
    """An Event as JSON holds it."""

    kind: str
    sent: int
    began: float
    ended: float
    waited: float


@dataclass(frozen=True)
class Event:
    """A collective, or (`mark`) a place in the program that all ranks pass. `began` and `ended`: seconds of the process's processor time, `waited` those of
    the clock between them; `sent`: bytes that this rank handed to others."""

    kind: str
    sent: int
    began: float
    ended: float
    waited: float

    def to_json(self) -> EventRow:
        return EventRow(kind=self.kind, sent=self.sent, began=self.began, ended=self.ended, waited=self.waited)


MARK = "mark"


def mark(events: list[Event], name: str) -> None:
    now = time.process_time()
    events.append(Event(f"{MARK} {name}", 0, now, now, 0.0))


@contextmanager
def counted(events: list[Event]) -> Iterator[None]:
    """Within, every collective of this process is added to `events`; those of which an object's exchange is made, one by one."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as inner

    def size() -> int:
        return dist.get_world_size()

    sent: dict[str, Callable[..., int]] = {
        "all_to_all_single": lambda received, given, *_: given.nbytes // size() * (size() - 1),
        "all_gather": lambda parts, given, *_: given.nbytes * (size() - 1),
        "broadcast": lambda given, source=0, *_: given.nbytes * (size() - 1) if dist.get_rank() == source else 0,
        "barrier": lambda *_: 0,
    }

    def wrapped(name: str, plain: Callable[P, T]) -> Callable[P, T]:
        def call(*arguments: P.args, **options: P.kwargs) -> T:
            source = {"source": options["src"]} if "src" in options else {}
            count, began, clock = sent[name](*arguments, **source), time.process_time(), time.perf_counter()
            out = plain(*arguments, **options)
            events.append(Event(name, count, began, time.process_time(), time.perf_counter() - clock))
            return out

        return call

    before = {(module, name): getattr(module, name) for module in (dist, inner) for name in sent}
    try:
        for (module, name), plain in before.items():
            setattr(module, name, wrapped(name, plain))
        yield
    finally:
        for (module, name), plain in before.items():
            setattr(module, name, plain)


def within(events: Sequence[Event], name: str) -> list[Event]:
    """From the mark `NAME begins` to `NAME ends`, both included."""
    kinds = [event.kind for event in events]
    return list(events[kinds.index(f"{MARK} {name} begins") : kinds.index(f"{MARK} {name} ends") + 1])


def critical_seconds(ranks: Sequence[Sequence[Event]]) -> float:
    """Seconds of what takes longest, from collective to collective. ValueError where the ranks' lists differ."""
    kinds = [[event.kind for event in events] for events in ranks]
    if any(each != kinds[0] for each in kinds):
        raise ValueError(f"the ranks took part in different collectives: {sorted({len(each) for each in kinds})} of them")
    total, last = 0.0, [events[0].began for events in ranks]
    for simultaneous in zip(*ranks, strict=True):
        total += max(event.began - before for event, before in zip(simultaneous, last, strict=True))
        total += max(event.ended - event.began for event in simultaneous)
        last = [event.ended for event in simultaneous]
    return total
