"""Quantize a matrix again on the grid, the group size and the mask of a record that is already there: the Q-step of `decompose`.

Knows which row of `rounding` and `gptq` a record came from; not how they work, nor where L comes from.
"""

from typing import Any, Literal

from torch import Tensor

from .ggml_types import as_settings
from .gptq import GptqConfig, GptqNormalFloatConfig, gptq, gptq_nf
from .grids import Clip
from .rounding import NormalFloatConfig, RtnConfig, normal_float, rtn
from .statistics import LayerStatistics
from .weights import DenseWeight, GgmlWeight, NormalFloatWeight, StoredWeight, UniformWeight


def is_quantized(weight: StoredWeight) -> bool:
    return not isinstance(weight.base, DenseWeight)


def requantize(
    weight: StoredWeight, target_OI: Tensor, statistics: LayerStatistics, quantizer: Literal["rtn", "gptq"], clip: Clip = "power"
) -> StoredWeight:
    """The record with a new Q for target − L, where L is its low-rank term: same bits, group size, mask and smoothing.

    gptq needs the inputs' second moment; groups scattered by act-order stay scattered under gptq and become contiguous under
    rtn. ValueError for a dense weight, which has no grid.
    """
    base, activations = weight.base, weight.activations
    bits: Any = getattr(base, "bits", None)  # one of those that the configs name, or no such record could be
    if isinstance(base, NormalFloatWeight):
        double = base.absmax is None
        if quantizer == "gptq":
            config = GptqNormalFloatConfig(bits, base.block_size, double, activations=activations)
            return gptq_nf(weight, target_OI, statistics, config)[0]
        return normal_float(weight, target_OI, statistics, NormalFloatConfig(bits, base.block_size, double, activations))[0]
    if isinstance(base, UniformWeight):
        if quantizer == "gptq":
            order: Literal["static_groups", "full"] = "static_groups" if base.group_index is None else "full"
            grid = GptqConfig(bits, base.group_size, base.symmetric, clip, base.float_zeros, order, activations=activations)
            return gptq(weight, target_OI, statistics, grid)[0]
        plain = RtnConfig(bits, base.group_size, base.symmetric, clip, base.float_zeros, activations)
        return rtn(weight, target_OI, statistics, plain)[0]
    if isinstance(base, GgmlWeight):
        given = dict(as_settings(base.type), grid=base.type, clip=clip, activations=activations)
        if quantizer == "gptq":
            return gptq(weight, target_OI, statistics, GptqConfig(**given))[0]
        return rtn(weight, target_OI, statistics, RtnConfig(**given))[0]
    raise ValueError("a dense weight has no grid to requantize on; quantize it first, or set requantize: false")
