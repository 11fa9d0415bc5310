"""One decoder block as a function: what methods that train a whole block are given. Knows tensors only."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from .statistics import LayerStatistics
from .weights import StoredWeight

Window = Literal["sub_block", "block", "two_blocks"]
"""What a method trains at a time: attention and MLP in turn, a block, or a block judged behind the next one, which stays as it is."""


class Samples(Protocol):
    """[N, T, D] of which the samples asked for are at hand, by their numbers or a slice: a tensor is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, wanted: Tensor | slice, /) -> Tensor: ...


def beside_each_other(batches: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(batches))


@dataclass(frozen=True)
class BlockProblem:
    """One decoder block as a function, for methods with scope "block".

    weights: name → StoredWeight, as they stand (an earlier quantization, or dense); targets: name → float32 [O, I] dense
    matrices of the same block; forward(matrices, hidden [B, T, D]) runs the block with those effective weights,
    differentiable in both; inputs [N, T, D] are what the compressed model below produces, outputs [N, T, D] what the dense
    block makes of the dense model's hidden states (or of `inputs`, as the caller decides; none where the method's row has no `dense_outputs`); statistics: name → LayerStatistics;
    parts: the names of its sub-blocks in the order they run in. With window "two_blocks" forward and outputs reach behind the next
    block. `keep` holds on to batches [B, T, D] until they are samples. `pause` is called between steps of a training: it may raise to end it.
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
    keep: Callable[[Iterable[Tensor]], Samples] = beside_each_other
    pause: Callable[[], None] = lambda: None
