"""The trainable form of a quantized weight: rounding offsets between the codes, and changes of its scales and zero points.

Knows one matrix and its gradient; not losses, blocks or optimizers.
Legend: O out, I in, G groups (of ranges: super-blocks, where a type of ggml has them), S columns of a group.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .ggml_grids import with_codes
from .rounding import base_target
from .weights import DenseWeight, GgmlWeight, StoredWeight, UniformWeight

_INSIDE = 0.499
"""How far a weight may lie from its code without leaving the code's cell."""


@dataclass
class Latent:
    """u [O, I] in grid steps around the zero point; codes = round(u + offset + zero) for a float zero, round(u + offset) + zero for an
    integer one; scales are scale·(1 + range), zeros zero + shift. Of a type of ggml one range scales both d and m, and no zero shifts.

    u holds the start's decisions: where its code is not the nearest one, u lies at the edge of that code's cell. `extra` is what
    the record adds to its base (low-rank term, delta), None where it adds nothing.
    """

    start: StoredWeight
    base: UniformWeight | GgmlWeight
    u_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor
    keep_OI: Tensor | None
    extra_OI: Tensor | None
    offset_OI: Tensor
    range_OG: Tensor
    shift_OG: Tensor

    @classmethod
    def of(cls, record: StoredWeight, target_OI: Tensor) -> "Latent":
        """The record's own codes, its target's place inside their cells."""
        base = record.base
        form = base.uniform() if isinstance(base, GgmlWeight) else base
        assert isinstance(base, UniformWeight | GgmlWeight) and isinstance(form, UniformWeight) and form.group_index is None
        scale, zero = form.scales.float(), form.zeros_OG()
        levels = _grouped(base.codes_OI().float(), zero) - zero.unsqueeze(-1)
        wanted = _grouped(base_target(record, target_OI), zero) / scale.unsqueeze(-1)
        u = (levels + (wanted - levels).clamp(-_INSIDE, _INSIDE)).view(record.shape)
        extra = None
        if record.low_rank is not None or record.delta is not None:
            extra = replace(record, base=DenseWeight(torch.zeros_like(u)), mask=None).dense()
        zeros = torch.zeros_like
        ranges = zeros(base.super_scales, dtype=torch.float32) if isinstance(base, GgmlWeight) else zeros(scale)
        return cls(record, base, u, scale, zero, record.mask_OI(), extra, zeros(u), ranges, zeros(scale))

    def parameters(self) -> list[Tensor]:
        return [self.offset_OI, self.range_OG, self.shift_OG]

    def effective(self) -> Tensor:
        """The [O, I] matrix, differentiable: rounding and the zero's rounding are passed straight through."""
        weight = _Rounded.apply(self.offset_OI, self.range_OG, self.shift_OG, self)
        assert isinstance(weight, Tensor)
        if self.start.smooth is not None:
            weight = weight / self.start.smooth.float()
        return weight if self.extra_OI is None else weight + self.extra_OI

    @torch.no_grad()
    def record(self) -> StoredWeight:
        """The grid weight as it will be stored, scales rounded to their type."""
        base = self.base
        zero = self._zero()
        if isinstance(base, UniformWeight) and base.zeros is not None and base.float_zeros:
            zero = zero.to(base.zeros.dtype).float()
        levels, _ = self._levels(zero)
        codes = (_grouped(levels, zero) + zero.unsqueeze(-1)).round().view(self.u_OI.shape)
        if isinstance(base, GgmlWeight):
            factor_OG = 1 + self.range_OG
            minima = None if base.super_minima is None else (base.super_minima.float() * factor_OG).half()
            moved = replace(base, super_scales=(base.super_scales.float() * factor_OG).half(), super_minima=minima)
            return replace(self.start, base=with_codes(moved, codes))
        scale = (self.scale_OG * (1 + self.range_OG)).to(base.scales.dtype)
        stored = None if base.zeros is None else zero.to(base.zeros.dtype) if base.float_zeros else zero.to(torch.int64)
        return replace(self.start, base=UniformWeight.from_codes(codes.to(torch.int64), scale, stored, base.bits, base.group_size))

    @property
    def float_zeros(self) -> bool:
        return not self.base.symmetric if isinstance(self.base, GgmlWeight) else self.base.float_zeros

    def by_group(self, range_OG: Tensor) -> Tensor:
        """[O, G]."""
        return self.base.spread(range_OG) if isinstance(self.base, GgmlWeight) else range_OG

    def _zero(self) -> Tensor:
        zero = self.zero_OG + self.shift_OG
        return zero if self.float_zeros else zero.round_().clamp_(1, (1 << self.base.bits) - 1)

    def _levels(self, zero_OG: Tensor) -> tuple[Tensor, Tensor]:
        """(code − zero [O, I], whether the code lies inside the range, uint8 [O, G, S]); a dropped weight has the level 0."""
        zero, top = zero_OG.unsqueeze(-1), (1 << self.base.bits) - 1
        codes = _grouped(self.u_OI + self.offset_OI, zero_OG)
        codes = codes.add_(zero).round_() if self.float_zeros else codes.round_().add_(zero)
        inside = (codes >= 0) & (codes <= top)
        levels = codes.clamp_(0, top).sub_(zero).view(self.u_OI.shape)
        if self.keep_OI is not None:
            levels *= self.keep_OI
            inside &= _grouped(self.keep_OI, zero_OG)
        return levels, inside


class _Rounded(torch.autograd.Function):
    """scale·(1 + range)·(code − zero), with the straight-through gradients of EfficientQAT (arXiv:2407.11062, section 3.2): a weight moves
    where its code is inside the range, the zero where it is not, the scale by the levels as they are."""

    @staticmethod
    def forward(ctx: Any, offset_OI: Tensor, range_OG: Tensor, shift_OG: Tensor, latent: Latent) -> Tensor:
        levels_OI, inside_OGS = latent._levels(latent._zero())
        scale_OG = latent.scale_OG * (1 + latent.by_group(range_OG))
        ctx.save_for_backward(levels_OI, inside_OGS, scale_OG, latent.scale_OG)
        ctx.keep_OI, ctx.ranges = latent.keep_OI, range_OG.shape
        return (_grouped(levels_OI, scale_OG) * scale_OG.unsqueeze(-1)).view(levels_OI.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        levels_OI, inside_OGS, scale_OG, scale0_OG = ctx.saved_tensors
        gradient_OGS = _grouped(gradients[0], scale_OG)
        offset = shift = moved = None
        if ctx.needs_input_grad[1]:
            moved = torch.einsum("ogs,ogs->og", gradient_OGS, _grouped(levels_OI, scale_OG)) * scale0_OG
            moved = moved.view(*ctx.ranges, -1).sum(-1)
        if ctx.needs_input_grad[2]:
            outside = ~inside_OGS if ctx.keep_OI is None else ~inside_OGS & _grouped(ctx.keep_OI, scale_OG)
            shift = (gradient_OGS * outside).sum(-1) * -scale_OG
        if ctx.needs_input_grad[0]:
            offset = (gradient_OGS * inside_OGS).mul_(scale_OG.unsqueeze(-1)).view(levels_OI.shape)
        return offset, moved, shift, None


def _grouped(matrix_OI: Tensor, like_OG: Tensor) -> Tensor:
    """[O, G, S] of an [O, I]."""
    return matrix_OI.view(*like_OG.shape, -1)
