"""Grids of ggml's types fitted to a matrix: scales and minima of every group, then the two numbers of its super-block and the small codes.

First each group alone, scale (and minimum) by weighted least squares for the codes of many ranges. Then the super-block: its small codes one
step either way, d and m by least squares for all its codes, in turn; every candidate is measured as it will be stored and the best stays.
llama.cpp's own rounding (ggml-quants.c, make_qkx3_quants) stops at the nearest small codes. Knows tensors and records; no errors carried on.
Legend: O out, I in, S columns of a group, G groups of a super-block, M all groups of a piece (super-block by super-block), N = M/G.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .ggml_types import GGML_TYPES, GgmlName, GgmlType, as_settings
from .packing import pack_codes
from .weights import GgmlWeight

_RANGES = torch.linspace(1.1, 0.5, 16).tolist()
"""Shares of a group's range that its codes are stretched over."""
_ROUNDS = 3
_PIECE = 1 << 18  # weights that stay in the cache while many candidates are measured
_FLOOR = 1e-6  # of the mean importance: a dead input is rounded, too
_TINY = 2.0**-24  # the smallest float16


def check_type(config: Any) -> None:
    """ValueError where the settings for uniform grids contradict a type of ggml, which has its own."""
    if config.grid == "uniform":
        return
    for name, wanted in as_settings(config.grid).items():
        if getattr(config, name) != wanted:
            raise ValueError(
                f"{name} {getattr(config, name)} contradicts grid {config.grid}, whose {name} is {wanted}: leave {name} out, or set grid: uniform"
            )


def round_ggml(weight_OI: Tensor, kind: GgmlName, importance_I: Tensor | None = None, search: bool = True) -> GgmlWeight:
    """The nearest codes of float32 [O, I], I a multiple of the type's super-blocks, on a grid fitted under the importance [I] of each
    column (None: all alike), or that spans the whole range of each group where there is no `search`. A 0 stays exactly 0 on a grid
    without minima."""
    (rows, columns), layout = weight_OI.shape, GGML_TYPES[kind]
    groups_OKS = weight_OI.float().reshape(rows, -1, layout.group_size)
    weights_KS = None
    if importance_I is not None:
        weights_KS = (importance_I.float() / importance_I.float().mean().clamp(min=_TINY)).clamp(min=_FLOOR).view(-1, layout.group_size)
    parts = [_fit(piece_SM, weights_SM, layout, search) for piece_SM, weights_SM in _pieces(groups_OKS, weights_KS)]
    scales, minima, small, codes = (
        None if one[0] is None else torch.cat([p for p in one if p is not None]) for one in zip(*parts, strict=True)
    )
    assert scales is not None and codes is not None
    blocks = columns // layout.columns
    return GgmlWeight.from_codes(
        codes.view(rows, columns),
        scales.view(rows, blocks),
        None if minima is None else minima.view(rows, blocks),
        None if small is None else small.view(rows, blocks, -1),
        kind,
    )


def with_codes(base: GgmlWeight, codes_OI: Tensor) -> GgmlWeight:
    """The grid with other codes."""
    return replace(base, codes=pack_codes(codes_OI, base.bits))


def nearest_codes(weight_OI: Tensor, base: GgmlWeight) -> Tensor:
    """uint8 [O, I]: nearest codes on the grid that is there; where a scale is 0, the lowest."""
    scales_OG1, minima_OG = base.scales_OG().unsqueeze(-1), base.minima_OG()
    steps = weight_OI.float().view(len(weight_OI), base.groups, -1)
    steps = steps if minima_OG is None else steps + minima_OG.unsqueeze(-1)
    codes = (steps / scales_OG1.where(scales_OG1 != 0, 1)).add_(base.layout.zero).round_()
    return codes.clamp_(0, (1 << base.bits) - 1).where(scales_OG1 != 0, base.layout.zero).view(weight_OI.shape).to(torch.uint8)


