"""Inputs of methods that train a whole decoder block: the block as a function, its samples and its matrices. Knows tensors only; communication
between processes that share a block is passed in."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from .statistics import LayerStatistics
from .weights import StoredWeight

T = TypeVar("T")
Window = Literal["sub_block", "block", "two_blocks"]
"""What a method trains at a time: attention and MLP in turn, a block, or a block judged behind the next one, which stays as it is."""


class Samples(Protocol):
    """[N, T, D] whose samples are fetched by their numbers or a slice: a tensor is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, wanted: Tensor | slice, /) -> Tensor: ...


def concatenated(batches: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(batches))


class SlotSum(Protocol):
    """Σ in the order of the slots: one `add` a round on every process, None from one whose slot has nothing; the total is the same on all."""

    def add(self, tensor: Tensor | None) -> None: ...

    def total(self) -> Tensor: ...


def _alone(like: Tensor) -> SlotSum:
    raise ValueError("a block shared by several processes needs an ordered_sum; give one together with a size above 1")


@dataclass(frozen=True)
class BlockShare:
    """What of a block's training is this process's, number `rank` of `size`: slot s of the samples is of process s % size, and a slot does not know
    how many there are. `slots`: the numbers of each one's samples; none: all are in one. `gathered` gives every process's value on all, `ordered_sum`
    makes a sum of tensors like the given one, `spread` an owner for each of units that cost so much."""

    slots: Sequence[Sequence[int]] = ()
    rank: int = 0
    size: int = 1
    gathered: Callable[[Any], list[Any]] = lambda value: [value]
    ordered_sum: Callable[[Tensor], SlotSum] = _alone
    spread: Callable[[Sequence[float]], list[int]] = lambda costs: [0] * len(costs)

    def turns(self, filled: Sequence[bool]) -> Iterator[int | None]:
        """This process's slot of every round in which any process has one that is filled; None where its own is not."""
        for first in range(0, len(filled), self.size):
            if any(filled[first : first + self.size]):
                slot = first + self.rank
                yield slot if slot < len(filled) and filled[slot] else None

    def in_order(self, mine: Mapping[int, T]) -> list[T]:
        """Everybody's values in the order of their units."""
        everyones = {unit: value for part in self.gathered(dict(mine)) for unit, value in part.items()}
        return [everyones[unit] for unit in sorted(everyones)]

    def solved(self, costs: Sequence[float], solve: Callable[[int], T]) -> list[T]:
        """solve(unit) of units that cost so much, each by its owner alone."""
        owners = self.spread(costs)
        return self.in_order({unit: solve(unit) for unit, owner in enumerate(owners) if owner == self.rank})


@dataclass(frozen=True)
class BlockProblem:
    """One decoder block as a function, for methods with scope "block".

    weights: name → StoredWeight, as they stand (an earlier quantization, or dense); targets: name → float32 [O, I] dense
    matrices of the same block; forward(matrices, hidden [B, T, D]) runs the block with those effective weights,
    differentiable in both; inputs [N, T, D] are what the compressed model below produces, outputs [N, T, D] what the dense
    block makes of the dense model's hidden states (or of `inputs`, as the caller decides; none where the method's row has no `dense_outputs`); statistics: name → LayerStatistics;
    parts: the names of its sub-blocks in the order they run in. With window "two_blocks" forward and outputs reach behind the next
    block. `keep` holds on to batches [B, T, D] until they are samples. `pause` is called between steps of a training: it may raise to end it.
    Of inputs and outputs (and of what `keep` makes) the samples of this process's slots alone are at hand, under the numbers that all know them by.
    The function returns (name → StoredWeight, {metric: number}).
    """

    weights: dict[str, StoredWeight]
    targets: dict[str, Tensor]
    forward: Callable[[dict[str, Tensor], Tensor], Tensor]
    inputs_NTD: Samples
    outputs_NTD: Samples
    statistics: dict[str, LayerStatistics]
    seed: int = 0
    parts: tuple[tuple[str, ...], ...] = ()
    keep: Callable[[Iterable[Tensor]], Samples] = concatenated
    pause: Callable[[], None] = lambda: None
    share: BlockShare = field(default_factory=BlockShare)

    def slots(self) -> list[Sequence[int]]:
        """The numbers of the samples of every slot."""
        return list(self.share.slots) or [range(len(self.inputs_NTD))]

    def own_slots(self) -> dict[int, Sequence[int]]:
        """Those of this process."""
        return {slot: numbers for slot, numbers in enumerate(self.slots()) if slot % self.share.size == self.share.rank}
