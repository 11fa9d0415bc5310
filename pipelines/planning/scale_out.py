"""`pipeline plan`: seconds and bytes of a rank in every stage for several numbers of ranks, what is serial, and where more ranks stop helping.

One rank is what a dry run predicts. Each rank is taken to have a device like this one; links are `devices/link`'s. Knows needs and
their division; no recipe.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...reports.units import duration
from ...reports.units import size as size_of
from ..devices.link import Link
from ..devices.rates import Speeds, Work
from ..ranks.exchange import PIECE, SLOTS
from .cost_plan import Needs
from .division import MICRO_BATCHES, SLOTS_OF_TEXT, WINDOWS
from .plan import Costed

GAIN = 0.1
"""A doubling that saves less than this share of a stage's time has stopped helping."""
STOPS = f"behind which a doubling saves less than {GAIN:.0%}"
MOST = 1024
"""Ranks up to which a plan looks for that."""
CHOLESKY = "one Cholesky of a block's inputs"
REST = "rank 0 alone"


@dataclass(frozen=True)
class Term:
    """Seconds of the busiest rank that go into one thing, and what keeps them from shrinking."""

    seconds: float
    why: str = ""


@dataclass(frozen=True)
class ScaleOut:
    """Several needs, one after the other, on ranks of one kind."""

    speeds: Speeds
    link: Link

    def terms(self, needs: Sequence[Needs], size: int) -> dict[str, Term]:
        """What the seconds of the busiest rank go into."""
        result: dict[str, Term] = {}

        def add(name: str, seconds: float, why: str) -> None:
            before = result.get(name)
            result[name] = Term(seconds + (before.seconds if before else 0.0), why)

        for each in needs:
            left = each.work
            for shared in each.divided:
                left += -1 * shared.whole()
                loads = [self.speeds.seconds(work) for work in shared.loads(size)]
                dearest = max(self.speeds.seconds(piece.work) * shared.times for piece in shared.pieces) if shared.pieces else 0.0
                why = f"{len(shared.pieces)} in all"
                if shared.by_cost:
                    why += f", the most expensive takes {duration(dearest)} and its Cholesky {duration(self._cholesky(shared.first.values(), shared.times))}"
                add(shared.name, max(loads, default=0.0), why)
            for name, work in each.alone.items():
                left += -1 * work
                add(name, self.speeds.seconds(work), "every rank does or awaits it")
            add(REST, max(0.0, self.speeds.seconds(left)), "the others wait")
            for exchange in each.sent:
                seconds = self.link.seconds(exchange.calls(size), exchange.sent(size), size) + self.speeds.seconds(exchange.copied(size))
                add(f"exchange of {exchange.name}", seconds, f"{size_of(exchange.sent(size))} sent by each rank in {exchange.calls(size):,.0f} collectives")
        return result

    def seconds(self, needs: Sequence[Needs], size: int) -> float:
        if size == 1:  # the dry run's own number, to the last bit
            return sum(self.speeds.seconds(each.work) for each in needs)
        return sum(term.seconds for term in self.terms(needs, size).values())

    def serial(self, needs: Sequence[Needs]) -> dict[str, float]:
        """Seconds that no number of ranks makes fewer, by what they go into."""
        result = {CHOLESKY: sum(self._cholesky(d.first.values(), d.times) for each in needs for d in each.divided)}
        shared = {d.name for each in needs for d in each.divided} | {f"exchange of {x.name}" for each in needs for x in each.sent}
        result |= {name: term.seconds for name, term in self.terms(needs, 1).items() if name not in shared}
        return {name: seconds for name, seconds in result.items() if seconds > 0}

    def enough(self, needs: Sequence[Needs]) -> tuple[int, str]:
        """The number of ranks behind which a doubling saves less than GAIN, and what is in its way."""
        size = 1
        while size < MOST and self.seconds(needs, 2 * size) <= (1 - GAIN) * self.seconds(needs, size):
            size *= 2
        now, then = self.terms(needs, size), self.terms(needs, 2 * size)
        stays = {name: term for name, term in then.items() if name not in now or term.seconds > (1 - GAIN) * now[name].seconds}
        if not stays:
            return size, f"up to {MOST} ranks"
        name, term = max(stays.items(), key=lambda item: item[1].seconds)
        whole = self.seconds(needs, 2 * size)
        return size, f"{name}: {duration(term.seconds)} of {duration(whole)} on {2 * size} ranks; {term.why}"

    def _cholesky(self, of_inputs: Iterable[Work], times: float) -> float:
        return max((self.speeds.seconds(work) for work in of_inputs), default=0.0) * times


