"""One sweep over a matrix: its columns rounded onto a uniform grid, a type of ggml or a codebook, each error compensated in later columns.

Knows tensors, grids and records; not stored weights, statistics or how several matrices are solved together.
Legend: O out, I in, G groups, S columns of a sub-block or group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import normal_float as nf
from .feedback import BLOCK, GivenGrids, InverseFactor, OpenColumns, RoundRow, feed_back_, feed_back_uniform_, uniform_rounding
from .ggml_grids import round_ggml, with_codes
from .ggml_types import GgmlName
from .grids import Clip, UniformGrid, fit, to_record
from .weights import GgmlWeight, UniformWeight


@dataclass(frozen=True)
class SweepConfig:
    """Settings of a sweep over the columns. clip: how a grid is fitted. static: all grids are fitted at the start, on groups contiguous in the original
    order; else each when its group begins in the processing order, on the weights as updated until then (a group index is stored if the
    orders differ). first_order: see `GptqConfig`. block: columns between two updates of all that follow, of no consequence for the result
    but the order of sums."""

    clip: Clip = "none"
    static: bool = True
    first_order: float = 0.0
    block: int = BLOCK


def gptq_uniform(
    weight_OI: Tensor, factor: InverseFactor, grid: UniformGrid, sweep: SweepConfig, importance_I: Tensor | None = None, mask_OI: Tensor | None = None
) -> tuple[UniformWeight, Tensor]:
    """(record, weighted squared error of every row [O]). `importance_I` weighs the fit of grids, `mask_OI` holds weights at 0."""
    size, order_I = grid.size(weight_OI.shape[1]), factor.order_I
    keep_IO = None if mask_OI is None else mask_OI.T[order_I].contiguous()
    work_IO = weight_OI.T[order_I].contiguous()
    if not sweep.static:
        scale_GO, zero_GO, fit_on_the_way = _grids_on_the_way(
            work_IO, grid, sweep.clip, keep_IO, None if importance_I is None else importance_I[order_I]
        )
        levels_IO, loss_O = feed_back_(work_IO, factor, fit_on_the_way, (size,), sweep.block, sweep.first_order)
        group_I = torch.arange(len(order_I), device=order_I.device) // size
        codes_OI = levels_IO.add_(zero_GO[group_I]).round_()[factor.place_I].T
        index_I = None if torch.equal(order_I, order_I.sort()[0]) else group_I[factor.place_I]
        return to_record(codes_OI, scale_GO.T, zero_GO.T, grid, index_I), loss_O
    group_I = order_I // size
    scale_GO, zero_GO = _static_grids(weight_OI, grid, sweep.clip, importance_I, mask_OI)
    grids = GivenGrids(scale_GO, zero_GO, group_I, keep_IO, grid.top, grid.float_zeros)
    levels_IO, loss_O = feed_back_uniform_(work_IO, factor, grids, sweep.block, sweep.first_order)
    codes_IO = levels_IO.add_(zero_GO[group_I]).round_()
    return to_record(codes_IO[factor.place_I].T, scale_GO.T, zero_GO.T, grid), loss_O


def gptq_ggml(
    weight_OI: Tensor, factor: InverseFactor, kind: GgmlName, sweep: SweepConfig, importance_I: Tensor | None = None, mask_OI: Tensor | None = None
) -> tuple[GgmlWeight, Tensor]:
    """As `gptq_uniform` on a type of ggml, whose grid is always static."""
    order_I = factor.order_I
    base = round_ggml(weight_OI if mask_OI is None else weight_OI.where(mask_OI, 0), kind, importance_I, sweep.clip != "none")
    scale_GO, minima_OG = base.scales_OG().T.to(weight_OI).contiguous(), base.minima_OG()
    zero_GO = torch.full_like(scale_GO, base.layout.zero) if minima_OG is None else minima_OG.T / scale_GO  # a fitted scale is never 0
    keep_IO = None if mask_OI is None else mask_OI.T[order_I].contiguous()
    group_I = order_I // base.group_size
    grids = GivenGrids(scale_GO, zero_GO.contiguous(), group_I, keep_IO, (1 << base.bits) - 1, minima_OG is not None)
    levels_IO, loss_O = feed_back_uniform_(weight_OI.T[order_I].contiguous(), factor, grids, sweep.block, sweep.first_order)
    codes_IO = levels_IO.add_(zero_GO[group_I]).round_()
    return with_codes(base, codes_IO[factor.place_I].T), loss_O


def _grids_on_the_way(
    work_IO: Tensor, grid: UniformGrid, clip: Clip, keep_IO: Tensor | None, importance_I: Tensor | None
) -> tuple[Tensor, Tensor, OpenColumns]:
    """(scale [G, O], zero [G, O], the rule that fills them): each grid is fitted when its group begins; all in processing order."""
    size = grid.size(len(work_IO))
    scale_GO = torch.empty(len(work_IO) // size, work_IO.shape[1], dtype=work_IO.dtype, device=work_IO.device)
    zero_GO = torch.empty_like(scale_GO)

    def open_columns(start: int, stop: int, updated_IO: Tensor) -> tuple[Tensor, RoundRow]:
        group = start // size
        if start % size == 0:
            columns = slice(start, start + size)
            group_OS = (updated_IO[columns] if keep_IO is None else updated_IO[columns] * keep_IO[columns]).T
            scale, zero = fit(group_OS, grid, clip, None if importance_I is None else importance_I[columns])
            scale_GO[group], zero_GO[group] = scale.view(-1), zero.view(-1)
        scale_SO, zero_SO = (t[group].expand(stop - start, -1) for t in (scale_GO, zero_GO))
        return uniform_rounding(scale_SO, zero_SO, grid.top, grid.float_zeros, None if keep_IO is None else keep_IO[start:stop])

    return scale_GO, zero_GO, open_columns


def gptq_book(
    weight_OI: Tensor, factor: InverseFactor, absmax_OG: Tensor, bits: int, mask_OI: Tensor | None = None, block: int = BLOCK
) -> tuple[Tensor, float]:
    """(codes uint8 [O, I] on the NormalFloat book under the given absmax, weighted squared error)."""
    book = nf.code_book(bits).to(weight_OI)
    bounds, order_I = nf.bounds(book), factor.order_I
    absmax_GO, group_I = absmax_OG.T.contiguous(), factor.order_I // (weight_OI.shape[1] // absmax_OG.shape[1])
    keep_IO = None if mask_OI is None else mask_OI.T[order_I].to(weight_OI).contiguous()

    def open_columns(start: int, stop: int, updated_IO: Tensor) -> tuple[Tensor, RoundRow]:
        scale_SO = absmax_GO[group_I[start:stop]]
        inverse_SO = (1.0 / scale_SO).where(scale_SO > 0, 0)
        if keep_IO is not None:
            inverse_SO *= keep_IO[start:stop]

        def round_row(i: int, w: Tensor, out: Tensor) -> None:
            torch.index_select(book, 0, torch.bucketize(w * inverse_SO[i], bounds, out_int32=True), out=out)

        return scale_SO, round_row

    levels_IO, loss_O = feed_back_(weight_OI.T[order_I].contiguous(), factor, open_columns, (), block)
    codes_OI = torch.bucketize(levels_IO[factor.place_I].T.contiguous(), bounds, out_int32=True).to(torch.uint8)
    return codes_OI, float(loss_O.sum())


def _static_grids(
    weight_OI: Tensor, grid: UniformGrid, clip: Clip, importance_I: Tensor | None, mask_OI: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(scale, zero) [G, O] of every contiguous group, on the weights before the sweep."""
    size = grid.size(weight_OI.shape[1])
    groups_OGS = (weight_OI if mask_OI is None else weight_OI.where(mask_OI, 0)).reshape(len(weight_OI), -1, size)
    importance_GS = None if importance_I is None else importance_I.view(-1, size)
    scale, zero = fit(groups_OGS, grid, clip, importance_GS)
    return scale.squeeze(-1).T.to(weight_OI).contiguous(), zero.squeeze(-1).T.to(weight_OI).contiguous()
