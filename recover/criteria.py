"""Which weights to train when only few may: smallest magnitude, Fisher information, second-order saliency; by weight, channel or layer.

Takes scores, gives flat positions; only kept weights (under the mask) can be chosen. Legend: O out, I in, N chosen.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .compressed_linear import CompressedLinear
from .site import AttachSite, Gradients
from .student import Batch

Criterion = Literal["magnitude", "fisher", "saliency"]
By = Literal["weight", "channel", "layer"]
Quota = Literal["global", "matrix"]


def smallest_magnitude(weight_OI: Tensor) -> Tensor:
    """PaFi (arXiv:2305.16742): the smaller |w|, the higher the score."""
    return -weight_OI.abs()


def saliency(weight_OI: Tensor, fisher_OI: Tensor) -> Tensor:
    """Optimal Brain Damage's ½·h·w² with the Fisher diagonal for h: what removing the weight would cost."""
    return 0.5 * fisher_OI * weight_OI.square()


def choose(
    scores: Mapping[str, Tensor], kept: Mapping[str, Tensor | None], share: float, quota: Quota = "global", by: By = "weight"
) -> dict[str, Tensor]:
    """Flat positions int64 [N] by name of the best `share` of all weights (at least one per quota); matrices without any are left out.

    by "channel": whole output rows by their mean score; "layer": whole matrices. ValueError when the share is none of (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share {share} of weights to train must lie in (0, 1]")
    if by == "layer":
        return _whole_matrices(scores, kept, share)
    ranked = {name: _masked(_by_row(s) if by == "channel" else s, kept[name]) for name, s in scores.items()}
    pick = _best if by == "weight" else _reaching
    if quota == "matrix":
        result = {name: pick(s.reshape(-1), max(1, round(share * s.numel()))) for name, s in ranked.items()}
    else:
        sizes = [s.numel() for s in ranked.values()]
        flat = torch.cat([s.reshape(-1) for s in ranked.values()])
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        chosen[pick(flat, max(1, round(share * len(flat))))] = True
        result = {name: part.nonzero().squeeze(-1) for name, part in zip(ranked, chosen.split(sizes), strict=True)}
    return {name: index for name, index in result.items() if len(index)}


def _by_row(score_OI: Tensor) -> Tensor:
    return score_OI.mean(1, keepdim=True).expand_as(score_OI)


def _masked(score_OI: Tensor, kept_OI: Tensor | None) -> Tensor:
    return score_OI if kept_OI is None else score_OI.masked_fill(~kept_OI, -torch.inf)


def _best(score_N: Tensor, count: int) -> Tensor:
    """Positions, in order, of exactly `count` best scores, fewer where fewer are above −∞. Of scores that are equal at the border (most are,
    on a grid) a fixed shuffle chooses: the first ones would all lie in the first rows."""
    count = min(count, int((score_N > -torch.inf).sum()))
    if not count:
        return torch.zeros(0, dtype=torch.int64, device=score_N.device)
    border = score_N.topk(count).values[-1]
    above, tied = (score_N > border).nonzero().squeeze(-1), (score_N == border).nonzero().squeeze(-1)
    drawn = torch.randperm(len(tied), generator=torch.Generator().manual_seed(0))[: count - len(above)]
    return torch.cat((above, tied[drawn.to(tied.device)])).sort().values


def _reaching(score_N: Tensor, count: int) -> Tensor:
    """Positions whose score is at least the `count`-th best: with a score shared by a row, the whole of the row that completes the count."""
    border = score_N.topk(min(count, len(score_N))).values[-1]
    return ((score_N >= border) & (score_N > -torch.inf)).nonzero().squeeze(-1)


def _whole_matrices(scores: Mapping[str, Tensor], kept: Mapping[str, Tensor | None], share: float) -> dict[str, Tensor]:
    left = share * sum(s.numel() for s in scores.values())
    out: dict[str, Tensor] = {}
    for name in sorted(scores, key=lambda n: -float(scores[n].mean())):
        size = scores[name].numel()
        if size <= left or not out:
            mask = kept[name]
            everything = torch.arange(size, device=scores[name].device)
            out[name] = everything if mask is None else mask.view(-1).nonzero().squeeze(-1)
            left -= size
    return out


class SquaredGradients(nn.Module):
    """A reweight that changes nothing and sums the squared gradients of its weight, float32 [O, I]."""

    needs_base = True

    def __init__(self, linear: CompressedLinear) -> None:
        super().__init__()
        device = linear.device
        self.probe = nn.Parameter(torch.zeros(1, device=device))
        self.total = torch.zeros(linear.stored.shape, device=device)

    def weights(self, base_OI: Tensor, probe_1: Tensor) -> Tensor:
        return base_OI

    def pull_back(self, base_OI: Tensor, gradient_OI: Tensor) -> tuple[Tensor]:
        self.total += gradient_OI.float().square()
        return (torch.zeros_like(self.probe),)


def fisher_diagonal(linears: Mapping[str, CompressedLinear], gradients: Gradients, samples: int, first_batch: int = 0) -> dict[str, Tensor]:
    """Empirical Fisher diagonal (FishMask, arXiv:2111.09839, eq. 5, labels from the text): mean over `samples` sequences of the squared
    gradient of each weight, float32 [O, I]. One dense matrix a linear is held."""
    held = {name: linear.reweight for name, linear in linears.items()}
    if any(h is not None for h in held.values()):
        raise ValueError("Fisher information is taken before another method changes the weight")
    for linear in linears.values():
        linear.reweight = SquaredGradients(linear)
    try:
        seen, index = 0, first_batch
        while seen < samples:
            for row in _rows(gradients.batch(index)):
                if seen < samples:
                    torch.autograd.backward(gradients.loss(row))
                    seen += 1
            index += 1
        return {name: linear.reweight.total / seen for name, linear in linears.items()}
    finally:
        for name, linear in linears.items():
            linear.reweight = held[name]


def _rows(batch: Batch) -> list[Batch]:
    masks: object = [None] * len(batch.ids) if batch.loss_mask is None else batch.loss_mask.split(1)
    return [Batch(ids, mask) for ids, mask in zip(batch.ids.split(1), masks, strict=True)]


@dataclass(frozen=True)
class Selection:
    criterion: Criterion
    share: float
    quota: Quota = "global"
    by: By = "weight"
    samples: int = 128


def select(site: AttachSite, selection: Selection) -> dict[str, Tensor]:
    """Positions by name for a criterion. ValueError when it reads gradients and the site has none."""
    kept = {name: linear.stored.mask_OI() for name, linear in site.linears.items()}
    weights = {name: linear.stored.base_dense() for name, linear in site.linears.items()}
    if selection.criterion == "magnitude":
        return choose({name: smallest_magnitude(w) for name, w in weights.items()}, kept, selection.share, selection.quota, selection.by)
    if site.gradients is None:
        raise ValueError(f"criterion {selection.criterion} reads gradients: pass `gradients`")
    scores = fisher_diagonal(site.linears, site.gradients, selection.samples)
    if selection.criterion == "saliency":
        scores = {name: saliency(weights[name], f) for name, f in scores.items()}
    return choose(scores, kept, selection.share, selection.quota, selection.by)
