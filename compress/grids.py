"""Uniform grids: fit scale and zero of a group, round to it, come back.

Knows tensors only. Zeros are integers in 1…2^bits − 1: a 0 would not survive the GPTQ v1 format.
Every function takes any number of leading dimensions; the last one runs along a group.
Legend: O rows, S columns of one group, G groups, I in.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .packing import BITS
from .weights import UniformWeight

Clip = Literal["none", "power", "hessian"]
_CHUNK = 1 << 18  # elements whose temporaries stay in cache while many clip ratios are tried


def divide(in_features: int, size: int, name: str = "group_size") -> int:
    """Columns per group (−1: all). ValueError, with the sizes that would do, when it does not divide."""
    columns = in_features if size == -1 else size
    if columns <= 0 or in_features % columns:
        divisors = [d for d in range(8, in_features + 1) if in_features % d == 0]
        raise ValueError(f"in_features {in_features} is not a multiple of {name} {size}; choose one of {divisors} or -1")
    return columns


def check_grid(bits: int, group_size: int, clip: str) -> None:
    """ValueError for what no matrix could use."""
    if bits not in BITS:
        raise ValueError(f"bits {bits} is not supported; choose one of {BITS}")
    if group_size != -1 and group_size < 1:
        raise ValueError(f"group_size {group_size} must be positive, or -1 for one group per row")
    if clip not in get_args(Clip):
        raise ValueError(f"clip {clip!r} is unknown; choose one of {get_args(Clip)}")


@dataclass(frozen=True)
class UniformGrid:
    """`group_size` −1 means one group per row."""

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    def size(self, in_features: int) -> int:
        """Columns per group. ValueError, with the sizes that would do, when it does not divide."""
        return divide(in_features, self.group_size)


def min_max(weight_OS: Tensor, grid: UniformGrid, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """(scale, zero), both float32 [O, 1], of the grid that spans `shrink` times the group's range; zero holds integers."""
    low, high = weight_OS.amin(-1, keepdim=True).clamp_(max=0), weight_OS.amax(-1, keepdim=True).clamp_(min=0)
    return _span(low, high, grid, shrink)


def round_to_grid(weight_OS: Tensor, scale_O1: Tensor, zero_O1: Tensor, grid: UniformGrid) -> Tensor:
    """Nearest codes, float32 holding integers in 0…2^bits − 1."""
    return (weight_OS / scale_O1).round_().add_(zero_O1).clamp_(0, grid.top)


def on_grid(codes_OS: Tensor, scale_O1: Tensor, zero_O1: Tensor) -> Tensor:
    return (codes_OS - zero_O1) * scale_O1


def search_clip(
    weight_OS: Tensor,
    grid: UniformGrid,
    importance_S: Tensor | None = None,
    steps: int = 20,
    floor: float = 0.5,
    power: float = 2.4,
) -> tuple[Tensor, Tensor]:
    """Shrink the range from 1 down to `floor` and keep, per group, what errs least: Σ importance·|Δ|^power.

    importance broadcasts against the weight. All groups are searched at once, in chunks of rows that fit the cache.
    """
    rows = max(1, _CHUNK // max(weight_OS[0].numel(), 1))
    parts = [_search(part, grid, importance_S, steps, floor, power) for part in weight_OS.split(rows)]
    return torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts])


def fit(weight_OS: Tensor, grid: UniformGrid, clip: Clip, importance_S: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(scale, zero) float32 [O, 1] by the named search: min-max, ‖Δ‖^2.4 (GPTQ's code), or Σ importance·Δ² with the
    diagonal of the inputs' second moment as the importance."""
    if clip == "none":
        return min_max(weight_OS, grid)
    if clip == "power":
        return search_clip(weight_OS, grid)
    if importance_S is None:
        raise ValueError("clip 'hessian' needs the second moment's diagonal")
    return search_clip(weight_OS, grid, importance_S, power=2.0)


def to_record(
    codes_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor, grid: UniformGrid, group_index_I: Tensor | None = None
) -> UniformWeight:
    """The stored form: scales in float16, zeros packed (none when symmetric)."""
    zeros = None if grid.symmetric else zeros_OG.to(torch.int64)
    size = grid.size(codes_OI.shape[1])
    return UniformWeight.from_codes(codes_OI.to(torch.int64), scales_OG.half(), zeros, grid.bits, size, group_index_I)


def _search(
    weight_OS: Tensor, grid: UniformGrid, importance_S: Tensor | None, steps: int, floor: float, power: float
) -> tuple[Tensor, Tensor]:
    low, high = weight_OS.amin(-1, keepdim=True).clamp_(max=0), weight_OS.amax(-1, keepdim=True).clamp_(min=0)
    best_scale, best_zero = _span(low, high, grid, 1.0)
    best = torch.full_like(best_scale, float("inf"))
    levels, error = torch.empty_like(weight_OS), torch.empty_like(weight_OS)
    for shrink in torch.linspace(1.0, floor, steps).tolist():
        scale, zero = _span(low, high, grid, shrink)
        torch.div(weight_OS, scale, out=levels)
        torch.clamp(levels.round_(), -zero, grid.top - zero, out=levels)
        torch.addcmul(weight_OS, levels, scale, value=-1, out=error)
        lost = error.square_() if power == 2.0 else error.abs_().pow_(power)
        lost = (lost if importance_S is None else lost.mul_(importance_S)).sum(-1, keepdim=True)
        better = lost < best
        best, best_scale, best_zero = lost.where(better, best), scale.where(better, best_scale), zero.where(better, best_zero)
    return best_scale, best_zero


def _span(low: Tensor, high: Tensor, grid: UniformGrid, shrink: float) -> tuple[Tensor, Tensor]:
    """The grid over [low, high]·shrink, low ≤ 0 ≤ high."""
    if grid.symmetric:
        scale = _storable(torch.maximum(high, -low) * (2 * shrink / grid.top))
        return scale, torch.full_like(scale, 1 << (grid.bits - 1))
    scale = _storable((high - low) * (shrink / grid.top))
    zero = (low * -shrink / scale).round_()
    # A group without negative values gives code 0 away and spreads the others over its whole range.
    one_sided = zero < 1
    scale = _storable(high * (shrink / (grid.top - 1))).where(one_sided, scale)
    return scale, zero.clamp_(1, grid.top)


def _storable(scale: Tensor) -> Tensor:
    """Round to the float16 that will be stored, so that codes are chosen for the scale that the reader sees; never 0."""
    return scale.clamp(2.0**-20, 65504.0).half().float()
