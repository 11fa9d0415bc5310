"""Quantize a matrix again on the grid, the groups and the mask of a record that is already there: the Q-step of `decompose`.

Knows records and grids; the search for scales and codes is `grids`', `normal_float`'s and `gptq`'s.
Legend: O out, I in, G groups, S columns of one group.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from . import normal_float
from .grids import UniformGrid, round_to_grid, search_clip, to_record
from .packing import pack_codes
from .weights import DenseWeight, NormalFloatWeight, StoredWeight, UniformWeight


def is_quantized(weight: StoredWeight) -> bool:
    return not isinstance(weight.base, DenseWeight)


def requantize(
    weight: StoredWeight,
    target_OI: Tensor,
    quantizer: Literal["rtn", "gptq"] = "rtn",
    importance_I: Tensor | None = None,
    moment_II: Tensor | None = None,
) -> StoredWeight:
    """The record whose effective weight, without low-rank term, comes near `target`: same bits, groups, mask and smoothing.

    rtn searches the clipping of every group with its squared errors weighed by importance_I; gptq needs the inputs' second moment.
    """
    mask = weight.mask_OI()
    wanted = target_OI if weight.smooth is None else target_OI * weight.smooth.float()
    wanted = wanted if mask is None else wanted.where(mask, 0)
    if isinstance(weight.base, UniformWeight):
        base = nearest_uniform(wanted, weight.base, importance_I)
    elif isinstance(weight.base, NormalFloatWeight):
        base = nearest_normal_float(wanted, weight.base)
    else:
        raise ValueError("a dense weight has no grid to requantize on")
    return replace(weight, base=base, low_rank=None)


def grid_of(record: UniformWeight) -> UniformGrid:
    return UniformGrid(record.bits, record.group_size, record.symmetric)


def nearest_uniform(target_OI: Tensor, like: UniformWeight, importance_I: Tensor | None = None) -> UniformWeight:
    """Round to nearest on the grid of `like`, every group's clipping searched anew for the least Σ importance·Δ²."""
    grid, (rows, columns) = grid_of(like), target_OI.shape
    order = None if like.group_index is None else torch.argsort(like.group_index, stable=True)
    ordered = target_OI if order is None else target_OI[:, order]
    importance = None if importance_I is None else (importance_I if order is None else importance_I[order]).view(like.groups, -1)
    grouped = ordered.float().reshape(rows, like.groups, -1)
    scale, zero = search_clip(grouped, grid, importance, power=2.0)
    codes_OI = round_to_grid(grouped, scale, zero, grid).view(rows, columns)
    if order is not None:
        codes_OI = codes_OI[:, torch.argsort(order)]
    return to_record(codes_OI, scale.squeeze(-1), zero.squeeze(-1), grid, like.group_index)


def nearest_normal_float(target_OI: Tensor, like: NormalFloatWeight) -> NormalFloatWeight:
    """Nearest codes of target/absmax (chosen with the absmax before its own quantization); double-quantized if `like` is."""
    absmax_OG = normal_float.absmax_of(target_OI, like.block_size)
    codes = pack_codes(normal_float.round_to_book(target_OI, absmax_OG, like.bits), like.bits)
    if like.absmax is not None:
        return replace(like, codes=codes, absmax=absmax_OG.to(like.absmax.dtype))
    absmax_codes, scales, offset = normal_float.quantize_absmax(absmax_OG)
    return replace(like, codes=codes, absmax_codes=absmax_codes, absmax_scales=scales, absmax_offset=offset)
