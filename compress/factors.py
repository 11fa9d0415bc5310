"""The two factors as they are stored: 16-bit floats, or codes on a symmetric grid of 4 or 8 bits (CALDERA, arXiv:2405.18886).

Knows factors, the error they stand for and its metric; not where the error comes from.
Legend: O out, I in, R rank, N rows and C columns of a factor.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .feedback import InverseFactor, inverse_factor
from .gptq_sweeps import SweepConfig, gptq_uniform
from .grids import UniformGrid
from .lowrank import WeightedError
from .packing import packed_words
from .rounding import round_uniform
from .weights import LowRank, UniformWeight

FactorBits = Literal[4, 8, 16]
_ROUNDS = 3


@dataclass(frozen=True)
class FactorForm:
    """How factors lie on disk; dtype counts for 16 bits only."""

    bits: FactorBits = 16
    dtype: Literal["float16", "bfloat16"] = "float16"

    def stored_bits(self, rank: int, rows: int, columns: int) -> int:
        """Exactly `LowRank.stored_bits()` of factors of this form."""
        return self.factor_bits(rows, rank) + self.factor_bits(rank, columns)

    def factor_bits(self, rows: int, columns: int) -> int:
        """Of one factor of that shape."""
        if self.bits == 16:
            return 16 * rows * columns
        return 32 * rows * packed_words(columns, self.bits) + 16 * rows * (columns // _group(columns))

    def largest_rank(self, budget_bits: int, rows: int, columns: int) -> int:
        """The largest rank that costs at most the budget; 0 if none does. Above 32, whole multiples of 8: they pack without waste."""
        ranks = (r for r in range(min(rows, columns), 0, -1) if r <= 32 or r % 8 == 0)
        return next((r for r in ranks if self.stored_bits(r, rows, columns) <= budget_bits), 0)


def store_factors(
    up_OR: Tensor, down_RI: Tensor, form: FactorForm, error: WeightedError, inputs: InverseFactor | None = None, rounds: int = _ROUNDS
) -> LowRank:
    """Factors of the error as they lie on disk. On a grid, each is rounded with error feedback (`inputs`, of the second moment
    the matrix reads, lets down be too) and the other is solved again for what was rounded; the best of the rounds is kept."""
    if form.bits == 16:
        kind = getattr(torch, form.dtype)
        return LowRank(up_OR.to(kind), down_RI.to(kind))
    best, least, metric = None, float("inf"), error.metric
    for last in (*(False for _ in range(rounds - 1)), True):
        down = _round(down_RI, form.bits, inputs, metric.importance_I())
        seen = error.seen_by(down.dense())
        feedback = inverse_factor(seen.gram_RR.float(), 1e-3, True) if bool(seen.gram_RR.any()) else None
        up = _round(seen.best_up(), form.bits, feedback, None)
        left = seen.left_by(up.dense())
        if left < least:
            best, least = LowRank(up, down), left
        if not last:
            down_RI = _solve_down(error, up.dense())
    assert best is not None, "the error or its metric holds NaN"
    return best


def follow_factors(low_rank: LowRank, form: FactorForm, error: WeightedError, inputs: InverseFactor | None = None) -> LowRank:
    """Factors of an error from those of one that was much like it: one round of alternating least squares, a step of a subspace iteration."""
    up_OR = low_rank.factors()[0]
    down_RI = _solve_down(error, up_OR)
    if form.bits == 16:
        up_OR = error.seen_by(down_RI).best_up()
    return store_factors(up_OR, down_RI, form, error, inputs, rounds=1)


def _group(columns: int) -> int:
    """Columns of a factor that share a scale: 64 where that divides, else the whole row."""
    return 64 if columns % 64 == 0 else columns


def _round(factor_NC: Tensor, bits: int, feedback: InverseFactor | None, importance_C: Tensor | None) -> UniformWeight:
    grid = UniformGrid(bits, _group(factor_NC.shape[1]), symmetric=True)
    if feedback is None:
        return round_uniform(factor_NC.contiguous(), grid, "power" if importance_C is None else "hessian", importance_C)
    return gptq_uniform(factor_NC.contiguous(), feedback, grid, SweepConfig("power"))[0]


def _solve_down(error: WeightedError, up_OR: Tensor) -> Tensor:
    """The best down for a given up: upᵀ·D²·E solved by (upᵀ·D²·up)⁺; columns do not touch one another."""
    up = error.metric.rows(up_OR)
    return (torch.linalg.pinv(up.T @ up, rtol=1e-10, hermitian=True) @ (up.T @ error.weighted_OI)).float()
