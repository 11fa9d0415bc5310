"""NormalFloat grids (QLoRA, arXiv:2305.14314; NF2, NF3, NF8 as in LQ-LoRA, arXiv:2311.12023) and the double quantization of
their absmax, in the arithmetic of bitsandbytes.

Knows tensors only. Legend: O out, G blocks in a row, S values of a block, K code book entries, N all values, flattened.
"""

from functools import cache

import torch
from torch import Tensor

NESTED_BLOCK = 256
_TABLE = 65535  # bitsandbytes' CPU code looks 8-bit codes up in a table of 65,536 evenly spaced values
# QLoRA, appendix E: the 4-bit values, which the construction below meets to seven digits only.
_NF4_NEGATIVE = (-0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334)
_NF4_POSITIVE = (0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434)
_NF4 = (-1.0, *_NF4_NEGATIVE, -0.09105003625154495, 0.0, *_NF4_POSITIVE, 0.5626170039176941, 0.7229568362236023, 1.0)


@cache
def code_book(bits: int) -> Tensor:
    """float32 [2^bits], ascending, from −1 to 1 with an exact 0: quantiles of the normal distribution, one more on the positive side."""
    if bits == 4:
        return torch.tensor(_NF4)
    levels = 1 << bits
    offset = 0.5 * ((1 - 1 / (2 * levels)) + (1 - 1 / (2 * (levels - 1))))
    positive = torch.special.ndtri(torch.linspace(offset, 0.5, levels // 2 + 1, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, levels // 2, dtype=torch.float64)[:-1])
    values = sorted([*positive.tolist(), 0.0, *negative.tolist()])
    return (torch.tensor(values, dtype=torch.float64) / max(values)).float()


@cache
def zero_code(bits: int) -> int:
    """The code whose value is exactly 0."""
    return int((code_book(bits) == 0).nonzero())


@cache
def dynamic_map() -> Tensor:
    """float32 [256], ascending: bitsandbytes' signed dynamic map (a sign bit, 7 bits of exponent and fraction), which codes the absmax."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, (1 << exponent) + 1, dtype=torch.float32)
        means = ((edges[:-1] + edges[1:]) / 2.0 * 10 ** (exponent - 6)).tolist()
        values += means + [-m for m in means]
    return torch.tensor(sorted(values))


def bounds(book_K: Tensor) -> Tensor:
    """float32 [K − 1]: where one code ends and the next begins."""
    return (book_K[:-1] + book_K[1:]) / 2


def absmax_of(weight_OI: Tensor, block_size: int) -> Tensor:
    """float32 [O, G]: the largest magnitude of each block along a row."""
    return weight_OI.float().view(weight_OI.shape[0], -1, block_size).abs().amax(-1)


def round_to_book(weight_OI: Tensor, absmax_OG: Tensor, bits: int) -> Tensor:
    """uint8 [O, I]: the nearest code of each value, as bitsandbytes finds it (a product with 1/absmax, never a division)."""
    rows, columns = weight_OI.shape
    book = code_book(bits).to(weight_OI.device)
    scaled = weight_OI.float().view(rows, absmax_OG.shape[1], -1) * (1.0 / absmax_OG.clamp(min=1e-38)).unsqueeze(-1)
    return torch.bucketize(scaled.clamp_(-1, 1), bounds(book), out_int32=True).to(torch.uint8).view(rows, columns)


def quantize_absmax(absmax_OG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization: (codes uint8 [O, G], scales float32 [⌈O·G/256⌉], offset float32 [1], the mean).

    bitsandbytes finds the nearest value of the dynamic map through a table on the CPU (here too, on every device) and
    directly on CUDA; where an absmax lies within 1.6e-5 of the midpoint of two codes the two may choose different ones.
    """
    offset = absmax_OG.mean()
    flat_N = (absmax_OG - offset).reshape(-1)
    blocks = torch.nn.functional.pad(flat_N, (0, -flat_N.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    scales = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / scales.clamp(min=1e-38)).unsqueeze(-1)).clamp_(-1, 1)
    entry = ((scaled + 1) * 0.5 * _TABLE + 0.5).floor_()
    value = -1 + 2 * entry / _TABLE
    codes = torch.bucketize(value, bounds(dynamic_map().to(value.device)), out_int32=True).to(torch.uint8)
    return codes.view(-1)[: flat_N.numel()].view(absmax_OG.shape).contiguous(), scales, offset.view(1)


def dequantize_absmax(codes_OG: Tensor, scales: Tensor, offset: Tensor) -> Tensor:
    """float32 [O, G]: map[code]·scale of its block of 256 (over the flattened matrix) + offset."""
    flat = dynamic_map().to(codes_OG.device)[codes_OG.reshape(-1).int()]
    scale = scales.float().repeat_interleave(NESTED_BLOCK)[: flat.numel()]
    return (flat * scale + offset.float()).view(codes_OG.shape)
