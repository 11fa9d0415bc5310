"""Two-level scales: a small integer scale per group and one float scale per output channel (QServe, arXiv:2405.04532, §4.1).

(code − zero)·k stays within a signed byte, so that a product with 8-bit inputs is summed as integers and scaled once, at its end. A record
keeps its form: its scales are then exact products c·k, which is recovered from the scales alone. Knows tensors and the uniform record.
Legend: O out, I in, G groups.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from .weights import UniformWeight

TOP = 127
"""Largest magnitude of (code − zero)·k; −128 is left out, as QServe's protective range leaves it."""
FINER, COARSER, STEPS = 0.7, 1.7, 64
"""Channel scales that are tried, as factors of the smallest with which the whole number of every group stays in range."""
FEW_ROWS = 64


def reach(codes_OI: Tensor, zeros_OG: Tensor, group_size: int) -> Tensor:
    """float32 [O, G]: the largest |code − zero| that a group uses, at least 1. Contiguous groups."""
    levels = codes_OI.float().view(len(codes_OI), -1, group_size) - zeros_OG.float().unsqueeze(-1)
    return levels.abs_().amax(-1).clamp_(min=1)


def exact_levels(scales_OG: Tensor, reach_OG: Tensor) -> tuple[Tensor, Tensor] | None:
    """(k int8 [O, G], c float32 [O]) with scales = c·k exactly and reach·k ≤ 127; None where an output has none.

    Of several the one of the smallest k. A row of zeros has k = 0 and c = 0."""
    if len(scales_OG) > FEW_ROWS and _exact(scales_OG[:FEW_ROWS], reach_OG[:FEW_ROWS]) is None:
        return None
    return _exact(scales_OG, reach_OG)


def _exact(scales_OG: Tensor, reach_OG: Tensor) -> tuple[Tensor, Tensor] | None:
    scales, most = scales_OG.double(), (TOP / reach_OG.double()).floor()
    if bool((scales < 0).any()) or not bool(scales.isfinite().all()):
        return None
    widest = scales.amax(1, keepdim=True)
    done = scales.new_zeros(len(scales), dtype=torch.bool)
    levels, channel = torch.zeros_like(scales), torch.zeros_like(widest)
    for k in range(1, TOP + 1):
        candidate = widest / k
        ratio = torch.where(candidate > 0, scales / candidate, 0).round_()
        fits = (ratio * candidate == scales) & (ratio <= most)
        new = fits.all(1) & (candidate.float().double() == candidate).squeeze(1) & ~done
        levels[new], channel[new], done = ratio[new], candidate[new], done | new
        if bool(done.all()):
            return levels.to(torch.int8), channel.squeeze(1).float()
    return None


def refusal(base: object) -> str:
    """Why a base cannot take two levels of scales, or nothing."""
    if not isinstance(base, UniformWeight):
        return f"a {type(base).__name__} has no uniform grid"
    if base.bits > 4:
        return f"{base.bits} bits: code − zero leaves no room for a whole number within a signed byte; 4 bits at most do"
    if base.group_index is not None:
        return "group_index scatters its groups over the columns, and integer products need contiguous ones"
    zeros = base.zeros_OG()
    if bool((zeros != zeros.round()).any()):
        return "its zero points are no whole numbers"
    if bool((base.scales < 0).any()) or not bool(base.scales.isfinite().all()):
        return "it has a negative scale, or one that is no number"
    return ""


def with_integer_scales(base: UniformWeight) -> UniformWeight:
    """The nearest weight whose scales are c·k: c of each output by a search for the least squared error of Σ (code − zero)²·(s − c·k)² over its
    groups, k the nearest whole numbers within range, then every code the nearest on the grid that this makes; zero points stay, and so does
    a code at its zero point (a mask survives). c has so few bits that c·k is exact in the scales' dtype. A base whose scales are already
    exact is returned as it is. ValueError says why a base has no such form (`refusal`)."""
    if why := refusal(base):
        raise ValueError(why)
    zeros = base.zeros_OG()
    codes, size = base.codes_OI(), base.in_features // base.groups
    reach_OG = reach(codes, zeros, size)
    if exact_levels(base.scales, reach_OG) is not None:
        return base
    levels = codes.float().view(len(codes), -1, size) - zeros.unsqueeze(-1)
    channel, whole = _two_levels(base.scales.float(), reach_OG.clamp(min=1 << (base.bits - 1)), levels.square().sum(-1), base.scales.dtype)
    scales = channel.unsqueeze(1) * whole
    ratio = torch.where(scales > 0, base.scales.float() / scales, 0).unsqueeze(-1)
    most = torch.where(whole > 0, (TOP / whole).floor(), TOP).unsqueeze(-1)
    moved = (levels * ratio).round_().clamp_(-most, most)
    moved = torch.where(ratio > 0, moved, levels).add_(zeros.unsqueeze(-1)).clamp_(0, (1 << base.bits) - 1)
    packed = UniformWeight.from_codes(moved.view(codes.shape).to(codes.dtype), base.scales, None, base.bits, base.group_size)
    return replace(base, codes=packed.codes, scales=scales.to(base.scales.dtype))


def _two_levels(scales_OG: Tensor, reach_OG: Tensor, weight_OG: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(c float32 [O], k float32 [O, G]); c·k is exact in `dtype`: what bits the largest k leaves are c's."""
    most = (TOP / reach_OG).floor()
    room = 1 - round(math.log2(torch.finfo(dtype).eps)) - int(most.max()).bit_length()
    least = (scales_OG / most).amax(1, keepdim=True)
    channel, whole, lost = torch.zeros_like(least), torch.zeros_like(scales_OG), torch.full_like(least, torch.inf)
    for factor in torch.linspace(FINER, COARSER, STEPS).tolist():
        candidate = _rounded(least * factor, room, torch.finfo(dtype))
        k = (scales_OG / candidate).round_().clamp_(min=1).minimum(most)
        k = torch.where(scales_OG > 0, k, 0)
        error = (weight_OG * (scales_OG - candidate * k).square()).sum(1, keepdim=True)
        better = error < lost
        channel, whole, lost = channel.where(~better, candidate), whole.where(~better, k), lost.where(~better, error)
    return channel.squeeze(1), whole


def _rounded(value: Tensor, bits: int, kind: torch.finfo) -> Tensor:
    """To so many bits of mantissa, fewer where the smallest numbers of the type have no more; never to 0."""
    _, exponent = torch.frexp(value)
    step = torch.ldexp(torch.ones_like(value), exponent - bits).clamp_(min=kind.smallest_normal * kind.eps)
    return (value / step).round_().clamp_(min=1) * step
