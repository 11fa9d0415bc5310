"""Non-uniform sparsity: one mean distributed over layers by depth, or by how many outliers they hold (OWL, arXiv:2310.05175).

Pure functions from numbers to numbers, one per layer, which in OWL is a decoder block; who calls them gives each matrix its own `sparsity`.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_HIGHEST = 0.99
SPREAD = {"depth": 0.1, "outliers": 0.08}
"""Defaults where no spread is set; 0.08 is OWL's λ."""


def outlier_share(matrices: Iterable[tuple[Tensor, Tensor]], multiple: float = 5.0) -> float:
    """Share of a layer's entries whose |w|·‖x‖ exceeds `multiple` times their mean over the layer (OWL, eq. 2). A layer is any number
    of matrices, each float [O, I] with the norms of its inputs, float [I]."""
    scores = [weight_OI.abs() * norm_I for weight_OI, norm_I in matrices]
    count = sum(score.numel() for score in scores)
    mean = sum(score.double().sum().item() for score in scores) / count
    return sum(int((score > multiple * mean).sum()) for score in scores) / count


def by_outliers(
    outlier_shares: Sequence[float], mean: float, spread: float = SPREAD["outliers"], sizes: Sequence[int] | None = None
) -> list[float]:
    """Sparsity per layer: the more outliers, the fewer weights go; values lie within `spread` of the mean before it is restored.

    outlier_shares are scaled to [0, 2·spread] as in OWL; `sizes` (weights per layer) say what the mean is taken over.
    """
    low, high = min(outlier_shares), max(outlier_shares)
    scaled = [0.0 if high == low else (share - low) / (high - low) * 2 * spread for share in outlier_shares]
    return hold_mean([-value for value in scaled], mean, sizes)


def by_depth(layers: int, mean: float, spread: float = SPREAD["depth"], sizes: Sequence[int] | None = None) -> list[float]:
    """Sparsity per layer, rising linearly from mean − spread at the first to mean + spread at the last."""
    steps = [0.0 if layers == 1 else spread * (2 * i / (layers - 1) - 1) for i in range(layers)]
    return hold_mean(steps, mean, sizes)


def hold_mean(offsets: Sequence[float], mean: float, sizes: Sequence[int] | None = None) -> list[float]:
    """offset + c per layer, cut to [0, 0.99], with the c that makes the mean over all weights exactly `mean`."""
    if not offsets or (sizes is not None and len(sizes) != len(offsets)):
        raise ValueError(f"{len(offsets)} layers and {0 if sizes is None else len(sizes)} sizes; give one size per layer, at least one")
    if not 0.0 <= mean <= _HIGHEST:
        raise ValueError(f"mean sparsity {mean} must lie in [0, {_HIGHEST}]")
    weight = torch.ones(len(offsets), dtype=torch.float64) if sizes is None else torch.tensor(sizes, dtype=torch.float64)
    weight, offset = weight / weight.sum(), torch.tensor(offsets, dtype=torch.float64)
    low, high = -offset.max().item(), _HIGHEST - offset.min().item()
    for _ in range(100):  # the mean rises with c: bisection to the last bit
        middle = (low + high) / 2
        below = ((offset + middle).clamp(0, _HIGHEST) * weight).sum().item() < mean
        low, high = (middle, high) if below else (low, middle)
    return (offset + high).clamp(0, _HIGHEST).tolist()


def whole_columns(sparsities: Sequence[float], shapes: Sequence[tuple[int, int]]) -> list[float]:
    """The sparsity of each [O, I] matrix moved to a whole number of weights per row, what that adds or takes made up for by the matrices
    after it: in total they drop what was requested, to half a column of the last."""
    out, owed = [], 0.0
    for sparsity, (rows, columns) in zip(sparsities, shapes, strict=True):
        owed += sparsity * rows * columns
        dropped = min(max(round(owed / rows), 0), columns - 1)
        owed -= dropped * rows
        out.append(dropped / columns)
    return out
