"""New parameters around a compressed linear: low-rank pairs in their variants, magnitudes, pooled pairs, singular spectra.

Every one starts as the identity (step 0 equals the compressed model) and can `fold` into a StoredWeight where that is exact.
Legend: O out, I in, R rank, G groups, K kept singular values, T tokens.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..compress.weights import DenseWeight, GgmlWeight, LowRank, NormalFloatWeight, StoredWeight, UniformWeight
from .compressed_linear import CompressedLinear
from .scales import with_absmax
from .trainable import Trainable, through

LoraVariant = Literal["mask_lora", "scale_lora", "lora_prune"]


def start_factors(shape: tuple[int, int], rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """LoRA's start (arXiv:2106.09685): up 0 [O, R], down uniform with bound 1/√I (Kaiming, a = √5). ValueError beyond the layer."""
    rows, columns = shape
    if not 0 < rank <= min(shape):
        raise ValueError(f"rank {rank} does not fit a layer of {rows} × {columns}; choose 1…{min(shape)}")
    down = (torch.rand(rank, columns, generator=generator) * 2 - 1) / math.sqrt(columns)
    return torch.zeros(rows, rank), down


class MaskedLowRank(nn.Module):
    """PERP's retraining pairs on a pruned dense weight (arXiv:2312.15230, sec. 3.2): a reweight that merges exactly under the mask.

    mask_lora: W + s·(up·down) ⊙ M. scale_lora: W ⊙ (up·down), both from 1/√R. lora_prune: W + s·(up·down)
    while training, pruned at the merge (so a held-out evaluation, which sees the stored form, sees it pruned).
    """

    needs_base = True

    def __init__(self, stored: StoredWeight, rank: int, alpha: float, variant: LoraVariant, generator: torch.Generator) -> None:
        super().__init__()
        if not isinstance(stored.base, DenseWeight):
            raise ValueError(f"{variant} merges into dense weights; on a quantized base use lora")
        device = stored.base.weight.device
        up, down = start_factors(stored.shape, rank, generator)
        if variant == "scale_lora":
            up, down = torch.full_like(up, 1 / math.sqrt(rank)), torch.full_like(down, 1 / math.sqrt(rank))
        self.stored, self.variant, self.scaling, self.pruned = stored, variant, alpha / rank, False
        self.up, self.down = nn.Parameter(up.to(device)), nn.Parameter(down.to(device))

    def weights(self, base_OI: Tensor, up_OR: Tensor, down_RI: Tensor) -> Tensor:
        product = up_OR @ down_RI
        if self.variant == "scale_lora":
            return base_OI * product.to(base_OI.dtype)
        mask = self.stored.mask_OI()
        if mask is not None and (self.variant == "mask_lora" or self.pruned):
            product = product.where(mask, 0)
        return base_OI + self.scaling * product.to(base_OI.dtype)

    def fold(self, stored: StoredWeight) -> StoredWeight:
        assert isinstance(stored.base, DenseWeight)
        self.pruned = True
        weight = self.weights(stored.base_dense(), self.up.detach(), self.down.detach())
        return replace(stored, base=DenseWeight(weight.to(stored.base.weight.dtype)))

    def trainables(self) -> dict[str, Trainable]:
        return {"lora_up": Trainable(self.up, "factors"), "lora_down": Trainable(self.down, "factors")}


class Magnitude(nn.Module):
    """DoRA (arXiv:2402.09353, eq. 5–6, the norm taken as a constant in the gradient): each output row of W + up·down is rescaled to the
    magnitude m = ‖W‖·(1 + μ), and training starts at μ = 0. Folds into group scales (or absmax, or dense rows) and `up`, rounded as those are stored."""

    start: Tensor

    def __init__(self, linear: CompressedLinear) -> None:
        super().__init__()
        self.linear = (linear,)  # a tuple, so that the linear does not become its own grandchild
        start = self.row_norms()
        self.register_buffer("start", start)
        self.relative = nn.Parameter(torch.zeros_like(start))

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """float32 [O]."""
        linear = self.linear[0]
        weight = linear.stored.base_dense()
        if linear.stored.smooth is not None:
            weight = weight / linear.stored.smooth.float()
        if (pair := linear.pair()) is not None:
            weight = weight + pair[0] @ pair[1]
        return weight.norm(dim=1)

    def row_scale(self) -> Tensor:
        norms = self.row_norms()
        return torch.where(norms > 0, self.start / norms, 1) * (1 + self.relative)

    def forward(self, y_TO: Tensor) -> Tensor:
        return y_TO * self.row_scale().to(y_TO.dtype)

    def fold(self, stored: StoredWeight) -> StoredWeight:
        scale = self.row_scale().detach()
        return stored if bool((scale == 1).all()) else scale_rows(stored, scale)

    def trainables(self) -> dict[str, Trainable]:
        return {"magnitude": Trainable(self.relative, "magnitudes")}


