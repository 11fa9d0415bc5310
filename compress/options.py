"""Candidate settings of a matrix for `allocate`: what it may be stored as, in how many bytes and with which predicted error.

Bits × block sizes × double quantization, or types of ggml, × sparsity × rank × factor bits; all ranks of a (grid, sparsity) are read off one
spectrum. Knows one matrix at a time; which setting it gets is `allocate`'s business.
Legend: O out, I in, K settings.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from . import normal_float
from .factors import FactorBits, FactorForm, store_factors
from .feedback import factor_of
from .ggml_types import GGML_TYPES, GgmlName, as_settings, type_for
from .lowrank import Metric, WeightedError, spectrum
from .masks import pattern_mask, wanda_mask
from .packing import packed_words
from .statistics import LayerStatistics
from .weights import StoredWeight


@dataclass(frozen=True, order=True)
class Grid:
    """A grid and a mask: what Q may be. group_size −1 means one group per row; double_quantized concerns a NormalFloat's
    absmax; pattern is "dense", "N:M", or "unstructured" with its sparsity. A type of ggml is a kind (`ggml_grid`), and stands for its fallback on
    rows that are no multiple of its super-blocks."""

    kind: Literal["uniform", "normal_float"] | GgmlName = "uniform"
    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    double_quantized: bool = False
    pattern: str = "dense"
    sparsity: float = 0.0
    float_zeros: bool = False

    def groups(self, columns: int) -> int | None:
        """Groups in a row; None when they do not divide it (or the pattern does not), and for a pattern on a type of ggml without a code for 0."""
        size = columns if self.group_size == -1 else self.group_size
        if self.kind in GGML_TYPES:
            try:
                size = GGML_TYPES[type_for(self.kind, columns, self.pattern != "dense")].group_size
            except ValueError:
                return None
        period = int(self.pattern.split(":")[1]) if ":" in self.pattern else 1
        return None if columns % size or columns % period else columns // size

    def stored_bits(self, rows: int, columns: int) -> int:
        """Exactly the `stored_bits()` of such a record without a low-rank term."""
        groups = self.groups(columns)
        if groups is None:
            raise ValueError(f"{columns} columns are not a multiple of group size {self.group_size} or of pattern {self.pattern}")
        mask = 0 if self.pattern == "dense" else 8 * rows * -(-columns // 8)
        if self.kind in GGML_TYPES:
            layout = GGML_TYPES[type_for(self.kind, columns)]
            return rows * columns // layout.columns * layout.block_bits + mask
        codes = 32 * rows * packed_words(columns, self.bits)
        if self.kind == "uniform":
            zeros = 0 if self.symmetric else 16 * rows * groups if self.float_zeros else 32 * rows * packed_words(groups, self.bits)
            return codes + 16 * rows * groups + zeros + mask
        if not self.double_quantized:
            return codes + 32 * rows * groups + mask
        return codes + 8 * rows * groups + 32 * math.ceil(rows * groups / normal_float.NESTED_BLOCK) + 32 + mask

    def removed(self, rows: int, columns: int) -> int:
        """How many weights the mask takes away."""
        if ":" in self.pattern:
            kept, of = (int(part) for part in self.pattern.split(":"))
            return rows * columns * (of - kept) // of
        return 0 if self.pattern == "dense" else rows * round(columns * self.sparsity)


@dataclass(frozen=True, order=True)
class Setting:
    """A grid and a low-rank term; rank 0 means none."""

    grid: Grid = field(default_factory=Grid)
    rank: int = 0
    factor_bits: FactorBits = 16

    def fits(self, rows: int, columns: int) -> bool:
        return self.grid.groups(columns) is not None and self.rank <= min(rows, columns)

    def stored_bits(self, rows: int, columns: int) -> int:
        term = FactorForm(self.factor_bits).stored_bits(self.rank, rows, columns) if self.rank else 0
        return self.grid.stored_bits(rows, columns) + term

    def stored_bytes(self, rows: int, columns: int) -> int:
        return -(-self.stored_bits(rows, columns) // 8)


def ggml_grid(kind: GgmlName, pattern: str = "dense", sparsity: float = 0.0) -> Grid:
    """The grid of a type of ggml."""
    own = as_settings(kind)
    return Grid(kind, own["bits"], own["group_size"], own["symmetric"], pattern=pattern, sparsity=sparsity)


def settings(
    bits: Iterable[int] = (2, 3, 4, 8),
    group_sizes: Iterable[int] = (32, 64, 128),
    double_quantized: Iterable[bool] = (),
    ranks: Iterable[int] = (0, 8, 16, 32, 64),
    factor_bits: Iterable[FactorBits] = (16, 8, 4),
    sparsities: Iterable[tuple[str, float]] = (("dense", 0.0),),
    types: Iterable[GgmlName] = (),
) -> list[Setting]:
    """The product: uniform grids, NormalFloat ones for every entry of `double_quantized`, and the `types` of ggml."""
    grids = [Grid("uniform", b, g, pattern=p, sparsity=s) for b, g, (p, s) in product(bits, group_sizes, sparsities)]
    books = product(bits, group_sizes, double_quantized, sparsities)
    grids += [Grid("normal_float", b, g, False, d, p, s) for b, g, d, (p, s) in books]
    grids += [ggml_grid(kind, p, s) for kind, (p, s) in product(types, sparsities)]
    terms: list[tuple[int, FactorBits]] = [(0, 16), *((r, f) for r, f in product(ranks, factor_bits) if r)]
    return [Setting(grid, rank, bits_of_factors) for grid in grids for rank, bits_of_factors in terms]


def mask_on(target_OI: Tensor, norm_I: Tensor, grid: Grid) -> Tensor:
    """Wanda's mask of the grid's pattern, bool [O, I]."""
    if ":" in grid.pattern:
        kept, of = (int(part) for part in grid.pattern.split(":"))
        return pattern_mask(target_OI.abs() * norm_I, kept, of)
    return wanda_mask(target_OI, norm_I, grid.sparsity)


def error_table(
    target_OI: Tensor,
    metric: Metric,
    statistics: LayerStatistics,
    choices: Iterable[Setting],
    quantize: Callable[[Grid], StoredWeight],
    weights_VO: Tensor | None = None,
    solve: Callable[[Setting, StoredWeight], StoredWeight] | None = None,
) -> Tensor:
    """Predicted squared errors ‖(W − Q − L)·S‖² of every setting, float64 [V, K]; inf where a setting does not fit the matrix.

    `quantize` makes Q; L is the best term under the metric. Row o's share of the error counts weights_VO[v, o] times in view v
    (None: one view, all rows alike). One quantization and one spectrum for each grid: the error of rank r with 16-bit factors is
    the spectrum's tail. On a grid of their own the factors also lose a share of what they catch, measured at the middle one of
    the ranks: of 8 bits (about 1e-4) at the middle grid only, of 4 bits (some percent) at every grid.

    With `solve`, which makes Q + L of Q, a setting with a rank has the error of what comes out (LQ-LoRA, arXiv:2311.12023, section 3.2, takes
    its table from its own iterates): one solution for each of them, instead of a spectrum.
    """
    wanted = list(choices)
    fitting = [setting for setting in wanted if setting.fits(*target_OI.shape)]
    grids = list(dict.fromkeys(setting.grid for setting in fitting))
    errors_VK = torch.full((1 if weights_VO is None else len(weights_VO), len(wanted)), float("inf"), dtype=torch.float64)
    coarse: float | None = None
    for grid in sorted(grids, key=lambda grid: abs(grids.index(grid) - len(grids) // 2)):
        base = quantize(grid)
        if solve is not None:
            for k, setting in enumerate(wanted):
                if setting.grid == grid and setting.fits(*target_OI.shape):
                    solved = solve(setting, base) if setting.rank else base
                    squared_O = WeightedError(target_OI.float() - solved.dense(), metric).squared_O.clamp(min=0)
                    errors_VK[:, k] = (squared_O.sum() if weights_VO is None else weights_VO.to(squared_O) @ squared_O).cpu()
            continue
        error_OI = target_OI.float() - base.dense()
        spectrum_VR = torch.atleast_2d(spectrum(error_OI, metric, weights_VO)).cpu()  # CUDA sums up in no fixed order
        tail_VR = torch.nn.functional.pad(spectrum_VR.flip(1).cumsum(1).flip(1), (0, 1))
        lost = {16: 0.0, 8: coarse, 4: None}
        for k, setting in enumerate(wanted):
            if setting.grid != grid or not setting.fits(*target_OI.shape):
                continue
            if setting.rank and lost[setting.factor_bits] is None:
                lost[setting.factor_bits] = _share_lost(error_OI, metric, statistics, fitting, setting.factor_bits)
            share = lost[setting.factor_bits] or 0.0
            errors_VK[:, k] = tail_VR[:, setting.rank] + share * (tail_VR[:, 0] - tail_VR[:, setting.rank])
        coarse = lost[8]
    return errors_VK


def costs_bytes(shapes: Iterable[tuple[int, int]], choices: Iterable[Setting]) -> list[list[int]]:
    """[M][K] bytes, everything counted; 0 where a setting does not fit (its error is inf)."""
    wanted = list(choices)
    return [[s.stored_bytes(*shape) if s.fits(*shape) else 0 for s in wanted] for shape in shapes]


def overrides(setting: Setting) -> dict[str, dict[str, Any]]:
    """A setting as settings of the stages, by stage; a stage that it leaves out (no mask, no term) is left out."""
    grid = setting.grid
    if grid.kind == "uniform":
        own = {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric}
    elif grid.kind == "normal_float":
        own = {"bits": grid.bits, "block_size": grid.group_size, "double_quantize": grid.double_quantized}
    else:
        own = {"grid": grid.kind, **as_settings(grid.kind)}
    stages: dict[str, dict[str, object]] = {"quantize": own}
    if grid.pattern != "dense":
        stages["prune"] = {"pattern": grid.pattern, "sparsity": grid.sparsity}
    if setting.rank:
        stages["decompose"] = {"rank": setting.rank, "factor_bits": setting.factor_bits}
    return stages


def _share_lost(error_OI: Tensor, metric: Metric, statistics: LayerStatistics, choices: list[Setting], bits: FactorBits) -> float:
    """What rounding the factors costs, as a share of the squared error that they catch at the middle one of the ranks."""
    ranks = sorted({setting.rank for setting in choices if setting.rank and setting.factor_bits == bits})
    feedback = factor_of(statistics.inputs, 0.01, True) if metric.moment_II is not None else None
    error = WeightedError(error_OI, metric)
    up, down = error.best(ranks[len(ranks) // 2])
    stored = store_factors(up, down, FactorForm(bits), error, feedback)
    whole, left, rounded = error.squared, error.left_by(up, down), error.left_by(*stored.factors())
    return max(rounded - left, 0.0) / (whole - left) if whole > left else 0.0
