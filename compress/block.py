"""One decoder block as a function: what methods that train a whole block are given. Knows tensors only."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .statistics import LayerStatistics
from .weights import StoredWeight

Window = Literal["sub_block", "block", "two_blocks"]
"""What a method trains at a time: attention and MLP in turn, a block, or a block judged behind the next one, which stays as it is."""


@dataclass(frozen=True)
class BlockProblem:
    """One decoder block as a function, for methods with scope "block".

    weights: name → StoredWeight, as they stand (an earlier quantization, or dense); targets: name → float32 [O, I] dense
    matrices of the same block; forward(matrices, hidden [B, T, D]) runs the block with those effective weights,
    differentiable in both; inputs [N, T, D] are what the compressed model below produces, outputs [N, T, D] what the dense
    block makes of the dense model's hidden states (or of `inputs`, as the caller decides); statistics: name → LayerStatistics;
    parts: the names of its sub-blocks in the order they run in. With window "two_blocks" forward and outputs reach behind the next
    block. `pause` is called between steps of a training: it may raise to end it.
    The function returns (name → StoredWeight, {metric: number}).
    """

    weights: dict[str, StoredWeight]
    targets: dict[str, Tensor]
    forward: Callable[[dict[str, Tensor], Tensor], Tensor]
    inputs_NTD: Tensor
    outputs_NTD: Tensor
    statistics: dict[str, LayerStatistics]
    seed: int = 0
    parts: tuple[tuple[str, ...], ...] = ()
    pause: Callable[[], None] = lambda: None