def scale_rows(stored: StoredWeight, scale_O: Tensor) -> StoredWeight:
    """diag(scale)·W as a record: codes and mask as they are."""
    column, base = scale_O.unsqueeze(-1), stored.base
    if isinstance(base, UniformWeight):
        base = replace(base, scales=(base.scales.float() * column).to(base.scales.dtype))
    elif isinstance(base, NormalFloatWeight):
        base = with_absmax(base, base.absmax_OG() * column)
    elif isinstance(base, GgmlWeight):
        minima = None if base.super_minima is None else (base.super_minima.float() * column).half()
        base = replace(base, super_scales=(base.super_scales.float() * column).half(), super_minima=minima)
    else:
        base = DenseWeight((base.weight.float() * column).to(base.weight.dtype))
    low_rank, delta = stored.low_rank, stored.delta
    if low_rank is not None:
        up = low_rank.up
        scaled = (
            replace(up, scales=(up.scales.float() * column).to(up.scales.dtype))
            if isinstance(up, UniformWeight)
            else (up.float() * column).to(up.dtype)
        )
        low_rank = replace(low_rank, up=scaled)
    if delta is not None:
        rows = delta.index.long() // stored.shape[1]
        delta = replace(delta, values=(delta.values.float() * scale_O[rows]).to(delta.values.dtype))
    return replace(stored, base=base, low_rank=low_rank, delta=delta)


