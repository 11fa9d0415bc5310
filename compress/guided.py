"""Guided second moments (GuidedQuant, arXiv:2505.07004): rows of a matrix solved in groups, each under Σₜ sₜ·xₜxₜᵀ of its own.

sₜ is the mean squared gradient of the loss at the group's outputs of token t, so that an error counts by what it does to the loss, to second
order. Knows tensors and statistics; a sweep is handed in, and where gradients come from is `pipelines/stages/guidance`' business.
Legend: T tokens, O out, I in, K groups of rows.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from .feedback import InverseFactor, factor_of
from .grids import Clip
from .rounding import grid_importance
from .sharing import joined_rows
from .statistics import InputStatistics, LayerStatistics
from .weights import GgmlWeight, StoredWeight, UniformWeight

POWER = 0.5
"""Of the mean squared gradients, before they weigh tokens; chosen on the demo model at 3 bits, where 1 was worse (reports/published/README.md)."""
MOST = 10.0
"""Times the mean, where a token's weight is cut."""
_OnGrid = TypeVar("_OnGrid", bound=UniformWeight | GgmlWeight)
Sweep = Callable[[slice, InverseFactor, Tensor | None], tuple[_OnGrid, Tensor]]
"""(rows, factor, importance [I]) → (their record, error of every row)."""


def row_groups(rows: int, groups: int) -> list[slice]:
    """Consecutive rows in `groups` parts, of which the first are one row higher where they cannot be equal. ValueError for more parts than rows."""
    if groups > rows:
        raise ValueError(f"{rows} rows cannot be {groups} groups; set guided to {rows} at most, or to 0 for this matrix (overrides)")
    low, more = divmod(rows, groups)
    ends = [0]
    for number in range(groups):
        ends.append(ends[-1] + low + (number < more))
    return [slice(*pair) for pair in pairwise(ends)]


def token_weights(squares_TK: Tensor, power: float = POWER, most: float = MOST) -> Tensor:
    """float32 [T, K], a mean of 1 for each group, of mean squared gradients [T, K]; ones where a group has none.

    Few tokens hold most of the squares (of the demo model's values in the last blocks one in a hundred holds nine tenths), and a second moment of
    those alone says little of other text: hence the `power`, and a weight is cut at `most` times the mean.
    """
    out_TK = _mean_one(_mean_one(squares_TK.double()).pow(power))
    return _mean_one(out_TK.clamp(max=most)).float()


def _mean_one(values_TK: Tensor) -> Tensor:
    mean_K = values_TK.mean(0)
    return (values_TK / mean_K).where(mean_K > 0, 1.0)


def weighted(inputs: list[InputStatistics], x_TI: Tensor, weights_TK: Tensor) -> None:
    """Add tokens to the second moments of all groups."""
    x_TI, roots_TK = x_TI.float(), weights_TK.to(x_TI.device).sqrt()
    for k, statistics in enumerate(inputs):
        statistics.update(x_TI * roots_TK[:, k : k + 1])


def swept_by_groups(
    sweep: Sweep[_OnGrid], weights: Mapping[str, StoredWeight], statistics: Mapping[str, LayerStatistics], groups: int, damp: float,
    by_diagonal: bool, clip: Clip,
) -> tuple[_OnGrid, Tensor, InverseFactor]:  # fmt: skip
    """(record, error of every row, the factor that needed most damping) of all matrices' rows, one below the other. ValueError names the matrix."""
    parts, start, worst = list[tuple[_OnGrid, Tensor]](), 0, None
    for name, weight in weights.items():
        moments = statistics[name].guided
        try:
            wanted = row_groups(weight.shape[0], groups)
            if len(moments) != groups:
                raise ValueError(f"guided needs {groups} second moments weighed by the loss's gradient; {len(moments)} were collected")
            for rows, inputs in zip(wanted, moments, strict=True):
                factor = factor_of(inputs, damp, by_diagonal, weight.smooth)
                inputs.factors.clear()  # no other matrix has this moment
                importance_I = grid_importance(weight, LayerStatistics(inputs), clip)
                parts.append(sweep(slice(start + rows.start, start + rows.stop), factor, importance_I))
                worst = factor if worst is None or factor.damp > worst.damp else worst
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if len(weights) > 1 else str(error)) from error
        start += weight.shape[0]
    assert worst is not None
    return joined_rows([record for record, _ in parts]), torch.cat([loss_O for _, loss_O in parts]), worst
