"""Training what a quantized weight already stores: group scales, float zeros, NormalFloat's absmax. Codes stay.

s = s0·(1 + δ): one learning rate serves every layer (PEQA, arXiv:2305.14152; EfficientQAT's end-to-end phase, 2407.11062,
whose rates are absolute). Masked weights stay 0: the mask is applied to what a zero point contributes.
Legend: O out, I in, G groups, S columns of a group.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..compress import normal_float
from ..compress.weights import NormalFloatWeight, StoredWeight, UniformWeight
from .trainable import Limits, Trainable

HALF_MAX, HALF_TINY = 65504.0, 2.0**-24


class RelativeScales(nn.Module):
    """W = (W0 − s0·ζ ⊙ mask)·(1 + δ): δ [O, G] moves the scales, ζ [O, G] (in code units, only when `zeros`) the zero points."""

    needs_base, sums_gradient = True, True

    def __init__(self, stored: StoredWeight, zeros: bool = False) -> None:
        super().__init__()
        base = stored.base
        if not isinstance(base, UniformWeight | NormalFloatWeight):
            raise ValueError("scales can be trained on quantized weights only; this base is dense")
        if zeros and not isinstance(base, UniformWeight):
            raise ValueError("a NormalFloat weight has no zero points to train")
        self.stored = stored
        self.columns = base.group_index.long() if isinstance(base, UniformWeight) and base.group_index is not None else None
        shape = (stored.shape[0], base.groups)
        self.delta = nn.Parameter(torch.zeros(shape, device=base.codes.device))
        self.zeta = nn.Parameter(torch.zeros(shape, device=base.codes.device)) if zeros else None

    def start_scales(self) -> Tensor:
        """s0 float32 [O, G]."""
        base = self.stored.base
        assert isinstance(base, UniformWeight | NormalFloatWeight)
        return base.scales.float() if isinstance(base, UniformWeight) else base.absmax_OG()

    def weights(self, base_OI: Tensor, delta_OG: Tensor, zeta_OG: Tensor | None = None) -> Tensor:
        if zeta_OG is not None:
            base_OI = self._moved_zero(base_OI, zeta_OG)
        factor = (1 + delta_OG).to(base_OI.dtype)
        if self.columns is not None:
            return base_OI * factor[:, self.columns]
        return (self._grouped(base_OI) * factor.unsqueeze(-1)).view(base_OI.shape)

    def pull_back(self, weight_OI: Tensor, gradient_OI: Tensor) -> tuple[Tensor, ...]:
        """Gradients of (δ[, ζ]): dδ_g = Σ_{i in g} dW·W / (1 + δ), dζ_g = −s·Σ_{i in g} dW·m. `gradient_OI` is used up."""
        factor_OG = 1 + self.delta.detach()
        if self.zeta is None:
            return (self._group_sum(gradient_OI.mul_(weight_OI)).div_(factor_OG),)
        mask = self.stored.mask_OI()
        masked = self._group_sum(gradient_OI if mask is None else gradient_OI.where(mask, 0))
        return self._group_sum(gradient_OI.mul_(weight_OI)).div_(factor_OG), -self.start_scales() * factor_OG * masked

    def fold(self, stored: StoredWeight) -> StoredWeight:
        """The record with the trained scales (and zeros) in their storage dtypes; codes and mask untouched.
        ValueError where the scales' dtype cannot hold a trained value."""
        base = stored.base
        moved = bool(self.delta.detach().any())
        if isinstance(base, NormalFloatWeight):
            return replace(stored, base=with_absmax(base, base.absmax_OG() * (1 + self.delta.detach()))) if moved else stored
        assert isinstance(base, UniformWeight)
        if moved:
            wrong = self.problem(self.extremes(self.delta.detach()).tolist())
            if wrong:
                raise ValueError(f"the trained scales cannot be stored as {base.scales.dtype}: {wrong}")
            base = replace(base, scales=self._scales(self.delta.detach(), base.scales.dtype))
        if self.zeta is not None and bool(self.zeta.detach().any()):
            base = replace(base, zeros=base.zeros_OG() + self.zeta.detach())
        return replace(stored, base=base)

    def trainables(self, scales: bool = True) -> dict[str, Trainable]:
        out: dict[str, Trainable] = {}
        if scales:
            out["scales"] = Trainable(
                self.delta, "scales", self.as_stored, limits=Limits(4 if self._in_half() else 2, self.extremes, self.problem)
            )
        self.delta.requires_grad_(scales)
        if self.zeta is not None:
            out["zeros"] = Trainable(self.zeta, "zeros")
        return out

    def as_stored(self, delta_OG: Tensor) -> Tensor:
        """The δ that reads back from disk."""
        if not bool(delta_OG.any()):
            return delta_OG
        base, start = self.stored.base, self.start_scales()
        if isinstance(base, NormalFloatWeight):
            back = with_absmax(base, start * (1 + delta_OG)).absmax_OG()
        else:
            assert isinstance(base, UniformWeight)
            back = self._scales(delta_OG, base.scales.dtype).float()
        return torch.where(start == 0, 0, back / start - 1)

    def extremes(self, delta_OG: Tensor) -> Tensor:
        """float32 [2] or, where scales are stored in float16, [4]: least and greatest factor 1 + δ, least and greatest size of a scale."""
        factor = 1 + delta_OG
        ends = [*factor.aminmax()]
        if self._in_half():
            start = self.start_scales()
            none, size = start == 0, (start * factor).abs()
            ends += [size.masked_fill(none, math.inf).amin(), size.masked_fill(none, 0).amax()]
        return torch.stack(ends)

    def _in_half(self) -> bool:
        return isinstance(self.stored.base, UniformWeight) and self.stored.base.scales.dtype == torch.float16

    @staticmethod
    def problem(extremes: Sequence[float]) -> str | None:
        """What is wrong with a trained δ: a scale that is not positive, not finite, or beyond its storage dtype."""
        least, greatest, *sizes = extremes
        if not (math.isfinite(least) and math.isfinite(greatest)):
            return "a scale is not finite"
        if least <= 0:
            return f"a scale went to {least:.3g} times its start"
        if sizes and (sizes[1] > HALF_MAX or sizes[0] < HALF_TINY):
            return f"scales run from {sizes[0]:.3g} to {sizes[1]:.3g}; float16 holds {HALF_TINY:.3g} to {HALF_MAX:.0f}"
        return None

    def _scales(self, delta_OG: Tensor, dtype: torch.dtype) -> Tensor:
        return (self.start_scales() * (1 + delta_OG)).to(dtype)

    def _moved_zero(self, base_OI: Tensor, zeta_OG: Tensor) -> Tensor:
        offset = self._spread(self.start_scales() * zeta_OG).to(base_OI.dtype)
        mask = self.stored.mask_OI()
        return base_OI - (offset if mask is None else offset.where(mask, 0))

    def _grouped(self, matrix_OI: Tensor) -> Tensor:
        return matrix_OI.view(matrix_OI.shape[0], self.delta.shape[1], -1)

    def _spread(self, groups_OG: Tensor) -> Tensor:
        """[O, G] → [O, I]."""
        if self.columns is not None:
            return groups_OG[:, self.columns]
        return groups_OG.repeat_interleave(self.stored.shape[1] // groups_OG.shape[1], dim=1)

    def _group_sum(self, matrix_OI: Tensor) -> Tensor:
        """[O, I] → float32 [O, G]."""
        if self.columns is not None:
            return torch.zeros_like(self.delta).index_add_(1, self.columns, matrix_OI.float())
        return self._grouped(matrix_OI).float().sum(-1)


def with_absmax(base: NormalFloatWeight, absmax_OG: Tensor) -> NormalFloatWeight:
    """The record with another absmax; double quantization is redone where the record has it (mean removed, blocks of 256, dynamic map)."""
    if base.absmax is not None:
        return replace(base, absmax=absmax_OG.to(base.absmax.dtype))
    codes, scales, offset = double_quantize(absmax_OG)
    return replace(base, absmax_codes=codes, absmax_scales=scales, absmax_offset=offset)


def double_quantize(absmax_OG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 [O, G], scales float32 [⌈O·G/256⌉], offset float32 [1]) whose `dequantize_absmax` is nearest to absmax."""
    offset = absmax_OG.mean().view(1)
    flat = (absmax_OG - offset).reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % normal_float.NESTED_BLOCK)).view(-1, normal_float.NESTED_BLOCK)
    scales = padded.abs().amax(-1).clamp(min=1e-12)
    levels = normal_float.dynamic_map().to(absmax_OG.device)
    edges = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(padded / scales.unsqueeze(-1), edges).view(-1)[: flat.numel()]
    return codes.to(torch.uint8).view(absmax_OG.shape), scales, offset