class PooledPair(nn.Module):
    """QA-LoRA (arXiv:2309.14717, sec. 3.3): a low-rank pair on the input summed within each group, up·down [O, G] added to every weight of
    the group. That is exactly a shift of the zero points, which become float32. Moves masked weights off 0: pruned models are refused."""

    def __init__(self, stored: StoredWeight, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        base = stored.base
        if not isinstance(base, UniformWeight) or stored.mask is not None:
            raise ValueError("qa_lora shifts zero points: it needs a uniform grid without a mask")
        up, down = start_factors((stored.shape[0], base.groups), min(rank, base.groups, stored.shape[0]), generator)
        self.groups, self.columns = base.groups, None if base.group_index is None else base.group_index.long()
        self.up, self.down = nn.Parameter(up.to(base.codes.device)), nn.Parameter(down.to(base.codes.device))

    def forward(self, raw_TI: Tensor, x_TI: Tensor) -> Tensor:
        tokens = x_TI.shape[0]
        if self.columns is None:
            pooled = x_TI.view(tokens, self.groups, -1).sum(-1)
        else:
            pooled = torch.zeros(tokens, self.groups, dtype=x_TI.dtype, device=x_TI.device).index_add(1, self.columns, x_TI)
        return (pooled @ self.down.to(pooled.dtype).T) @ self.up.to(pooled.dtype).T

    def fold(self, stored: StoredWeight) -> StoredWeight:
        shift, base = (self.up @ self.down).detach(), stored.base
        assert isinstance(base, UniformWeight)
        if not bool(shift.any()):
            return stored
        return replace(stored, base=replace(base, zeros=base.zeros_OG() - shift / base.scales.float()))

    def trainables(self) -> dict[str, Trainable]:
        return {"pooled_up": Trainable(self.up, "factors"), "pooled_down": Trainable(self.down, "factors")}


class Spectrum(nn.Module):
    """SVFT (arXiv:2405.19597): W + U·M·Vᵀ with U, V the leading singular vectors of the base and M sparse (diagonal, banded
    or random), from 0. M is in units of the mean singular value. U and V are frozen; the dense matrix is never rebuilt."""

    left: Tensor
    right: Tensor
    index: Tensor

    def __init__(self, weight_OI: Tensor, rank: int, pattern: str, width: int, generator: torch.Generator, storage: torch.dtype) -> None:
        super().__init__()
        left, values, right = torch.linalg.svd(weight_OI.float(), full_matrices=False)
        kept = min(rank, len(values)) if rank else len(values)
        self.register_buffer("left", through(storage)(left[:, :kept].contiguous()))
        self.register_buffer("right", through(storage)(right[:kept].contiguous()))
        self.register_buffer("index", _pattern(kept, pattern, width, generator).to(weight_OI.device))
        self.unit, self.kept, self.storage = float(values[:kept].mean()), kept, storage
        self.values = nn.Parameter(torch.zeros(len(self.index), device=weight_OI.device))
        self.as_stored = self.merges = False

    def middle(self) -> Tensor:
        """M [K, K]."""
        flat = torch.zeros(self.kept * self.kept, device=self.values.device)
        return (flat.index_add(0, self.index, self.values) * self.unit).view(self.kept, self.kept)

    def forward(self, raw_TI: Tensor, x_TI: Tensor) -> Tensor:
        dtype = raw_TI.dtype
        if self.as_stored:
            return (raw_TI @ self.right.to(dtype).T) @ through(self.storage)(self.left @ self.middle()).to(dtype).T
        return ((raw_TI @ self.right.to(dtype).T) @ self.middle().to(dtype).T) @ self.left.to(dtype).T

    def fold(self, stored: StoredWeight) -> StoredWeight:
        up = self.left @ self.middle().detach()
        if not bool(up.any()):
            return stored
        base = stored.base
        if isinstance(base, DenseWeight) and takes_dense(stored):
            return replace(stored, base=DenseWeight((base.weight.float() + up @ self.right).to(base.weight.dtype)))
        return add_low_rank(stored, up.to(self.storage), self.right.to(self.storage))

    def trainables(self) -> dict[str, Trainable]:
        return {"spectrum": Trainable(self.values, "spectrum")}


def takes_dense(stored: StoredWeight) -> bool:
    """Whether a term on the raw input may be added to the base itself: a dense one without mask, smoothing or activation rounding."""
    return isinstance(stored.base, DenseWeight) and stored.mask is None and stored.smooth is None and stored.activations is None


def _pattern(kept: int, pattern: str, width: int, generator: torch.Generator) -> Tensor:
    """Flat positions of M's trained entries in [K, K]."""
    rows, columns = torch.meshgrid(torch.arange(kept), torch.arange(kept), indexing="ij")
    if pattern == "plain":
        chosen = rows == columns
    elif pattern == "banded":
        chosen = (rows - columns).abs() <= width
    elif pattern == "random":
        chosen = (torch.rand(kept, kept, generator=generator) < width / kept) | (rows == columns)
    else:
        raise ValueError(f"svft pattern {pattern!r}; choose plain, banded or random")
    return chosen.view(-1).nonzero().squeeze(-1)


def add_low_rank(stored: StoredWeight, up_OR: Tensor, down_RI: Tensor) -> StoredWeight:
    """One more low-rank term, stacked onto an existing one. ValueError when that one is itself quantized."""
    old = stored.low_rank
    if old is None:
        return replace(stored, low_rank=LowRank(up_OR, down_RI))
    if isinstance(old.up, UniformWeight) or isinstance(old.down, UniformWeight):
        raise ValueError("the stored low-rank factors are quantized; a second term cannot be stacked onto them")
    up, down = torch.cat((old.up, up_OR.to(old.up.dtype)), 1), torch.cat((old.down, down_RI.to(old.down.dtype)), 0)
    return replace(stored, low_rank=LowRank(up, down))


def prune_ranks(linears: dict[str, CompressedLinear], keep: int) -> dict[str, int]:
    """Keep the `keep` most useful ranks over all low-rank pairs; returns the ranks left by name, 0 where a linear loses its pair.

    Each pair is first turned to its product's singular vectors, where dropping a rank changes the weight by its singular value and no
    choice of directions loses less (Eckart and Young); on white inputs that is the change of the output. Needs no data.
    """
    turned = {
        name: singular_pair(pair[0].detach(), pair[1].detach()) for name, linear in linears.items() if (pair := linear.pair()) is not None
    }
    if not turned:
        raise ValueError("no linear has low-rank factors to prune")
    ordered = torch.cat([values for _, values, _ in turned.values()]).sort(descending=True).values
    threshold, left = ordered[keep] if keep < len(ordered) else -torch.inf, {}
    for name, (up, values, down) in turned.items():
        linear, kept = linears[name], values > threshold
        left[name] = int(kept.sum())
        root = values[kept].sqrt()
        linear.stored = replace(linear.stored, low_rank=None)
        linear.up = linear.down = linear.up_scales = linear.down_scales = None
        if left[name]:
            linear.set_low_rank(up[:, kept] * root, root.unsqueeze(1) * down[kept])
    return left


def singular_pair(up_OR: Tensor, down_RI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U [O, R], singular values [R], Vᵀ [R, I]) of up·down, without forming it."""
    left, right = torch.linalg.qr(up_OR), torch.linalg.qr(down_RI.T)
    u, values, vh = torch.linalg.svd(left.R @ right.R.T)
    return left.Q @ u, values, vh @ right.Q.T
