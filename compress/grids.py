"""Uniform grids: fit scale and zero of a group, round to it, come back.

Knows tensors only. Zeros are integers in 1…2^bits − 1: a 0 would not survive the GPTQ v1 format, and one unused code of an
all-positive group costs nothing measurable.
Legend: O rows, S columns of one group, G groups, I in.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .weights import UniformWeight


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
        size = in_features if self.group_size == -1 else self.group_size
        if size <= 0 or in_features % size:
            divisors = [d for d in range(8, in_features + 1) if in_features % d == 0]
            raise ValueError(f"in_features {in_features} is not a multiple of group_size {self.group_size}; choose one of {divisors} or -1")
        return size


def min_max(weight_OS: Tensor, grid: UniformGrid, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """(scale, zero), both float32 [O, 1], of the grid that spans `shrink` times the group's range; zero holds integers."""
    low, high = weight_OS.amin(-1, keepdim=True).clamp(max=0) * shrink, weight_OS.amax(-1, keepdim=True).clamp(min=0) * shrink
    if grid.symmetric:
        scale = 2 * torch.maximum(high, -low) / grid.top
        return _storable(scale), torch.full_like(scale, 1 << (grid.bits - 1))
    scale = _storable((high - low) / grid.top)
    return scale, (-low / scale).round().clamp(1, grid.top)


def round_to_grid(weight_OS: Tensor, scale_O1: Tensor, zero_O1: Tensor, grid: UniformGrid) -> Tensor:
    """Nearest codes, float32 holding integers in 0…2^bits − 1."""
    return (weight_OS / scale_O1).round_().add_(zero_O1).clamp_(0, grid.top)


def on_grid(codes_OS: Tensor, scale_O1: Tensor, zero_O1: Tensor) -> Tensor:
    return (codes_OS - zero_O1) * scale_O1


def search_clip(weight_OS: Tensor, grid: UniformGrid, importance_S: Tensor | None = None, steps: int = 20, floor: float = 0.5, power: float = 2.4) -> tuple[Tensor, Tensor]:
    """Shrink the range from 1 down to `floor` and keep, per row, what errs least: Σ importance·|Δ|^power."""
    best_scale, best_zero = min_max(weight_OS, grid)
    best = torch.full_like(best_scale, float("inf"))
    for shrink in torch.linspace(1.0, floor, steps).tolist():
        scale, zero = min_max(weight_OS, grid, shrink)
        error = (on_grid(round_to_grid(weight_OS, scale, zero, grid), scale, zero) - weight_OS).abs_().pow_(power)
        error = (error if importance_S is None else error * importance_S).sum(-1, keepdim=True)
        better = error < best
        best, best_scale, best_zero = error.where(better, best), scale.where(better, best_scale), zero.where(better, best_zero)
    return best_scale, best_zero


def to_record(codes_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor, grid: UniformGrid, group_index_I: Tensor | None = None) -> UniformWeight:
    """The stored form: scales in float16, zeros packed (none when symmetric)."""
    zeros = None if grid.symmetric else zeros_OG.to(torch.int64)
    size = codes_OI.shape[1] if grid.group_size == -1 else grid.group_size
    return UniformWeight.from_codes(codes_OI.to(torch.int64), scales_OG.half(), zeros, grid.bits, size, group_index_I)


def _storable(scale: Tensor) -> Tensor:
    """Round to the float16 that will be stored, so that codes are chosen for the scale that the reader sees; never 0."""
    return scale.clamp(min=2.0**-20).half().float()
