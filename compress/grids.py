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
_CHUNK = 7 << 18  # elements whose levels stay in cache while many clip ratios are tried
_PIECES = 4  # so many chunks share the few operators that a set of clip ratios takes
_CARD_CHUNK = 1 << 26  # on a card: where more are no faster, and half a gigabyte is little next to the sweep that follows
_WHOLE = torch.ones((), dtype=torch.float64)
_ROWS = 64  # at least so many lie side by side, however long a group is


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
    """ValueError for a combination that is not supported."""
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


def min_max(weight_OS: Tensor, grid: UniformGrid) -> tuple[Tensor, Tensor]:
    """(scale, zero), both float32 [O, 1], of the grid that spans the group's range."""
    low, high = weight_OS.amin(-1, keepdim=True).clamp_(max=0), weight_OS.amax(-1, keepdim=True).clamp_(min=0)
    return _span(low, high, grid, _WHOLE)


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

    importance broadcasts against the weight. All groups are searched at once, in pieces that fit the cache, or a card's memory.
    """
    return _in_chunks(weight_OS, importance_S, lambda *given: _shrunk(_Search(grid, power, *given), steps, floor), _PIECES)


def search_joint(weight_OS: Tensor, grid: UniformGrid, importance_S: Tensor | None = None, rounds: int = 3) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the least error Σ importance·Δ², searched jointly: clipped ranges, each with its zero point moved either way; then, from
    the best of these, zero and scale in turn.

    An integer zero tries its neighbours, each with the scale that is best for the levels it gives; a float zero is solved with the
    scale for the codes as they are (two unknowns, weighted least squares). Every candidate is rounded as it will be stored and
    measured; the best stays, so that no group is left worse than by `search_clip`.
    """
    return _in_chunks(weight_OS, importance_S, lambda *given: _joint(_Search(grid, 2.0, *given), rounds))


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
    return UniformWeight.from_codes(codes_OI, scales_OG.half(), zeros, grid.bits, size, group_index_I)


