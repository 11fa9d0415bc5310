"""Uniform grids: fit scale and zero of a group, round to it, come back.

Knows tensors only. Zeros are integers in 1…2^bits − 1: a 0 would not survive the GPTQ v1 format; on a grid with `float_zeros`
they are float16 numbers, and 0 itself need not be on the grid. Every function takes any number of leading dimensions; the last one runs along a group.
Legend: O rows, S columns of one group, G groups, I in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .weights import UniformWeight

Clip = Literal["none", "power", "hessian", "joint"]
_WEIGHTED = frozenset({"hessian", "joint"})
STEPS, FLOOR = 20, 0.5
_CHUNK = 1 << 18  # elements whose temporaries stay in cache while many clip ratios are tried


def divide(in_features: int, size: int, name: str = "group_size") -> int:
    """Columns per group (−1: all). ValueError, with the sizes that would do, when it does not divide."""
    columns = in_features if size == -1 else size
    if columns <= 0 or in_features % columns:
        divisors = [d for d in range(8, in_features + 1) if in_features % d == 0]
        row = " or -1" if name == "group_size" else ""
        raise ValueError(f"in_features {in_features} is not a multiple of {name} {size}; choose one of {divisors}{row}")
    return columns


def clip_needs(clip: str) -> frozenset[str]:
    """The statistics of the inputs that a grid search weighs errors by."""
    return frozenset({"norms"}) if clip in _WEIGHTED else frozenset()


def check_zeros(symmetric: bool, float_zeros: bool) -> None:
    """ValueError where they cannot be true together."""
    if symmetric and float_zeros:
        raise ValueError("a symmetric grid stores no zero points: set symmetric: false or float_zeros: false")


@dataclass(frozen=True)
class UniformGrid:
    """`group_size` −1 means one group per row; float_zeros: 16 bits a zero point instead of `bits`."""

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    float_zeros: bool = False

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    def size(self, in_features: int) -> int:
        """Columns per group. ValueError, with the sizes that would do, when it does not divide."""
        return divide(in_features, self.group_size)


def min_max(weight_OS: Tensor, grid: UniformGrid, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """(scale, zero), both float32 [O, 1], of the grid that spans `shrink` times the group's range."""
    low, high = weight_OS.amin(-1, keepdim=True).clamp_(max=0), weight_OS.amax(-1, keepdim=True).clamp_(min=0)
    return _span(low, high, grid, shrink)


def round_to_grid(weight_OS: Tensor, scale_O1: Tensor, zero_O1: Tensor, grid: UniformGrid) -> Tensor:
    """Nearest codes, float32 holding integers in 0…2^bits − 1."""
    if grid.float_zeros:
        return (weight_OS / scale_O1).add_(zero_O1).round_().clamp_(0, grid.top)
    return (weight_OS / scale_O1).round_().add_(zero_O1).clamp_(0, grid.top)


def search_clip(
    weight_OS: Tensor,
    grid: UniformGrid,
    importance_S: Tensor | None = None,
    steps: int = STEPS,
    floor: float = FLOOR,
    power: float = 2.4,
) -> tuple[Tensor, Tensor]:
    """Shrink the range from 1 down to `floor` and keep, per group, what errs least: Σ importance·|Δ|^power.

    importance broadcasts against the weight. All groups are searched at once, in chunks of rows that fit the cache.
    """
    return _in_chunks(weight_OS, lambda part: _shrunk(_Search(part, grid, importance_S, power), steps, floor))


def search_joint(weight_OS: Tensor, grid: UniformGrid, importance_S: Tensor | None = None, rounds: int = 3) -> tuple[Tensor, Tensor]:
    """Scale and zero that together err least, Σ importance·Δ²: clipped ranges, each with its zero point moved either way; then, from
    the best of these, zero and scale in turn.

    An integer zero tries its neighbours, each with the scale that is best for the levels it gives; a float zero is solved with the
    scale for the codes as they are (two unknowns, weighted least squares). Every candidate is rounded as it will be stored and
    measured; the best stays, so that no group is left worse than by `search_clip`.
    """
    return _in_chunks(weight_OS, lambda part: _joint(_Search(part, grid, importance_S, 2.0), rounds))


