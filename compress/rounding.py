"""Round to nearest: uniform grids (rtn) and NormalFloat code books (nf4, normal_float).

Knows tensors and records only. Legend: O out, I in, G groups, S columns of a group.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import normal_float as nf
from .ggml_grids import check_type, round_ggml
from .ggml_types import GridName, type_for
from .grids import Clip, UniformGrid, check_zeros, clip_needs, divide, fit, round_to_grid, to_record
from .masks import finite
from .packing import pack_codes
from .ranges import Bits, Group, Width
from .statistics import LayerStatistics
from .weights import ActivationGrid, Base, DenseWeight, NormalFloatWeight, StoredWeight, UniformWeight


@dataclass(frozen=True)
class RtnConfig:
    """How a group's grid is fitted: `clip` "none" takes the whole range, "power" clips it by the plain error, "hessian" by the error
    weighted with the inputs' mean squares, "joint" searches scale and zero point jointly under that weight. `float_zeros` stores a
    zero point in 16 bits instead of an integer: no packed format of others carries it, and 0 is not on the grid. `grid` other than uniform
    is a block type of GGUF, which has bits, groups and symmetry of its own, and is searched jointly with its small codes, weighted under
    "hessian" and "joint"; rows that are no multiple of 256 get the type that llama.cpp gives them (q4_k: q5_0, q5_k: q5_1, q6_k: q8_0,
    q2_k and q3_k: q4_0)."""

    bits: Bits = 4
    group_size: Group = 64
    symmetric: bool = False
    clip: Clip = "power"
    float_zeros: bool = False
    activations: ActivationGrid | None = None
    grid: GridName = "uniform"

    def __post_init__(self) -> None:
        check_zeros(self.symmetric, self.float_zeros)
        check_type(self)


@dataclass(frozen=True)
class NormalFloatConfig:
    """Blocks of `block_size` along a row; their absmax in 8 bits when `double_quantize`."""

    bits: Bits = 4
    block_size: Width = 64
    double_quantize: bool = True
    activations: ActivationGrid | None = None


@dataclass(frozen=True)
class Nf4Config:
    """NF4 as bitsandbytes writes it."""

    block_size: Width = 64
    double_quantize: bool = True
    activations: ActivationGrid | None = None


def round_uniform(weight_OI: Tensor, grid: UniformGrid, clip: Clip = "none", importance_I: Tensor | None = None) -> UniformWeight:
    """The nearest codes of float32 [O, I] on a grid fitted to each group. A 0 stays exactly 0 (it is on every grid with integer zeros)."""
    rows, columns = weight_OI.shape
    size = grid.size(columns)
    weight_OGS = weight_OI.reshape(rows, -1, size)
    importance_GS = None if importance_I is None else importance_I.view(-1, size)
    scale, zero = fit(weight_OGS, grid, clip, importance_GS)
    codes = round_to_grid(weight_OGS, scale, zero, grid)
    return to_record(codes.view(rows, columns), scale.squeeze(-1), zero.squeeze(-1), grid)


def round_normal_float(weight_OI: Tensor, bits: int = 4, block_size: int = 64, double_quantize: bool = True) -> NormalFloatWeight:
    """Codes, absmax and nested absmax of float32 [O, I] as bitsandbytes' `quantize_4bit` finds them: codes are chosen with the
    absmax before its own quantization. in_features must be a multiple of `block_size`."""
    divide(weight_OI.shape[1], block_size, "block_size")
    absmax_OG = nf.absmax_of(weight_OI, block_size)
    return normal_float_record(nf.round_to_book(weight_OI, absmax_OG, bits), absmax_OG, bits, block_size, double_quantize)


def normal_float_record(codes_OI: Tensor, absmax_OG: Tensor, bits: int, block_size: int, double_quantize: bool) -> NormalFloatWeight:
    """Pack codes, and quantize the absmax if `double_quantize`."""
    codes, columns = pack_codes(codes_OI, bits), codes_OI.shape[1]
    if not double_quantize:
        return NormalFloatWeight(codes, bits, block_size, columns, absmax=absmax_OG)
    absmax_codes, scales, offset = nf.quantize_absmax(absmax_OG)
    return NormalFloatWeight(codes, bits, block_size, columns, absmax_codes=absmax_codes, absmax_scales=scales, absmax_offset=offset)


def base_target(weight: StoredWeight, target_OI: Tensor) -> Tensor:
    """What a new base should be, float32 [O, I]: so that the record imitates the target, that is the target without the record's
    low-rank term and delta, times its smoothing, dropped weights included.

    Unless the record has a dense base whose kept weights an earlier stage has moved (SparseGPT, training): then what that stage
    made of them is what counts, and dropped weights are 0. ValueError for NaN or Inf.
    """
    base_OI = finite(target_OI, "target weight").float()
    if weight.low_rank is not None:
        base_OI = base_OI - weight.low_rank.dense()
    if weight.delta is not None:
        base_OI = replace(weight.delta, values=-weight.delta.values).add_to_(base_OI.clone())
    if weight.smooth is not None:
        base_OI = base_OI * weight.smooth.float()
    if isinstance(weight.base, DenseWeight) and not _untouched(weight, weight.base.weight, target_OI):
        return kept(weight, finite(weight.base.weight.float(), "weight"))
    return base_OI


def kept(weight: StoredWeight, base_OI: Tensor) -> Tensor:
    """0 where the record's mask drops a weight."""
    mask_OI = weight.mask_OI()
    return base_OI if mask_OI is None else base_OI.where(mask_OI, 0)


