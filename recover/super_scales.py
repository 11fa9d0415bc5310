"""Training the two numbers of every super-block of a ggml type, d and m; codes and small codes stay.

d = d0·(1 + δ), m = m0·(1 + ζ), each rounded to the float16 that a GGUF file holds. Legend: O out, I in, B super-blocks of a row, G groups.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..compress.weights import GgmlWeight, StoredWeight
from .scales import HALF_MAX, HALF_TINY
from .trainable import Limits, Trainable


class SuperScales(nn.Module):
    """W = W0·(1 + δ) + M0·(δ − ζ), M0 what the minima take off: δ [O, B] moves d, ζ [O, B] (of a type with minima only) moves m."""

    needs_base, sums_gradient = True, True

    def __init__(self, stored: StoredWeight) -> None:
        super().__init__()
        base = stored.base
        if not isinstance(base, GgmlWeight):
            raise ValueError(f"a {type(base).__name__} has no super-blocks")
        self.stored, self.start = stored, base
        self.delta = nn.Parameter(torch.zeros(base.super_scales.shape, device=base.codes.device))
        self.zeta = None if base.super_minima is None else nn.Parameter(torch.zeros_like(self.delta))

    def weights(self, base_OI: Tensor, delta_OB: Tensor, zeta_OB: Tensor | None = None) -> Tensor:
        moved_OI = self._by_group(base_OI) * (1 + self.start.spread(delta_OB)).to(base_OI.dtype).unsqueeze(-1)
        if zeta_OB is not None:
            offset_OG = self._minima() * self.start.spread(delta_OB - zeta_OB)
            moved_OI = moved_OI + self._kept(offset_OG.to(base_OI.dtype).unsqueeze(-1).expand_as(moved_OI))
        return moved_OI.view(base_OI.shape)

    def pull_back(self, weight_OI: Tensor, gradient_OI: Tensor) -> tuple[Tensor, ...]:
        """Gradients of (δ[, ζ]): dδ = Σ dW·(W0 + M0), dζ = −Σ dW·M0, over a super-block, W0 = (W − M0·(δ − ζ)) / (1 + δ). `gradient_OI` is
        used up."""
        factor_OG = 1 + self.start.spread(self.delta.detach())
        if self.zeta is None:
            return (self._over_blocks(self._by_group(gradient_OI.mul_(weight_OI)).float().sum(-1) / factor_OG),)
        minima_OG = self._minima() * self._kept(self._by_group(gradient_OI)).float().sum(-1)
        moved_OG = self._by_group(gradient_OI.mul_(weight_OI)).float().sum(-1)
        start_OG = (moved_OG - minima_OG * self.start.spread((self.delta - self.zeta).detach())) / factor_OG
        return self._over_blocks(start_OG + minima_OG), -self._over_blocks(minima_OG)

    def fold(self, stored: StoredWeight) -> StoredWeight:
        """The record with the trained d and m in float16. ValueError where it cannot hold them."""
        base, values = stored.base, dict[str, Tensor]()
        assert isinstance(base, GgmlWeight)
        for name, start, move in self._pairs():
            if bool(move.detach().any()):
                wrong = _problem(_extremes(start, move.detach()).tolist())
                if wrong:
                    raise ValueError(f"the trained {name} cannot be stored as float16: {wrong}")
                values[name] = (start.float() * (1 + move.detach())).half()
        return replace(stored, base=replace(base, **values))

    def trainables(self) -> dict[str, Trainable]:
        out: dict[str, Trainable] = {}
        for (_, start, move), name in zip(self._pairs(), ("scales", "minima"), strict=False):
            move.requires_grad_(True)
            out[name] = Trainable(move, "scales", partial(_as_stored, start), limits=Limits(4, partial(_extremes, start), _problem))
        return out

    def _pairs(self) -> list[tuple[str, Tensor, nn.Parameter]]:
        pairs = [("super_scales", self.start.super_scales, self.delta)]
        if self.zeta is not None and self.start.super_minima is not None:
            pairs.append(("super_minima", self.start.super_minima, self.zeta))
        return pairs

    def _minima(self) -> Tensor:
        minima_OG = self.start.minima_OG()
        assert minima_OG is not None
        return minima_OG

    def _by_group(self, matrix_OI: Tensor) -> Tensor:
        return matrix_OI.view(len(matrix_OI), self.start.groups, -1)

    def _kept(self, matrix_OGS: Tensor) -> Tensor:
        mask = self.stored.mask_OI()
        return matrix_OGS if mask is None else matrix_OGS.where(self._by_group(mask), 0)

    def _over_blocks(self, groups_OG: Tensor) -> Tensor:
        return groups_OG.view(*self.delta.shape, -1).sum(-1)


def _as_stored(start_OB: Tensor, move_OB: Tensor) -> Tensor:
    """The relative move that reads back from float16."""
    start = start_OB.float()
    return torch.where(start == 0, 0, (start * (1 + move_OB)).half().float() / start.where(start != 0, 1) - 1)


def _extremes(start_OB: Tensor, move_OB: Tensor) -> Tensor:
    """float32 [4]: least and greatest factor, least and greatest size of a value that was not 0."""
    start, factor = start_OB.float(), 1 + move_OB
    none, size = start == 0, (start * factor).abs()
    return torch.stack([*factor.aminmax(), size.masked_fill(none, math.inf).amin(), size.masked_fill(none, 0).amax()])


def _problem(extremes: Sequence[float]) -> str | None:
    """What is wrong with trained values: not finite, turned round, or beyond float16."""
    least, greatest, smallest, largest = extremes
    if not (math.isfinite(least) and math.isfinite(greatest)):
        return "a value is not finite"
    if least <= 0:
        return f"a value went to {least:.3g} times its start"
    if largest > HALF_MAX or smallest < HALF_TINY / 2:
        return f"values run from {smallest:.3g} to {largest:.3g}; float16 holds {HALF_TINY:.3g} to {HALF_MAX:.0f}"
    return None