def _pieces(groups_OKS: Tensor, weights_KS: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Whole rows as [S, M], each with the importance of its columns."""
    rows, count, size = groups_OKS.shape
    step = max(1, _PIECE // max(1, count * size))
    for start in range(0, rows, step):
        piece = groups_OKS[start : start + step]
        weights = None if weights_KS is None else weights_KS.T.repeat(1, len(piece))
        yield piece.reshape(-1, size).T.contiguous(), weights


def _fit(x_SM: Tensor, w_SM: Tensor | None, layout: GgmlType, searched: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """(d [N], m [N] or None, small codes as stored [N, K] or None, codes [M, S])."""
    w_SM = torch.ones((), dtype=x_SM.dtype, device=x_SM.device).expand_as(x_SM) if w_SM is None else w_SM
    search = _Blocks(x_SM, w_SM, layout, _ROUNDS if searched else 0)
    scale_M, minimum_M = search.alone() if searched else search.spanning(1.0, 1.0)
    best = search.joint(scale_M, minimum_M) if layout.scale_bits else search.legacy(scale_M, minimum_M)
    codes = search.codes(*search.effective(best)).add_(layout.zero).to(torch.uint8).T.contiguous()
    if not layout.scale_bits:
        return best.d_N, best.m_N if layout.minima else None, None, codes
    small = [best.s_M.view(-1, layout.groups) + layout.scale_zero]
    small += [best.t_M.view(-1, layout.groups)] if layout.minima else []
    return best.d_N, best.m_N if layout.minima else None, torch.cat(small, 1).to(torch.uint8), codes


@dataclass
class _Grid:
    """d and m [N], rounded to float16; s and t [M], whole numbers; what they lose, by super-block."""

    d_N: Tensor
    m_N: Tensor
    s_M: Tensor
    t_M: Tensor
    lost_N: Tensor


class _Blocks:
    """A piece of a matrix, and how grids are measured on it. Codes are signed where there are no minima."""

    def __init__(self, x_SM: Tensor, w_SM: Tensor, layout: GgmlType, rounds: int) -> None:
        self.x_SM, self.w_SM, self.layout, self.rounds = x_SM, w_SM, layout, rounds
        self.low_M, self.high_M = x_SM.amin(0), x_SM.amax(0)
        self.low, self.top = -layout.zero, (1 << layout.bits) - 1 - layout.zero
        self.top_small = (1 << layout.scale_bits) - 1 - layout.scale_zero

    def codes(self, scale_M: Tensor, minimum_M: Tensor) -> Tensor:
        return ((self.x_SM + minimum_M) / scale_M).round_().clamp_(self.low, self.top)

    def lost(self, scale_M: Tensor, minimum_M: Tensor) -> Tensor:
        """Σ w·Δ² of every group, of the nearest codes."""
        error_SM = self.codes(scale_M, minimum_M).mul_(scale_M).sub_(minimum_M).sub_(self.x_SM)
        return _sum(error_SM.square_().mul_(self.w_SM))

    def alone(self) -> tuple[Tensor, Tensor]:
        """(scale, minimum) of every group as if they cost nothing, never 0."""
        best = [*self.spanning(1.0, 1.0), torch.full_like(self.low_M, torch.inf)]
        for share, sign in product(_RANGES, (1.0,) if self.layout.minima else (1.0, -1.0)):
            best = self.solved_better(best, *self.spanning(share, sign))
        for _ in range(self.rounds):
            best = self.solved_better(best, best[0], best[1])
        return best[0], best[1]

    def spanning(self, share: float, sign: float) -> tuple[Tensor, Tensor]:
        """(scale, minimum) of codes stretched over a share of each group's range."""
        if self.layout.minima:
            low_M = self.low_M.clamp(max=0) if self.layout.scale_bits else self.low_M
            return _away_from_0((self.high_M - low_M) * (share / self.top)), low_M * -share
        # the code furthest from 0 is a negative one: a negative scale turns it to the other side
        return _away_from_0(torch.maximum(self.high_M, -self.low_M) * (sign * share / -self.low)), torch.zeros_like(self.low_M)

    def solved_better(self, best: list[Tensor], scale_M: Tensor, minimum_M: Tensor) -> list[Tensor]:
        """[scale, minimum, lost]: the best of every group so far, and those solved for the codes of this scale and minimum."""
        scale_M, minimum_M = self.solved(self.codes(scale_M, minimum_M), minimum_M)
        result = (scale_M, minimum_M, self.lost(scale_M, minimum_M))
        better = result[2] < best[2]
        return [new.where(better, old) for new, old in zip(result, best, strict=True)]

    def solved(self, codes_SM: Tensor, minimum_M: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted least squares of every group for these codes; a minimum of a k-quant is not negative."""
        weighted_SM = codes_SM * self.w_SM
        qq, qx = _sum(weighted_SM * codes_SM), _sum(weighted_SM * self.x_SM)
        if not self.layout.minima:
            return _away_from_0(_quotient(qx, qq, torch.zeros_like(qq))), minimum_M
        mass, q, x = _sum(self.w_SM * torch.ones_like(self.x_SM)), _sum(weighted_SM), _sum(self.w_SM * self.x_SM)
        scale = _quotient(mass * qx - q * x, mass * qq - q * q, torch.zeros_like(qq))
        minimum = (scale * q - x) / mass
        if self.layout.scale_bits:
            through_0 = minimum < 0
            scale, minimum = _quotient(qx, qq, scale).where(through_0, scale), minimum.clamp(min=0)
        return _away_from_0(scale), minimum

    def legacy(self, scale_M: Tensor, minimum_M: Tensor) -> _Grid:
        one = torch.ones_like(scale_M)
        return self.measured(_storable(scale_M), minimum_M.half().float(), one, one)

    def measured(self, d_N: Tensor, m_N: Tensor, s_M: Tensor, t_M: Tensor) -> _Grid:
        lost_M = self.lost(self.spread(d_N) * s_M, self.spread(m_N) * t_M)
        return _Grid(d_N, m_N, s_M, t_M, self.over_groups(lost_M))

    def effective(self, grid: _Grid) -> tuple[Tensor, Tensor]:
        return self.spread(grid.d_N) * grid.s_M, self.spread(grid.m_N) * grid.t_M

    def spread(self, value_N: Tensor) -> Tensor:
        return value_N.repeat_interleave(self.layout.groups)

    def over_groups(self, value_M: Tensor) -> Tensor:
        return _sum(value_M.view(-1, self.layout.groups).T)

    def joint(self, scale_M: Tensor, minimum_M: Tensor) -> _Grid:
        """The grid of every super-block: d and m as the largest small code reaches the largest, then small codes and d, m in turn."""
        largest_N, deepest_N = (value_M.view(-1, self.layout.groups).amax(1) for value_M in (scale_M.abs(), minimum_M))
        d_N, m_N = _storable(largest_N / self.top_small), (deepest_N / self.top_small).half().float()
        t_M = _quotient(minimum_M, self.spread(m_N), torch.zeros_like(scale_M)).round_().clamp_(0, self.top_small)
        best = self.measured(d_N, m_N, self.small_scale(scale_M / self.spread(d_N)), t_M)
        for _ in range(self.rounds):
            best = self.neighbours(best)
            best = _better(best, self.resolved(best))
        return self.neighbours(best) if self.rounds else best

    def small_scale(self, value_M: Tensor) -> Tensor:
        """The nearest small code that is not 0: with 0 a group would be flat, and on its finest scale it loses no more."""
        lowest = -self.layout.scale_zero
        code_M = value_M.round().clamp_(lowest if lowest else 1, self.top_small)
        return code_M.where(code_M != 0, torch.where(value_M < 0, -1.0, 1.0))

    def neighbours(self, grid: _Grid) -> _Grid:
        """The best small codes of every group among those that are and one step either way."""
        d_M, m_M = self.spread(grid.d_N), self.spread(grid.m_N)
        best = [grid.s_M, grid.t_M, self.lost(d_M * grid.s_M, m_M * grid.t_M)]
        for ds, dt in product((-1, 0, 1), (-1, 0, 1) if self.layout.minima else (0,)):
            if ds or dt:
                s_M, t_M = self.small_scale(grid.s_M + ds), (grid.t_M + dt).clamp_(0, self.top_small)
                lost_M = self.lost(d_M * s_M, m_M * t_M)
                better = lost_M < best[2]
                best = [new.where(better, old) for new, old in zip((s_M, t_M, lost_M), best, strict=True)]
        return replace(grid, s_M=best[0], t_M=best[1], lost_N=self.over_groups(best[2]))

    def resolved(self, grid: _Grid) -> _Grid:
        """d and m by weighted least squares for all the codes of a super-block, x ≈ d·(s·q) − m·t."""
        a_SM = self.codes(*self.effective(grid)).mul_(grid.s_M)
        weighted_SM = a_SM * self.w_SM
        aa, ax = (self.over_groups(_sum(weighted_SM * other)) for other in (a_SM, self.x_SM))
        if not self.layout.minima:
            return self.measured(_storable(_quotient(ax, aa, grid.d_N)), grid.m_N, grid.s_M, grid.t_M)
        ab = self.over_groups(_sum(weighted_SM) * grid.t_M)
        bx = self.over_groups(_sum(self.w_SM * self.x_SM) * grid.t_M)
        bb = self.over_groups(_sum(self.w_SM * torch.ones_like(self.x_SM)) * grid.t_M.square())
        d_N = _quotient(ax * bb - bx * ab, aa * bb - ab * ab, grid.d_N)
        m_N = _quotient(d_N * ab - bx, bb, grid.m_N)
        usable = (d_N > 0) & (m_N >= 0)
        d_N, m_N = _storable(d_N.where(usable, grid.d_N)), m_N.where(usable, grid.m_N).clamp(max=65504.0).half().float()
        return self.measured(d_N, m_N, grid.s_M, grid.t_M)


def _better(old: _Grid, new: _Grid) -> _Grid:
    """By super-block."""
    better_N = new.lost_N < old.lost_N
    better_M = better_N.repeat_interleave(len(old.s_M) // len(old.d_N))
    return _Grid(
        new.d_N.where(better_N, old.d_N),
        new.m_N.where(better_N, old.m_N),
        new.s_M.where(better_M, old.s_M),
        new.t_M.where(better_M, old.t_M),
        new.lost_N.where(better_N, old.lost_N),
    )


def _sum(term_SM: Tensor) -> Tensor:
    """Over the first dimension by halves: the sum of a group does not hang on its neighbours, as `Tensor.sum`'s may."""
    while len(term_SM) > 1:
        half = len(term_SM) // 2
        term_SM = term_SM[:half] + term_SM[half:]
    return term_SM[0]


def _quotient(above: Tensor, below: Tensor, otherwise: Tensor) -> Tensor:
    """above/below, `otherwise` where that is no number."""
    result = above / below
    return result.where(torch.isfinite(result), otherwise)


def _away_from_0(scale: Tensor) -> Tensor:
    return torch.where(scale < 0, scale.clamp(max=-_TINY), scale.clamp(min=_TINY))


def _storable(scale: Tensor) -> Tensor:
    """As the float16 that will be stored, never 0."""
    return _away_from_0(scale.clamp(-65504.0, 65504.0).half().float())