def fit(weight_OS: Tensor, grid: UniformGrid, clip: Clip, importance_S: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(scale, zero) float32 [O, 1] by the named search: min-max, ‖Δ‖^2.4 (GPTQ's code), or Σ importance·Δ² with the
    diagonal of the inputs' second moment as the importance, over clipped ranges (hessian) or over scale and zero (joint)."""
    if clip == "none":
        return min_max(weight_OS, grid)
    if clip == "power":
        return search_clip(weight_OS, grid)
    if importance_S is None:
        raise ValueError(f"clip {clip!r} needs the second moment's diagonal")
    return search_clip(weight_OS, grid, importance_S, power=2.0) if clip == "hessian" else search_joint(weight_OS, grid, importance_S)


def to_record(
    codes_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor, grid: UniformGrid, group_index_I: Tensor | None = None
) -> UniformWeight:
    """The stored form: scales in float16, zeros packed (none when symmetric) or, with float zeros, in float16."""
    zeros = None if grid.symmetric else zeros_OG.half() if grid.float_zeros else zeros_OG.to(torch.int64)
    size = grid.size(codes_OI.shape[1])
    return UniformWeight.from_codes(codes_OI.to(torch.int64), scales_OG.half(), zeros, grid.bits, size, group_index_I)


class _Search:
    """The best (scale, zero) of every group so far, and the room in which candidates are measured."""

    def __init__(self, weight_OS: Tensor, grid: UniformGrid, importance_S: Tensor | None, power: float) -> None:
        self.weight_OS, self.grid, self.importance_S, self.power = weight_OS, grid, importance_S, power
        self.low, self.high = weight_OS.amin(-1, keepdim=True).clamp_(max=0), weight_OS.amax(-1, keepdim=True).clamp_(min=0)
        self.levels, self.error = torch.empty_like(weight_OS), torch.empty_like(weight_OS)
        self.scale, self.zero = _span(self.low, self.high, grid, 1.0)
        self.least = torch.full_like(self.scale, float("inf"))

    def round(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Levels (code − zero) of every weight, in `self.levels`."""
        torch.div(self.weight_OS, scale, out=self.levels)
        if self.grid.float_zeros:
            return self.levels.add_(zero).round_().clamp_(0, self.grid.top).sub_(zero)
        return torch.clamp(self.levels.round_(), -zero, self.grid.top - zero, out=self.levels)

    def consider(self, scale: Tensor, zero: Tensor) -> None:
        """Measure a candidate per group and keep it where it errs less."""
        torch.addcmul(self.weight_OS, self.round(scale, zero), scale, value=-1, out=self.error)
        lost = self.error.square_() if self.power == 2.0 else self.error.abs_().pow_(self.power)
        lost = (lost if self.importance_S is None else lost.mul_(self.importance_S)).sum(-1, keepdim=True)
        better = lost < self.least
        self.least = lost.where(better, self.least)
        self.scale, self.zero = scale.where(better, self.scale), zero.where(better, self.zero)

    def weighted_sum(self, *factors: Tensor) -> Tensor:
        """Σ importance·product over each group, float32 [O, 1]."""
        product = self.error.copy_(factors[0])
        for factor in factors[1:]:
            product.mul_(factor)
        return (product if self.importance_S is None else product.mul_(self.importance_S)).sum(-1, keepdim=True)


def _in_chunks(weight_OS: Tensor, search: Callable[[Tensor], _Search]) -> tuple[Tensor, Tensor]:
    rows = max(1, _CHUNK // max(weight_OS[0].numel(), 1))
    parts = [search(part) for part in weight_OS.split(rows)]
    return torch.cat([part.scale for part in parts]), torch.cat([part.zero for part in parts])


def _shrunk(search: _Search, steps: int, floor: float, offsets: tuple[float, ...] = (0.0,)) -> _Search:
    for shrink in torch.linspace(1.0, floor, steps).tolist():
        scale, zero = _span(search.low, search.high, search.grid, shrink)
        for offset in offsets:
            search.consider(scale, zero + offset if search.grid.float_zeros else (zero + offset).clamp(1, search.grid.top))
    return search


def _joint(search: _Search, rounds: int) -> _Search:
    grid = search.grid
    offsets = (0.0,) if grid.symmetric else (0.0, -0.5, 0.5) if grid.float_zeros else (0.0, -1.0, 1.0)
    _shrunk(search, STEPS, FLOOR, offsets)
    for _ in range(rounds):
        if grid.float_zeros:
            search.consider(*_solved(search))
            continue
        zero = search.zero
        for offset in offsets:
            moved = (zero + offset).clamp(1, grid.top)
            levels = search.round(search.scale, moved)
            best = search.weighted_sum(levels, search.weight_OS) / search.weighted_sum(levels, levels)
            search.consider(_storable(best.where(best > 0, search.scale)), moved)
    return search


def _solved(search: _Search) -> tuple[Tensor, Tensor]:
    """Scale and float zero of the weighted least squares w ≈ scale·code − scale·zero, for the codes of the best so far."""
    levels, weight = search.round(search.scale, search.zero), search.weight_OS
    one = torch.ones((), dtype=weight.dtype, device=weight.device).expand_as(weight)
    mass, n, w = (search.weighted_sum(x).clone() for x in (one, levels, weight))
    nn, nw = search.weighted_sum(levels, levels), search.weighted_sum(levels, weight)
    scale = (mass * nw - n * w) / (mass * nn - n * n)
    usable = torch.isfinite(scale) & (scale > 0)
    scale = _storable(scale.where(usable, search.scale))
    moved = search.zero + (n - w / scale) / mass
    top = float(search.grid.top)
    return scale, moved.where(usable & torch.isfinite(moved), search.zero).clamp(-top, 2 * top).half().float()


def _span(low: Tensor, high: Tensor, grid: UniformGrid, shrink: float) -> tuple[Tensor, Tensor]:
    """The grid over [low, high]·shrink, low ≤ 0 ≤ high."""
    if grid.float_zeros:
        scale = _storable((high - low) * (shrink / grid.top))
        return scale, (low * -shrink / scale).clamp(0, grid.top).half().float()
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