class _Search:
    """The best (scale, zero) [G, 1, O] of every group so far, and the room in which candidates are measured.

    Weights lie as [G, S, O], rows last: a group's scale then meets whole runs of memory, at 2 to 3 times the speed of rows one by one.
    `levels` [H, S, O] is that room, written over: as many groups are measured at once.
    """

    def __init__(self, grid: UniformGrid, power: float, weight_GSO: Tensor, importance_GSO: Tensor | None, levels_HSO: Tensor) -> None:
        self.weight_GSO, self.grid, self.importance_GSO, self.power = weight_GSO, grid, importance_GSO, power
        self.low, self.high = weight_GSO.amin(1, keepdim=True).clamp_(max=0), weight_GSO.amax(1, keepdim=True).clamp_(min=0)
        self.levels = levels_HSO
        self.scale, self.zero, self.least = self.low, self.low, None  # until candidates have been considered

    def ends(self, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(zero, the lowest level, the highest level)."""
        return zero, -zero, self.grid.top - zero

    def round(self, weight: Tensor, levels: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Levels (code − zero) of every weight, into `levels`; zero, low and high are `ends`'."""
        torch.div(weight, scale, out=levels)
        if self.grid.float_zeros:
            return levels.add_(zero).round_().clamp_(0, self.grid.top).sub_(zero)
        return torch.clamp(levels.round_(), low, high, out=levels)

    def levels_of(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Of all groups, where there is room for all."""
        return self.round(self.weight_GSO, self.levels, scale, *self.ends(zero))

    def consider(self, scale_KG1O: Tensor, zero_KG1O: Tensor) -> None:
        """Measure candidates of every group and keep the first that errs least, where it errs less than the best so far. Where the first
        candidates of all overflow, the first of them stays."""
        groups = len(self.levels)
        weights = self.weight_GSO.split(groups)
        importances = [None] * len(weights) if self.importance_GSO is None else self.importance_GSO.split(groups)
        candidates = zip(*(each.split(groups, 1) for each in (scale_KG1O, *self.ends(zero_KG1O))), strict=True)
        lost = [self._lost(*given) for given in zip(weights, importances, candidates, strict=True)]
        lost_KG1O = lost[0] if len(lost) == 1 else torch.cat(lost, 1)
        lost_KG1O.nan_to_num_(nan=float("inf"), posinf=float("inf"))  # what overflows is no candidate
        lost, chosen = lost_KG1O.min(0, keepdim=True)
        result = (scale_KG1O.gather(0, chosen)[0], zero_KG1O.gather(0, chosen)[0], lost[0])
        if self.least is not None:
            better = lost[0] < self.least
            old = (self.scale, self.zero, self.least)
            result = tuple(new.where(better, kept) for new, kept in zip(result, old, strict=True))
        self.scale, self.zero, self.least = result

    def _lost(self, weight_HSO: Tensor, importance_HSO: Tensor | None, candidates: tuple[Tensor, ...]) -> Tensor:
        """Σ importance·|Δ|^power of every group under every candidate, [K, H, 1, O]."""
        levels_HSO = self.levels[: len(weight_HSO)]
        sums = _GroupSums(levels_HSO, len(candidates[0]))
        for k, (scale, *ends) in enumerate(zip(*candidates, strict=True)):
            error = torch.addcmul(weight_HSO, self.round(weight_HSO, levels_HSO, scale, *ends), scale, value=-1, out=levels_HSO)
            error = error.square_() if self.power == 2.0 else error.abs_().pow_(self.power)
            if importance_HSO is not None:
                error.mul_(importance_HSO)
            sums.take_(k)
        return sums.all_()

    def weighted_sum(self, factor: Tensor, other: Tensor) -> Tensor:
        """Σ importance·product over each group, float32 [G, 1, O]."""
        product = factor * other
        return _group_sum_(product if self.importance_GSO is None else product.mul_(self.importance_GSO))


class _GroupSums:
    """Σ over the columns S of terms [G, S, O], K times, the terms in one and the same place each time.

    On the CPU torch would add the last rows of a piece in another order than the others, and a row must not hang on its neighbours: so here
    one addition after the other, in the order of a sum along the row: 32 lanes, then 8, and one when all K have been taken.
    """

    def __init__(self, term_GSO: Tensor, count: int) -> None:
        groups, size, rows = term_GSO.shape
        self.term_GSO, self.by_lane = term_GSO, size % 32 == 0 and term_GSO.device.type == "cpu"
        self.sum_KG1O = term_GSO.new_zeros(count, groups, 1, rows)
        self.sums = self.sum_KG1O.unbind()
        if self.by_lane:
            self.first, *self.others = term_GSO.view(groups, -1, 32 * rows).unbind(1)
            self.quarters = self.first.view(groups, 4, 8 * rows).unbind(1)
            self.eighths, self.lane = self.quarters[0].view(groups, 8, rows), torch.zeros(8, dtype=torch.int64)

    def take_(self, k: int) -> None:
        """The k-th sum; the terms are written over."""
        if not self.by_lane:
            torch.sum(self.term_GSO, 1, keepdim=True, out=self.sums[k])
            return
        for other in self.others:
            self.first.add_(other)
        first, second, third, fourth = self.quarters
        first.add_(second).add_(third).add_(fourth)
        self.sums[k].index_add_(1, self.lane, self.eighths)

    def all_(self) -> Tensor:
        """[K, G, 1, O], where the first lane was."""
        return self.sum_KG1O


def _group_sum_(term_GSO: Tensor) -> Tensor:
    """Σ over a group's columns, [G, 1, O]; the terms are written over."""
    sums = _GroupSums(term_GSO, 1)
    sums.take_(0)
    return sums.all_()[0]


def _in_chunks(
    weight_OS: Tensor, importance_S: Tensor | None, search: Callable[[Tensor, Tensor | None, Tensor], _Search], pieces: int = 1
) -> tuple[Tensor, Tensor]:
    """Search parts [G, S, O] of as many rows, then groups, as there is room for; on the CPU, where that is the cache's, `pieces` such parts
    at a time, of which each is measured for itself."""
    weight_OGS = weight_OS.reshape(len(weight_OS), -1, weight_OS.shape[-1])
    importance_OGS = None if importance_S is None else importance_S.expand_as(weight_OS).reshape(weight_OGS.shape)
    _, count, size = weight_OGS.shape
    room = _room(weight_OS) // size
    rows = _rows_at_once(len(weight_OS), count, room)
    groups = min(max(1, room // max(rows, 1)), count)
    on_card = weight_OS.device.type == "cuda"
    at_once = groups * (1 if on_card else pieces)
    scales, zeros, levels = [], [], weight_OS.new_empty(groups * size * rows)
    for i in range(0, len(weight_OGS), rows):
        result = []
        for j in range(0, count, at_once):
            part = weight_OGS[i : i + rows, j : j + at_once]
            # A CPU transposes matrices that are whole in memory block by block, all else number by number; on a card a copy is memory.
            weight_GSO = (part if on_card else part.contiguous()).permute(1, 2, 0)
            weight_GSO = weight_GSO.flatten(0, 1).contiguous().view(weight_GSO.shape)
            importance = None if importance_OGS is None else importance_OGS[i : i + rows, j : j + at_once].permute(1, 2, 0)
            few = min(groups, len(weight_GSO))
            result.append(search(weight_GSO, importance, levels[: few * size * len(part)].view(few, size, len(part))))
        scales.append(torch.cat([part.scale for part in result]))
        zeros.append(torch.cat([part.zero for part in result]))
    scale, zero = (torch.cat(parts, -1).permute(2, 0, 1).reshape(*weight_OS.shape[:-1], 1) for parts in (scales, zeros))
    return scale, zero


def _rows_at_once(rows: int, groups: int, room: int) -> int:
    """Of the even splits that fit, the one that makes the fewest pieces of `room` groups' rows."""
    fewest = -(-rows // max(room, _ROWS))
    splits = (-(-rows // parts) for parts in range(max(fewest, 1), fewest + 4))
    return min(splits, key=lambda few: -(-rows // max(few, 1)) * -(-groups // max(1, room // max(few, 1))))


def _room(weight: Tensor) -> int:
    """Elements of a piece. On a card: with their levels, which take as much memory, within a quarter of what is free."""
    if weight.device.type != "cuda":
        return _CHUNK
    free_bytes, _ = torch.cuda.mem_get_info(weight.device)
    return max(_CHUNK, min(_CARD_CHUNK, free_bytes // (4 * 2 * weight.element_size())))


def _shrunk(search: _Search, steps: int, floor: float, offsets: tuple[float, ...] = (0.0,)) -> _Search:
    """From the whole range to `floor` of it, with each zero point moved by every one of `offsets`."""
    fractions = torch.linspace(1.0, floor, steps).double()
    scale_KG1O, zero_KG1O = _span(search.low, search.high, search.grid, fractions.view(-1, 1, 1, 1))
    if len(offsets) > 1:
        scale_KG1O = scale_KG1O.repeat_interleave(len(offsets), 0)
        zero_KG1O = torch.stack([_moved(zero_KG1O, offset, search.grid) for offset in offsets], 1).flatten(0, 1)
    search.consider(scale_KG1O, zero_KG1O)
    return search


def _moved(zero: Tensor, offset: float, grid: UniformGrid) -> Tensor:
    return zero + offset if grid.float_zeros else (zero + offset).clamp_(1, grid.top)


def _joint(search: _Search, rounds: int) -> _Search:
    grid = search.grid
    offsets = (0.0,) if grid.symmetric else (0.0, -0.5, 0.5) if grid.float_zeros else (0.0, -1.0, 1.0)
    _shrunk(search, STEPS, FLOOR, offsets)
    for _ in range(rounds):
        if grid.float_zeros:
            scale, zero = _solved(search)
            search.consider(scale.unsqueeze(0), zero.unsqueeze(0))
            continue
        zero = search.zero
        for offset in offsets:
            moved = _moved(zero, offset, grid)
            levels = search.levels_of(search.scale, moved)
            best = search.weighted_sum(levels, search.weight_GSO) / search.weighted_sum(levels, levels)
            search.consider(_storable(best.where(best > 0, search.scale)).unsqueeze(0), moved.unsqueeze(0))
    return search


def _solved(search: _Search) -> tuple[Tensor, Tensor]:
    """Scale and float zero of the weighted least squares w ≈ scale·code − scale·zero, for the codes of the best so far."""
    levels, weight = search.levels_of(search.scale, search.zero), search.weight_GSO
    one = torch.ones((), dtype=weight.dtype, device=weight.device).expand_as(weight)
    mass, n, w = (search.weighted_sum(x, one) for x in (one, levels, weight))
    nn, nw = search.weighted_sum(levels, levels), search.weighted_sum(levels, weight)
    scale = (mass * nw - n * w) / (mass * nn - n * n)
    usable = torch.isfinite(scale) & (scale > 0)
    scale = _storable(scale.where(usable, search.scale))
    moved = search.zero + (n - w / scale) / mass
    top = float(search.grid.top)
    return scale, moved.where(usable & torch.isfinite(moved), search.zero).clamp(-top, 2 * top).half().float()


def _span(low: Tensor, high: Tensor, grid: UniformGrid, shrink: Tensor) -> tuple[Tensor, Tensor]:
    """The grid over [low, high]·shrink, low ≤ 0 ≤ high; shrink is float64, what comes of it rounded once."""
    step = (shrink / grid.top).to(low)
    if grid.float_zeros:
        scale = _storable((high - low) * step)
        return scale, (low * -shrink.to(low) / scale).clamp(0, grid.top).half().float()
    if grid.symmetric:
        scale = _storable(torch.maximum(high, -low) * (2 * step))
        return scale, torch.full_like(scale, 1 << (grid.bits - 1))
    scale = _storable((high - low) * step)
    zero = (low * -shrink.to(low) / scale).round_()
    # A group without negative values gives code 0 away and spreads the others over its whole range.
    one_sided = zero < 1
    scale = _storable(high * (shrink / (grid.top - 1)).to(low)).where(one_sided, scale)
    return scale, zero.clamp_(1, grid.top)


def _storable(scale: Tensor) -> Tensor:
    """Round to the float16 that will be stored, so that codes are chosen for the scale that the reader sees; never 0."""
    return scale.clamp(2.0**-20, 65504.0).half().float()
