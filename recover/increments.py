"""Increments that end on the grid: ternary adapters (LoTA-QAF without its offset matrices) and low-rank weights inside the rounding (LR-QAT).

Both are `reweight`s of a uniform grid: codes change, with LR-QAT scales too, zeros stay, and no byte is added.
Legend: O out, I in, R rank.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..compress.packing import pack_codes
from ..compress.ranges import Open, Width
from ..compress.weights import StoredWeight, UniformWeight
from .scales import RelativeScales
from .site import AttachSite, joined, train_norms
from .trainable import Attached, Trainable
from .training_run import TrainConfig
from .whole_matrices import spread


@dataclass(frozen=True)
class Lota(TrainConfig):
    """LoTA-QAF's ternary adapters without its offset matrices, which would shift zero points. A code moves by ±1 where |up·down| (integers in −R…R) exceeds `threshold`·R."""

    rank: Width = 16
    threshold: Open = 0.2
    norms: bool = True


@dataclass(frozen=True)
class LrQat(TrainConfig):
    """`scales`: the grid's scales train with the low rank, as in the paper."""

    rank: Width = 16
    norms: bool = True
    scales: bool = True


class GridIncrement(nn.Module):
    """codes + increment(up·down), clamped to the grid, straight-through: LR-QAT (arXiv:2406.06385, eq. 5, with Φ0 the stored codes)
    rounds the sum, and moves the scales s0·(1 + δ) when they train; LoTA (arXiv:2505.18724, eq. 4) takes sign(ΔW) where |ΔW| > ω."""

    needs_base = False

    def __init__(self, stored: StoredWeight, rank: int, threshold: float | None, generator: torch.Generator, scales: bool = False) -> None:
        super().__init__()
        base = stored.base
        if not isinstance(base, UniformWeight):
            raise ValueError("increments on the grid need a uniform grid")
        rows, columns = stored.shape
        if not 0 < rank <= min(rows, columns):
            raise ValueError(f"rank {rank} does not fit a layer of {rows} × {columns}; choose 1…{min(rows, columns)}")
        down = torch.rand(rank, columns, generator=generator) * 2 - 1
        if threshold is not None:
            down = down.sign() * (down.abs() > 1 / 3)
        self.stored, self.base, self.omega = stored, base, None if threshold is None else threshold * rank
        device = base.codes.device
        self.up, self.down = nn.Parameter(torch.zeros(rows, rank, device=device)), nn.Parameter(down.to(device))
        self.scaling = 1.0 if threshold is not None else 1 / math.sqrt(rank)
        self.scales = RelativeScales(stored) if scales else None

    def codes(self, up_OR: Tensor, down_RI: Tensor) -> Tensor:
        """float32 [O, I], whole numbers on the grid."""
        product = (up_OR @ down_RI).mul_(self.scaling)
        step = product.round() if self.omega is None else product.sign() * (product.abs() > self.omega)
        return (self.base.codes_OI().float() + step).clamp_(0, (1 << self.base.bits) - 1)

    def weights(self, base_OI: None, up_OR: Tensor, down_RI: Tensor, delta_OG: Tensor | None = None) -> Tensor:
        value = self._at_start_scales(up_OR, down_RI)
        return value if self.scales is None or delta_OG is None else self.scales.weights(value, delta_OG)

    def _at_start_scales(self, up_OR: Tensor, down_RI: Tensor) -> Tensor:
        base, mask = self.base, self.stored.mask_OI()
        value = (self.codes(up_OR, down_RI) - spread(base.zeros_OG(), base)) * spread(base.scales.float(), base)
        return value if mask is None else value.where(mask, 0)

    def pull_back(self, base_OI: None, gradient_OI: Tensor) -> tuple[Tensor, ...]:
        """The gradient reaches the pair where the sum lies within the grid and the weight is kept; the scales everywhere."""
        up, down, base = self.up.detach(), self.down.detach(), self.base
        of_scales: tuple[Tensor, ...] = ()
        now = base.scales.float()
        if self.scales is not None:
            of_scales = self.scales.pull_back(self.weights(None, up, down, self.scales.delta.detach()), gradient_OI.float().clone())
            now = now * (1 + self.scales.delta.detach())
        gradient = gradient_OI.float() * spread(now, base) * self.scaling
        inside = base.codes_OI().float() + (up @ down).mul_(self.scaling)
        keep = (inside >= 0) & (inside <= (1 << base.bits) - 1)
        mask = self.stored.mask_OI()
        gradient = gradient.where(keep if mask is None else keep & mask, 0)
        return gradient @ down.T, up.T @ gradient, *of_scales

    def fold(self, stored: StoredWeight) -> StoredWeight:
        codes = self.codes(self.up.detach(), self.down.detach()).to(torch.int64)
        folded = replace(stored, base=replace(self.base, codes=pack_codes(codes, self.base.bits)))
        return folded if self.scales is None else self.scales.fold(folded)

    def trainables(self) -> dict[str, Trainable]:
        if self.omega is None:
            pair = {"increment_up": Trainable(self.up, "codes"), "increment_down": Trainable(self.down, "codes")}
            return pair if self.scales is None else pair | self.scales.trainables()
        return {f"ternary_{n}": Trainable(p, "ternary", rule="ternary") for n, p in (("up", self.up), ("down", self.down))}


def lota(site: AttachSite, config: Lota) -> Attached:
    return _increments(site, config.rank, config.threshold, config.norms)


def lr_qat(site: AttachSite, config: LrQat) -> Attached:
    return _increments(site, config.rank, None, config.norms, config.scales)


def _increments(site: AttachSite, rank: int, threshold: float | None, norms: bool, scales: bool = False) -> Attached:
    out: dict[str, Trainable] = {}
    for name, linear in site.linears.items():
        reweight = GridIncrement(linear.stored, rank, threshold, site.generator(name), scales)
        linear.reweight = reweight
        out |= {f"{name}.{key}": t for key, t in reweight.trainables().items()}
    return joined(Attached(out), train_norms(site)) if norms else Attached(out)
