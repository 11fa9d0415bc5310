"""Division of a stage's work among ranks: pieces that do not depend on their number, what every rank repeats, and what is exchanged.

Work units belong to ranks as `ranks` says: in turn, or by cost to owners where matrices are solved. Knows numbers; no models, no stages.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..devices.rates import Work
from ..ranks.exchange import PIECE
from ..stages.shared_inputs import spread

SLOTS_OF_TEXT, MICRO_BATCHES, WINDOWS = "slots of calibration text", "micro-batches of an update", "windows of a step"
"""Names of pieces of which a recipe may have too few."""
COPIES = 5.0
"""Reads and writes of a summed tensor in a round: packed, received, added."""


@dataclass(frozen=True)
class Piece:
    """What one rank does whole. `weight`: by which an owner is chosen; `input`: what of `Divided.first` its owner needs before."""

    work: Work
    weight: float = 1.0
    input: int | None = None


@dataclass(frozen=True)
class Divided:
    """Work that ranks share. `name`: what its pieces are, to a reader; `times`: how often all of them come in the stage; `first`: what an owner
    does once for all of its pieces of an input (its Cholesky factor); `by_cost`: owners are chosen by weight, not in turn."""

    name: str
    pieces: tuple[Piece, ...]
    times: float = 1.0
    first: Mapping[int, Work] = field(default_factory=dict)
    by_cost: bool = False

    def loads(self, size: int) -> list[Work]:
        """What each rank that has any does in the whole stage."""
        owned: dict[int, list[Piece]] = {}
        for piece, owner in zip(self.pieces, self.owners(size), strict=True):
            owned.setdefault(owner, []).append(piece)
        return [self._of(pieces) for pieces in owned.values()]

    def owners(self, size: int) -> list[int]:
        if not self.by_cost:
            return [number % size for number in range(len(self.pieces))]
        return spread([piece.weight for piece in self.pieces], size)

    def whole(self) -> Work:
        """Of one process."""
        return self._of(self.pieces)

    def _of(self, pieces: Sequence[Piece]) -> Work:
        work = sum((piece.work for piece in pieces), Work())
        for needed in {piece.input for piece in pieces if piece.input is not None}:
            work += self.first.get(needed, Work())
        return work * self.times


def in_turn(name: str, work: Work, counts: Sequence[float], times: float = 1.0) -> Divided:
    """`work` of the whole stage in pieces of so many windows (or micro-batches) each."""
    whole = sum(counts) * times
    return Divided(name, tuple(Piece(work * (count / whole)) for count in counts), times)


@dataclass(frozen=True)
class Exchange:
    """Collectives of one kind, `times` over. `sum`: `ranks.OrderedSum` of `units` tensors of `numbers` of `itemsize` bytes. `gathered`: what all ranks
    hold in total, in equal parts, each with every rank afterwards (`units`: as often as there are rounds of them); `broadcast`: what rank 0 says;
    `agreed`: a flag; `streamed`: what others have, to rank 0 alone; `parts`: of tensors
    that lie in parts the others' (or theirs of a gradient) to every rank, in each round of `units`. `held`: cost and bytes of the parts of what is gathered, where they are spread by cost;
    all ranks send as much as the one that holds most."""

    name: str
    kind: Literal["sum", "gathered", "broadcast", "agreed", "streamed", "parts"]
    numbers: float = 0.0
    itemsize: int = 1
    units: int = 1
    times: float = 1.0
    held: tuple[tuple[float, float], ...] = ()

    def calls(self, size: int) -> float:
        """Collectives that each rank takes part in: an object's size goes ahead of it."""
        if size == 1 or self.kind == "streamed":
            return 0.0
        if self.kind == "parts":
            return self.times * self._rounds(size)
        return self.times * (len(self._widths(size)) * (self._rounds(size) + 1) if self.kind == "sum" else 2 * self._rounds(size))

    def sent(self, size: int) -> float:
        """Bytes that the rank that sends most hands to others."""
        if size == 1:
            return 0.0
        others = size - 1
        if self.kind == "sum":
            each = sum(others * self.itemsize * (self._rounds(size) * (width + 1) + width) for width in self._widths(size))
        elif self.kind == "streamed":
            each = self.numbers * self.itemsize / size
        elif self.kind == "parts":
            each = others * self._rounds(size) * self.numbers * self.itemsize / size
        elif self.kind == "gathered":
            each = others * (self._most_held(size) if self.held else self.numbers * self.itemsize / size)
        else:
            each = others * self.numbers * self.itemsize
        return self.times * each

    def copied(self, size: int) -> Work:
        """What packing, adding and concatenating read and write."""
        if size == 1 or self.kind != "sum":
            return Work()
        return Work(passes=self.times * self.numbers * self.itemsize * COPIES * (self._rounds(size) + 1))

    def _most_held(self, size: int) -> float:
        owners = spread([cost for cost, _ in self.held], size)
        return max(sum(count for (_, count), owner in zip(self.held, owners, strict=True) if owner == rank) for rank in set(owners))

    def _rounds(self, size: int) -> int:
        return math.ceil(self.units / size)

    def _widths(self, size: int) -> list[int]:
        """Numbers of a rank's part of each piece that travels at once."""
        count = round(self.numbers)
        return [math.ceil((min(start + PIECE, count) - start) / size) for start in range(0, count, PIECE)]
