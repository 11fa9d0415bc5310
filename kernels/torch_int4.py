"""torch's own 4-bit product (tinygemm): how it wants a uniform grid packed, what it can carry, and whether this torch has it for a device.

It stores scale and zero of a group adjacently in bfloat16 and counts a code from 8: w = (q − 8)·scale + zero. Knows tensors only.
Legend: M tokens, O out, I in, G groups.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

INNER_TILES = 8
GROUPS = (32, 64, 128, 256)
MIDDLE = 8
SLACK = 2.0
"""The packed matrix may err at most this much more than the matrix rounded to bfloat16, since its scales and zeros are."""


def pack(codes_OI: Tensor, scales_GO: Tensor, zeros_GO: Tensor | None) -> tuple[Tensor, Tensor]:
    """(packed codes, bfloat16 [G, O, 2] of scale and zero) for the device of `codes_OI`, uint8; zeros None is the middle of the grid."""
    both = scale_and_zero(scales_GO, zeros_GO)
    aten: Any = torch.ops.aten
    if codes_OI.device.type == "cpu":
        return aten._convert_weight_to_int4pack_for_cpu(codes_OI.int(), INNER_TILES), both
    return aten._convert_weight_to_int4pack((codes_OI[:, ::2] << 4 | codes_OI[:, 1::2]).to(torch.uint8), INNER_TILES), both


def scale_and_zero(scales_GO: Tensor, zeros_GO: Tensor | None) -> Tensor:
    """bfloat16 [G, O, 2]."""
    scales = scales_GO.float()
    shifts = torch.zeros_like(scales) if zeros_GO is None else (MIDDLE - zeros_GO.float()) * scales
    return torch.stack((scales, shifts), dim=2).contiguous().to(torch.bfloat16)


def multiply(x_MI: Tensor, packed: Tensor, both_GO2: Tensor, group_size: int) -> Tensor:
    """[M, O] bfloat16 of x bfloat16."""
    aten: Any = torch.ops.aten
    product = aten._weight_int4pack_mm_for_cpu if x_MI.device.type == "cpu" else aten._weight_int4pack_mm
    return product(x_MI, packed, group_size, both_GO2)


def refusal(shape: tuple[int, int], codes_OI: Tensor, scales_GO: Tensor, zeros_GO: Tensor | None, group_size: int) -> str:
    """Why it cannot carry a 4-bit grid, or nothing. Its rounding of scales and zeros is measured on the outputs that are given."""
    out, inputs = shape
    if group_size not in GROUPS or inputs % (16 * INNER_TILES) or out % 8:
        return f"{out}x{inputs} in groups of {group_size}: it takes groups of {GROUPS}, inputs by {16 * INNER_TILES} and outputs by 8"
    group = torch.arange(inputs, device=codes_OI.device) // group_size
    scales, both = scales_GO.float(), scale_and_zero(scales_GO, zeros_GO).float()
    zeros = float(MIDDLE) if zeros_GO is None else zeros_GO.float()[group].t()
    dense = (codes_OI.float() - zeros) * scales[group].t()
    theirs = (codes_OI.float() - MIDDLE) * both[group, :, 0].t() + both[group, :, 1].t()
    error, allowed = (theirs - dense).norm().item(), SLACK * (dense.bfloat16().float() - dense).norm().item()
    return "" if error <= allowed else f"its bfloat16 scales and zeros err {error:.3g}, allowed are {allowed:.3g}"


@cache
def availability(device: torch.device) -> str:
    """Nothing where this torch multiplies with it on the device, else what it says."""
    try:
        codes = torch.zeros(64, 16 * INNER_TILES, dtype=torch.uint8, device=device)
        packed, both = pack(codes, torch.ones(2, 64, device=device), None)
        multiply(torch.zeros(1, codes.shape[1], dtype=torch.bfloat16, device=device), packed, both, 64)
    except (RuntimeError, AttributeError) as error:
        return str(error).strip().split("\n")[0]
    return ""