def quantized(weight: StoredWeight, base: Base, activations: ActivationGrid | None) -> StoredWeight:
    """The record with a new base; mask, smoothing, low-rank term and delta stay."""
    return replace(weight, base=base, activations=activations)


def importance_of(weight: StoredWeight, statistics: LayerStatistics) -> Tensor:
    """Mean square of each (smoothed) input, float32 [I]; all ones when no input was ever non-zero."""
    square_I = finite(statistics.inputs.norm_I, "input norms").square()
    if weight.smooth is not None:
        square_I = square_I / weight.smooth.float().square()
    mean = square_I.mean()
    return square_I / mean if bool(mean > 0) else torch.ones_like(square_I)


def grid_importance(weight: StoredWeight, statistics: LayerStatistics, clip: Clip) -> Tensor | None:
    """`importance_of` where the grid search weighs by it."""
    return importance_of(weight, statistics) if clip_needs(clip) else None


def refuse_float_zeros(weight: StoredWeight, grid: UniformGrid) -> None:
    """ValueError for a pruned weight on a grid that has no code for 0."""
    if grid.float_zeros and weight.mask is not None:
        raise ValueError("float_zeros leave no code for 0, and the mask removes weights: set float_zeros: false for a pruned model")


def rtn(weight: StoredWeight, target_OI: Tensor, statistics: LayerStatistics, config: RtnConfig) -> tuple[StoredWeight, dict[str, float]]:
    """Round to the nearest code of a uniform grid or one of ggml's."""
    if config.grid != "uniform":
        kind = type_for(config.grid, weight.shape[1], weight.mask is not None)
        importance_I = grid_importance(weight, statistics, config.clip)
        base = round_ggml(kept(weight, base_target(weight, target_OI)), kind, importance_I, config.clip != "none")
        return quantized(weight, base, config.activations), {}
    grid = UniformGrid(config.bits, config.group_size, config.symmetric, config.float_zeros)
    refuse_float_zeros(weight, grid)
    base = round_uniform(kept(weight, base_target(weight, target_OI)), grid, config.clip, grid_importance(weight, statistics, config.clip))
    return quantized(weight, base, config.activations), {}


def normal_float(
    weight: StoredWeight, target_OI: Tensor, statistics: LayerStatistics, config: NormalFloatConfig
) -> tuple[StoredWeight, dict[str, float]]:
    """Round to the nearest code of a NormalFloat book."""
    base = round_normal_float(kept(weight, base_target(weight, target_OI)), config.bits, config.block_size, config.double_quantize)
    return quantized(weight, base, config.activations), {}


def nf4(weight: StoredWeight, target_OI: Tensor, statistics: LayerStatistics, config: Nf4Config) -> tuple[StoredWeight, dict[str, float]]:
    """NF4, bit for bit bitsandbytes'."""
    return normal_float(weight, target_OI, statistics, NormalFloatConfig(4, config.block_size, config.double_quantize, config.activations))


def _untouched(weight: StoredWeight, current_OI: Tensor, target_OI: Tensor) -> bool:
    """Whether the kept weights are still the target's, smoothed or not yet, to the bit of the dtype they are stored in."""
    candidates = [target_OI] if weight.smooth is None else [target_OI, target_OI * weight.smooth.float()]
    current_OI = kept(weight, current_OI)
    return any(torch.equal(current_OI, kept(weight, other.to(current_OI.dtype))) for other in candidates)
