"""SparseGPT (arXiv:2301.00774): choose what to drop block by block and compensate in later columns; optionally quantize the
kept weights in the same sweep.

Knows tensors and records only. Legend: O out, I in, S columns of a sub-block, M columns over which a choice is made.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from .feedback import BLOCK, InverseFactor, RoundRow, factor_of, feed_back_, uniform_rounding
from .gptq import feedback_metrics
from .grids import Clip, UniformGrid, fit, to_record
from .masks import Allocation, check_pattern, keep_highest, parse_pattern
from .ranges import Bits, Damp, Group, Pattern, ReadWhere, Share
from .rounding import base_target, grid_importance, quantized
from .statistics import LayerStatistics
from .weights import ActivationGrid, DenseWeight, StoredWeight

_ROUNDS = ReadWhere("bits is set", lambda config: config.bits is not None)


@dataclass(frozen=True)
class SparseGptConfig:
    """`bits` None keeps the weights' dtype; else kept weights are rounded to a uniform grid in the same sweep."""

    sparsity: Share = 0.5
    pattern: Pattern = "unstructured"
    allocation: Allocation = "uniform"
    spread: Share | None = None
    damp: Damp = 0.01
    bits: Bits | None = None
    group_size: Annotated[Group, _ROUNDS] = 64
    symmetric: Annotated[bool, _ROUNDS] = False
    clip: Annotated[Clip, _ROUNDS] = "hessian"
    activations: ActivationGrid | None = None

    def __post_init__(self) -> None:
        check_pattern(self.sparsity, self.pattern, self.allocation, self.spread)
        if self.bits is None and self.activations is not None:
            raise ValueError("activations are quantized only with quantized weights; set bits, or leave activations out")


@dataclass
class Sweep:
    """What the rule has decided so far, in processing order: which weights are kept, and the grid of every group reached."""

    keep_IO: Tensor
    scale_GO: Tensor | None = None
    zero_GO: Tensor | None = None


@dataclass(frozen=True)
class GridSearch:
    """The grid that kept weights are rounded to, and how each group's scale is searched; `importance_I` as in `grids.fit`."""

    grid: UniformGrid
    clip: Clip = "none"
    importance_I: Tensor | None = None


def sparsegpt_sweep(
    weight_OI: Tensor, factor: InverseFactor, sparsity: float, pattern: str = "unstructured", search: GridSearch | None = None,
    allowed_OI: Tensor | None = None, block: int = BLOCK,
) -> tuple[Tensor, Sweep, float]:  # fmt: skip
    """(levels [O, I], what was decided, weighted squared error); a weight's value is its level, or level·scale on a grid.

    The score is w²/U_jj² (eq. 5) of the weights as updated until then; unstructured, the lowest share of each 128 columns goes,
    over all rows; N:M, the lowest of each M columns of a row. Columns keep their order; weights not `allowed` go first.
    """
    work_IO, order_I = weight_OI.T.contiguous(), factor.order_I
    if not torch.equal(order_I, order_I.sort()[0]):
        raise ValueError("sparsegpt sweeps columns in their own order; factor with by_diagonal=False")
    count, rows = work_IO.shape
    span, choose = _chooser(count, sparsity, pattern)
    grid = None if search is None else search.grid
    size = count if grid is None else grid.size(count)
    sweep = Sweep(torch.ones_like(work_IO, dtype=torch.bool) if allowed_OI is None else allowed_OI.T.contiguous())
    if grid is not None:
        sweep.scale_GO = torch.empty(count // size, rows, dtype=work_IO.dtype, device=work_IO.device)
        sweep.zero_GO = torch.empty_like(sweep.scale_GO)
    weight_of_column_I1 = factor.diagonal_I.square().reciprocal().unsqueeze(1)

    def open_columns(start: int, stop: int, updated_IO: Tensor) -> tuple[Tensor, RoundRow]:
        if start % span == 0:
            chosen = slice(start, start + span)
            score_MO = updated_IO[chosen].square() * weight_of_column_I1[chosen]
            sweep.keep_IO[chosen] = choose(score_MO.where(sweep.keep_IO[chosen], -1.0))
        keep_SO = sweep.keep_IO[start:stop]
        if search is None or grid is None or sweep.scale_GO is None or sweep.zero_GO is None:
            return keep_SO.to(updated_IO.dtype), _copy_row
        if start % size == 0:
            group = slice(start, start + size)
            importance = None if search.importance_I is None else search.importance_I[group]
            scale, zero = fit((updated_IO[group] * sweep.keep_IO[group]).T, grid, search.clip, importance)
            sweep.scale_GO[start // size], sweep.zero_GO[start // size] = scale.view(-1), zero.view(-1)
        scale_SO, zero_SO = (t[start // size].expand(stop - start, rows) for t in (sweep.scale_GO, sweep.zero_GO))
        return uniform_rounding(scale_SO, zero_SO, grid.top, grid.float_zeros, keep_SO)

    periods = (span,) if grid is None else (span, size)
    levels_IO, loss_O = feed_back_(work_IO, factor, open_columns, periods, block)
    return levels_IO.T, sweep, float(loss_O.sum())


def sparsegpt(
    weight: StoredWeight, target_OI: Tensor, statistics: LayerStatistics, config: SparseGptConfig
) -> tuple[StoredWeight, dict[str, float]]:
    """Prune, and with `bits` quantize, in one sweep; weights that an earlier mask dropped stay dropped."""
    if config.bits is None and not isinstance(weight.base, DenseWeight):
        raise ValueError("sparsegpt moves the kept weights, which a grid does not allow; prune before quantizing, or set bits here")
    base_OI, factor = base_target(weight, target_OI), factor_of(statistics.inputs, config.damp, False, weight.smooth)
    grid = None if config.bits is None else UniformGrid(config.bits, config.group_size, config.symmetric)
    search = None if grid is None else GridSearch(grid, config.clip, grid_importance(weight, statistics, config.clip))
    levels_OI, sweep, loss = sparsegpt_sweep(base_OI, factor, config.sparsity, config.pattern, search, weight.mask_OI())
    mask_OI = sweep.keep_IO.T
    if grid is None or sweep.scale_GO is None or sweep.zero_GO is None:
        dtype = weight.base.weight.dtype if isinstance(weight.base, DenseWeight) else torch.float32
        record = replace(weight, base=DenseWeight(levels_OI.where(mask_OI, 0).to(dtype).contiguous()))
    else:
        groups = len(sweep.zero_GO)
        codes_OI = levels_OI + sweep.zero_GO.T.repeat_interleave(levels_OI.shape[1] // groups, dim=1)
        record = quantized(weight, to_record(codes_OI, sweep.scale_GO.T, sweep.zero_GO.T, grid), config.activations)
    return record.with_mask(mask_OI), {"sparsity": 1.0 - mask_OI.float().mean().item()} | feedback_metrics(factor, loss)


def _chooser(columns: int, sparsity: float, pattern: str):
    """(columns over which one choice is made, score [M, O] → mask [M, O])."""
    parsed = parse_pattern(pattern)
    if parsed is None:
        return BLOCK, lambda score_MO: keep_highest(score_MO.view(-1), round(score_MO.numel() * sparsity)).view(score_MO.shape)
    kept, of = parsed
    if columns % of:
        raise ValueError(f"in_features {columns} is not a multiple of {of}; pattern {pattern} cannot be met")
    return of, lambda score_MO: keep_highest(score_MO.T, of - kept).T


def _copy_row(i: int, w: Tensor, out: Tensor) -> None:
    out.copy_(w)
