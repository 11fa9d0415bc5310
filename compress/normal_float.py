"""NormalFloat grids (QLoRA, arXiv:2305.14314; NF2, NF3, NF8 as in LQ-LoRA, arXiv:2311.12023) and the double quantization of
their absmax, in the arithmetic of bitsandbytes.

Knows tensors only. Legend: O out, G blocks in a row, K code book entries.
"""

from functools import cache

import torch
from scipy.stats import norm
from torch import Tensor

NESTED_BLOCK = 256


@cache
def code_book(bits: int) -> Tensor:
    """float32 [2^bits], ascending, from −1 to 1 with an exact 0: quantiles of the normal distribution, one more on the positive side."""
    levels = 1 << bits
    offset = 0.5 * ((1 - 1 / (2 * levels)) + (1 - 1 / (2 * (levels - 1))))
    positive = norm.ppf(torch.linspace(offset, 0.5, levels // 2 + 1, dtype=torch.float64)[:-1].numpy())
    negative = -norm.ppf(torch.linspace(offset, 0.5, levels // 2, dtype=torch.float64)[:-1].numpy())
    values = sorted([*positive.tolist(), 0.0, *negative.tolist()])
    return (torch.tensor(values, dtype=torch.float64) / max(values)).float()


@cache
def dynamic_map() -> Tensor:
    """float32 [256], ascending: bitsandbytes' signed dynamic map (one sign bit, 7 bits of exponent and fraction), which codes the absmax."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, (1 << exponent) + 1, dtype=torch.float32)
        means = ((edges[:-1] + edges[1:]) / 2.0 * 10 ** (exponent - 6)).tolist()
        values += means + [-m for m in means]
    return torch.tensor(sorted(values))


def dequantize_absmax(codes_OG: Tensor, scales: Tensor, offset: Tensor) -> Tensor:
    """float32 [O, G]: map[code]·scale of its block of 256 (over the flattened matrix) + offset."""
    flat = dynamic_map().to(codes_OG.device)[codes_OG.reshape(-1).int()]
    scale = scales.float().repeat_interleave(NESTED_BLOCK)[: flat.numel()]
    return (flat * scale + offset.float()).view(codes_OG.shape)
