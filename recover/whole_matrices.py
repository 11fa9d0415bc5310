"""Training every weight of a matrix: a dense weight under its mask, or a latent weight held on its grid (QAT).

Both are `reweight`s of a CompressedLinear. Legend: O out, I in, G groups.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..compress import ggml_grids, grids, normal_float
from ..compress.packing import pack_codes
from ..compress.weights import Base, DenseWeight, GgmlWeight, NormalFloatWeight, StoredWeight, UniformWeight
from .scales import with_absmax
from .trainable import Trainable, through

Requantize = Callable[[Tensor, StoredWeight], StoredWeight]
"""(trained base [O, I], the record with the base from before and everything else as trained) → the record with a new base."""


class MaskedDense(nn.Module):
    """The weight itself, float32 [O, I], bounded by the mask. A quantized base is dequantized and rounded anew behind training (case B):
    to nearest whenever the stored form is asked for, or, where that `waits`, once, by whoever has what a better rounding needs."""

    needs_base = False

    def __init__(self, stored: StoredWeight, waits: bool = False) -> None:
        super().__init__()
        self.stored, self.waits, self.rounded = stored, waits and not isinstance(stored.base, DenseWeight), stored.base
        self.start = None if isinstance(stored.base, DenseWeight) else stored.base_dense()
        self.weight = nn.Parameter(stored.base_dense().clone())

    def weights(self, base_OI: None, weight_OI: Tensor) -> Tensor:
        mask = self.stored.mask_OI()
        return weight_OI if mask is None else weight_OI.where(mask, 0)

    def pull_back(self, base_OI: None, gradient_OI: Tensor) -> tuple[Tensor]:
        mask = self.stored.mask_OI()
        return ((gradient_OI if mask is None else gradient_OI.masked_fill_(~mask, 0)).float(),)

    def fold(self, stored: StoredWeight) -> StoredWeight:
        weight = self.weights(None, self.weight.detach())
        if isinstance(stored.base, DenseWeight):
            return replace(stored, base=DenseWeight(weight.to(stored.base.weight.dtype)))
        if self._untouched(weight):
            return replace(stored, base=self.rounded)
        if self.waits:
            raise ValueError("the trained weight waits to be rounded (quantizer: gptq needs calibration inputs; rtn does not)")
        return round_again(weight, stored)

    @torch.no_grad()
    def round_by(self, requantize: Requantize, stored: StoredWeight) -> None:
        """Round the trained weight once and for all: from now on it is what the new base holds. `stored` has everything else as trained."""
        weight = self.weights(None, self.weight.detach())
        if not self._untouched(weight):
            record = requantize(weight, stored)
            self.rounded, self.start = record.base, record.base_dense()
            self.weight.data.copy_(self.start)

    def trainables(self) -> dict[str, Trainable]:
        base = self.stored.base
        if isinstance(base, DenseWeight):
            return {"weight": Trainable(self.weight, "dense", through(base.weight.dtype))}
        if self.waits:
            return {"weight": Trainable(self.weight, "dense")}
        return {"weight": Trainable(self.weight, "dense", lambda w: w if self._untouched(w) else round_again(w, self.stored).base_dense())}

    def _untouched(self, weight_OI: Tensor) -> bool:
        return self.start is not None and torch.equal(self.start, weight_OI)


def round_again(weight_OI: Tensor, like: StoredWeight) -> StoredWeight:
    """Round to nearest on a freshly fitted grid of the same kind, bits and groups (case B without calibration data)."""
    base = like.base
    if isinstance(base, NormalFloatWeight):
        blocks = weight_OI.view(weight_OI.shape[0], base.groups, base.block_size)
        absmax = blocks.abs().amax(-1)
        codes = _nearest_code(blocks / absmax.clamp(min=1e-12).unsqueeze(-1), base.bits)
        fresh = replace(base, codes=pack_codes(codes.view(weight_OI.shape), base.bits))
        return replace(like, base=with_absmax(fresh, absmax))
    if isinstance(base, GgmlWeight):
        return replace(like, base=ggml_grids.round_ggml(weight_OI, base.type))
    if not isinstance(base, UniformWeight):
        return replace(like, base=DenseWeight(weight_OI.to(base.weight.dtype)))
    if base.group_index is not None:
        return replace(like, base=hold_grid(weight_OI, base))
    grid = grids.UniformGrid(base.bits, weight_OI.shape[1] // base.groups, base.symmetric)
    blocks = weight_OI.view(weight_OI.shape[0], base.groups, -1)
    scale, zero = grids.search_clip(blocks, grid)
    codes = grids.round_to_grid(blocks, scale, zero, grid).view(weight_OI.shape)
    fresh = grids.to_record(codes, scale.squeeze(-1), zero.squeeze(-1), grid)
    return replace(like, base=replace(fresh, scales=fresh.scales.to(base.scales.dtype), group_size=base.group_size))


def hold_grid(weight_OI: Tensor, base: UniformWeight) -> UniformWeight:
    """Nearest codes on the scales and zeros that are there."""
    codes = codes_in_units(weight_OI, base).round().clamp(0, (1 << base.bits) - 1)
    return replace(base, codes=pack_codes(codes.to(torch.int64), base.bits))


def codes_in_units(weight_OI: Tensor, base: UniformWeight) -> Tensor:
    """w / s + z, float32 [O, I]: where a weight lies on the grid."""
    scales, zeros = spread(base.scales.float(), base), spread(base.zeros_OG(), base)
    return weight_OI / scales.where(scales != 0, 1) + zeros


def _units(base: UniformWeight | NormalFloatWeight | GgmlWeight) -> Tensor:
    """float32 [O, G]: what a step of the codes, or the whole book, is worth."""
    if isinstance(base, GgmlWeight):
        return base.scales_OG()
    return base.scales.float() if isinstance(base, UniformWeight) else base.absmax_OG()


def spread(groups_OG: Tensor, base: UniformWeight | NormalFloatWeight | GgmlWeight) -> Tensor:
    """A value per group → one per column, [O, I]."""
    if isinstance(base, UniformWeight) and base.group_index is not None:
        return groups_OG[:, base.group_index.long()]
    return groups_OG.repeat_interleave(base.in_features // groups_OG.shape[1], dim=1)


class LatentGrid(nn.Module):
    """Quantization-aware training with the grid held (case A): a latent weight in code units, rounded with a straight-through
    gradient to the codes of the same scales and zeros. NormalFloat: latent in units of the absmax, rounded to the code book."""

    needs_base = False

    def __init__(self, stored: StoredWeight) -> None:
        super().__init__()
        if isinstance(stored.base, DenseWeight):
            raise ValueError("qat holds a grid; this base is dense: use full")
        self.stored = stored
        self.latent = nn.Parameter(self._start(stored.base))

    @staticmethod
    def _start(base: Base) -> Tensor:
        if isinstance(base, NormalFloatWeight):
            return normal_float.code_book(base.bits).to(base.codes.device)[base.codes_OI().int()]
        assert isinstance(base, UniformWeight | GgmlWeight)
        return base.codes_OI().float()

    def weights(self, base_OI: None, latent_OI: Tensor) -> Tensor:
        base, mask = self.stored.base, self.stored.mask_OI()
        rounded = self.rounded(latent_OI.detach())
        if isinstance(base, GgmlWeight):
            value = base.values(rounded)
        elif isinstance(base, UniformWeight):
            value = (rounded - spread(base.zeros_OG(), base)) * spread(base.scales.float(), base)
        else:
            assert isinstance(base, NormalFloatWeight)
            value = rounded * spread(base.absmax_OG(), base)
        return value if mask is None else value.where(mask, 0)

    def pull_back(self, base_OI: None, gradient_OI: Tensor) -> tuple[Tensor]:
        """Straight through the rounding, 0 where the latent lies beyond the grid, and under the mask."""
        base, mask, latent = self.stored.base, self.stored.mask_OI(), self.latent.detach()
        assert not isinstance(base, DenseWeight)
        low, high = (-1.0, 1.0) if isinstance(base, NormalFloatWeight) else (0.0, float((1 << base.bits) - 1))
        unit = spread(_units(base), base)
        inside = (latent >= low) & (latent <= high)
        return ((gradient_OI * unit).where(inside if mask is None else inside & mask, 0),)

    def rounded(self, latent_OI: Tensor) -> Tensor:
        base = self.stored.base
        if isinstance(base, UniformWeight | GgmlWeight):
            return latent_OI.round().clamp(0, (1 << base.bits) - 1)
        assert isinstance(base, NormalFloatWeight)
        return normal_float.code_book(base.bits).to(latent_OI.device)[_nearest_code(latent_OI, base.bits)]

    def fold(self, stored: StoredWeight) -> StoredWeight:
        base, latent = stored.base, self.latent.detach()
        if isinstance(base, UniformWeight | GgmlWeight):
            return replace(stored, base=replace(base, codes=pack_codes(self.rounded(latent).to(torch.int64), base.bits)))
        assert isinstance(base, NormalFloatWeight)
        return replace(stored, base=replace(base, codes=pack_codes(_nearest_code(latent, base.bits), base.bits)))

    def trainables(self) -> dict[str, Trainable]:
        return {"codes": Trainable(self.latent, "codes")}


def _nearest_code(values: Tensor, bits: int) -> Tensor:
    """int64 index of the nearest NormalFloat level."""
    book = normal_float.code_book(bits).to(values.device)
    return torch.bucketize(values, (book[1:] + book[:-1]) / 2)
