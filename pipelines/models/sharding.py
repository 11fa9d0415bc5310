"""Batches of the calibration text over slots, and slots over ranks: who has which, and in what order they are walked.

Batch b is of slot b % SLOTS, slot s of rank s % size; neither knows how many ranks there are. Knows hidden states; not what is summed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..ranks.exchange import ONE, SLOTS, Ranks
from .hidden import HiddenStates


@dataclass(frozen=True)
class BatchShare:
    """This rank's share of so many `batches`, which belong to `slots`."""

    batches: int
    ranks: Ranks = ONE
    slots: int = SLOTS

    def owner(self, number: int) -> int:
        """The rank that has a batch."""
        return number % self.slots % self.ranks.size

    def has(self, number: int) -> bool:
        return self.owner(number) == self.ranks.rank

    @property
    def numbers(self) -> list[int]:
        """The batches that are here, in their order."""
        return [number for number in range(self.batches) if self.has(number)]

    @property
    def rounds(self) -> list[list[int]]:
        """Where among the batches that are here those of one slot lie, for every round, in which each rank has a slot or (empty) none."""
        numbers, slots = self.numbers, range(min(self.slots, self.batches))
        turns = [first + self.ranks.rank for first in slots[:: self.ranks.size]]
        return [[place for place, number in enumerate(numbers) if number % self.slots == slot] for slot in turns]

    def windows(self, parts: Sequence[slice]) -> list[int]:
        """Of the windows in the batches `parts`, those that are here, in their order."""
        return [window for number in self.numbers for window in range(parts[number].start, parts[number].stop)]

    def all_batches(self, hidden: HiddenStates) -> Iterator[Tensor]:
        """All ranks' batches in their order, on every rank."""
        own = iter(hidden)
        for number in range(self.batches):
            if self.ranks.size == 1:
                yield next(own)
            else:
                sent = next(own).cpu() if self.has(number) else None
                yield self.ranks.broadcast(sent, self.owner(number)).to(hidden.room.device)


def windows_by_slot(parts: Sequence[slice]) -> list[list[int]]:
    """The windows of every slot, whoever has it."""
    slots = range(min(SLOTS, len(parts)))
    return [[window for part in parts[slot::SLOTS] for window in range(part.start, part.stop)] for slot in slots]