def predicted(made: Costed, sizes: Sequence[int], link: Link) -> dict[str, Any]:
    """A JSON-able plan of every stage for these numbers of ranks."""
    fleet = ScaleOut(made.costs.speeds, link)
    stages = [row for stage, needs in made.needs.items() for row in _rows(fleet, made, stage, needs, sizes)]
    everything = [each for needs in made.needs.values() for each in needs]
    total = [_total(size, [row for row in stages if row["ranks"] == size]) for size in sizes]
    parts = {stage: needs[:-1] for stage, needs in made.needs.items()} | {"an evaluation": made.needs["baseline"][-1:], "all": everything}
    stops = [dict(zip(("stage", "ranks", STOPS), (part, *fleet.enough(needs)), strict=True)) for part, needs in parts.items()]
    return {
        "recipe": made.report["recipe"],
        "model": made.report["model"],
        "parameters": made.report["parameters"],
        "device": f"{made.report['device']} in {made.report['dtype']}, one like this for each rank",
        "link": f"{size_of(link.bytes_per_second)}/s, {link.latency_seconds * 1e6:.0f} µs, {link.source}",
        "stages": stages,
        "all_stages": total,
        "serial": [_serial(stage, fleet.serial(needs)) for stage, needs in made.needs.items()],
        "where_more_ranks_stop_helping": stops,
        "notes": _notes(made, sizes),
    }


def _rows(fleet: ScaleOut, made: Costed, stage: str, needs: Sequence[Needs], sizes: Sequence[int]) -> list[dict[str, Any]]:
    alone = fleet.seconds(needs, 1)
    rows = []
    for size in sizes:
        seconds, terms = fleet.seconds(needs, size), fleet.terms(needs, size)
        placed = [made.costs.placed(_of_a_rank(each, size)) for each in needs]
        device, host = (max(bytes_) for bytes_ in zip(*placed, strict=True))
        exchanges = [exchange for each in needs for exchange in each.sent]
        rows.append(
            {
                "stage": stage,
                "ranks": size,
                "seconds": round(seconds, 1),
                "efficiency": round(alone / (size * seconds), 3),
                "exchange_seconds": round(sum(term.seconds for name, term in terms.items() if name.startswith("exchange of ")), 2),
                "device_bytes": round(device),
                "host_bytes": round(host),
                "sent_bytes": round(sum(exchange.sent(size) for exchange in exchanges)),
                "collectives": round(sum(exchange.calls(size) for exchange in exchanges)),
            }
        )
    return rows


def _of_a_rank(needs: Needs, size: int) -> Needs:
    """Hidden states of its own batches; room for a sum on its way."""
    if size == 1:
        return needs
    share = max((len([o for o in d.owners(size) if o == 0]) / len(d.pieces) for d in needs.divided[:1]), default=1.0)
    sums = [(x.numbers * x.itemsize, min(x.numbers, PIECE) * x.itemsize) for x in needs.sent if x.kind == "sum"]
    device = needs.device - needs.parted * (1 - 1 / size)
    return replace(needs, hidden=needs.hidden * share, replayed=needs.replayed * share, device=device + max((2 * piece + whole / size for whole, piece in sums), default=0.0))


def _total(size: int, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    most = {key: max(row[key] for row in rows) for key in ("device_bytes", "host_bytes")}
    return {"ranks": size, "seconds": round(sum(row["seconds"] for row in rows), 1), **most} | {
        key: sum(row[key] for row in rows) for key in ("sent_bytes", "collectives")
    }


def _serial(stage: str, terms: dict[str, float]) -> dict[str, Any]:
    return {"stage": stage, "seconds": round(sum(terms.values()), 1)} | {
        "of which": ", ".join(f"{name} {duration(seconds)}" for name, seconds in sorted(terms.items(), key=lambda item: -item[1]))
    }


def _notes(made: Costed, sizes: Sequence[int]) -> list[dict[str, str]]:
    """Which ranks have nothing to do, and what would give them something."""
    notes = []
    for stage, needs in made.needs.items():
        for shared in (shared for each in needs[:-1] for shared in each.divided):
            idle, units = [size for size in sizes if size > len(shared.pieces)], len(shared.pieces)
            if idle and (text := IDLE.get(shared.name)):
                notes.append(f"{stage} on {' and '.join(map(str, idle))} ranks: {text.format(stage=stage, units=units, ranks=max(idle))}")
    if any(size > SLOTS for size in sizes):
        batches = len(made.needs["baseline"][-1].divided[0].pieces)
        notes.append(
            f"above {SLOTS} ranks a run is refused; what would go on to shrink is evaluation ({batches} batches) and recovery with as many micro-batches "
            "an update; the points of a `pipeline sweep --jobs` share nothing and need no ranks"
        )
    return [{"note": note} for note in notes]


IDLE = {
    SLOTS_OF_TEXT: "calibration text has {units} slots, so as many ranks work",
    MICRO_BATCHES: "of the micro-batches of an update there are {units}, so as many ranks work; --set {stage}.accumulation={ranks} gives each one",
    WINDOWS: "of the windows of a step there are {units}, so as many ranks train; --set {stage}.batch_size={ranks} gives each one",
}
"""What a division into too few pieces means for the ranks that get none."""
