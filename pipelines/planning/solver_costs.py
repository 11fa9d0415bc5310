"""Predicted costs of solving one matrix: work and peak memory, by stage, method and settings.

The constants were counted, not guessed: operations of the real solvers on random matrices of 768 and 1536 a side (groups of 64, ranks 8 and
32), seen one by one by a dispatch mode. Knows shapes and configs; no tensors.
Legend: O out, I in, R rank.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ...compress.decompose import Decomposition
from ...compress.grids import STEPS
from ..devices.rates import Work

F32, F64 = torch.float32, torch.float64
CHUNK = 5 << 18
"""Weights that a grid search holds at once on the CPU (`grids._CHUNK`); on a card there are fewer, larger ones."""
FIT = {"none": 7.0, "power": 180.0, "hessian": 180.0, "joint": 800.0, "ggml": 1300.0}
"""Reads and writes of a weight in float32 while its grid is searched, by `clip`: half of those that are counted, since a piece stays in the cache.
ggml: any search of a grid with small codes, 1.2 to 1.9 times as long as joint's of as many columns a group."""
FIT_CALLS = {"none": 25, "power": 269, "hessian": 269, "joint": 1326, "ggml": 9000}
"""Operations for each chunk of the search."""
PACK = 16.0
"""Reads and writes of a weight while it is rounded, packed and compared: all of nf4."""
SWEEP, COLUMN_CALLS, SETTLED_CALLS = 120.0, 5.6, 1.1
"""Of error feedback: reads and writes of a weight, operations for each column, and where many columns are rounded at once."""
MASK = 26.0
TERM = 76.0
"""Reads and writes of a weight for a low-rank term in closed form, the error's product with the moment apart."""
KRYLOV_SIDE, OVERSAMPLING = 512, 8
EXPANSIONS = {True: 6, False: 18}
"""How often a Krylov space grows: under a moment, whose spectrum decays; under the plain metric, where a rounding error has none that does."""
ROUNDS = 3
"""How often factors on a grid are rounded when they are new (`factors._ROUNDS`)."""


@dataclass(frozen=True)
class Cost:
    """`peak`: bytes alive at most while it is solved, beyond the matrix, its target and the statistics of its input; `kept`: bytes of what
    solvers leave with the statistics for other matrices of the input."""

    work: Work
    peak: float
    kept: float = 0.0


def solver_cost(stage: str, method: str, config: object, shape: tuple[int, int], quantized: bool) -> Cost:
    """Of one matrix [O, I]; `quantized`: whether its record lies on a grid already."""
    if stage == "prune":
        return _pruned(method, config, *shape)
    if stage == "quantize":
        return _rounded(config, *shape, feedback=method.startswith("gptq"))
    return _decomposed(config, *shape, quantized)


def _pruned(method: str, config: object, rows: int, columns: int) -> Cost:
    matrix = 4.0 * rows * columns
    plain = Cost(Work(passes=MASK * matrix, calls=40), 5.3 * matrix)
    if method != "sparsegpt":
        return plain
    result = Cost(_sweep(rows, columns, 3.3), max(7.3 * matrix, FACTOR_PEAK * 4 * columns**2), 8.0 * columns**2)
    if getattr(config, "bits", None) is None:
        return result
    return replace(result, work=result.work + _search(getattr(config, "clip", "hessian"), rows, columns))


def _rounded(config: Any, rows: int, columns: int, feedback: bool) -> Cost:
    """Onto a grid, to nearest or with error feedback."""
    matrix = 4.0 * rows * columns
    uniform = not hasattr(config, "block_size")
    work = Work(passes=PACK * matrix, calls=200)
    ggml = getattr(config, "grid", "uniform") != "uniform" and config.clip != "none"
    work += _search("ggml" if ggml else config.clip, rows, columns) if uniform else Work()
    joint = uniform and not ggml and config.clip == "joint"
    if not feedback:
        return Cost(work, (8.7 if joint else 4.7 if uniform else 3.5) * matrix)
    at_once = getattr(config, "act_order", "none") == "static_groups" and not config.first_order
    groups = getattr(config, "guided", 0)  # of rows, each with a factor of its own
    work += (
        _sweep(rows / max(groups, 1), columns, SETTLED_CALLS if at_once else COLUMN_CALLS) * max(groups, 1) + factor_work(columns) * groups
    )
    if getattr(config, "correction", 0.0) or getattr(config, "refit", None):
        work = work.in_products(F32, 2.0 * columns**3 + 2.0 * rows * columns**2)
    peak = max((10.4 if joint else 7.3) * matrix, FACTOR_PEAK * 4 * columns**2)
    return Cost(work, peak, 0.0 if groups else 4.0 * columns**2)


FACTOR_PEAK = 4.0
"""Square matrices of the input's width that are alive while the factor of its inverse moment is computed."""


def factor_work(columns: int) -> Work:
    """The inverse factor of a second moment: one Cholesky, an inverse by halves, the moment made symmetric."""
    return Work({F32: 0.3 * columns**3}, factors=columns**3 / 3, passes=4 * 40.0 * columns**2, calls=60)


def _search(clip: str, rows: int, columns: int) -> Work:
    chunks = max(1.0, rows * columns / CHUNK)
    powers = STEPS * rows * columns if clip == "power" else 0
    return Work(passes=4.0 * FIT[clip] * rows * columns, calls=FIT_CALLS[clip] * chunks, powers=powers)


def _sweep(rows: float, columns: int, calls: float = COLUMN_CALLS) -> Work:
    return Work({F32: 0.5 * rows * columns**2}, passes=4.0 * SWEEP * rows * columns, calls=calls * columns)


def _decomposed(config: Any, rows: int, columns: int, quantized: bool) -> Cost:
    """The schedule of `decompose`: the record's own Q with its best term, then Q and term in turn."""
    matrix, rank, moment = 4.0 * rows * columns, config.rank, config.metric == "second_moment"
    again = config.requantize and quantized
    forms = [config.factor_bits] if config.factor_bits is not None else [16, 8, 4]
    later = 8 if config.factor_bits is None else config.factor_bits  # chosen with the first term, most often a grid with a larger rank
    work = Work(passes=20 * matrix, calls=60)
    if moment:  # the error before, the matrix itself, and whether the moment is singular
        work += Work({F64: 2.0 * rows * columns**2}, factors=columns**3 / 3)
    start = not again or config.keep_start or config.first == "kept" or len(forms) > 1
    for bits in forms if start else []:
        wider = rank * 16 // bits if config.factor_bits is None else rank
        work += term_work(rows, columns, wider, moment) + factors_work(rows, columns, wider, bits, ROUNDS)
    if config.first == "l" or config.kept_rank is None:
        work += term_work(rows, columns, rank, moment)
    if config.kept_rank is None:  # two whole spectra
        work += Work({F64: 4.0 * rows * columns * min(rows, columns)}, factors=18.0 * min(rows, columns) ** 3)
    if again:
        rounds = 1 if config.follow else ROUNDS
        term = _followed(rows, columns, rank) if config.follow else term_work(rows, columns, rank, moment)
        each = (
            _requantized(config, rows, columns)
            + term
            + factors_work(rows, columns, rank * 16 // later if config.factor_bits is None else rank, later, rounds)
        )
        each = each.in_products(F64, float(rows * columns**2) if moment else 0.0) + Work(passes=60 * matrix, calls=100)
        work += each * config.iterations
    squares = 0.0 if not moment else 6.6 if again else 5.0
    matrices = 12.0 if not moment else 7.2 if not again else 9.6 if config.follow else 12.4
    peak = matrices * matrix + squares * 4 * columns**2
    return Cost(work, peak, 4.0 * columns**2 if again and config.quantizer == "gptq" else 0.0)


def _requantized(config: Decomposition, rows: int, columns: int) -> Work:
    work = Work(passes=4 * PACK * rows * columns, calls=200) + _search(config.clip, rows, columns)
    if config.quantizer == "gptq":
        work += _sweep(rows, columns, SETTLED_CALLS)
    if config.overlap < 1:  # a moment of its own for every matrix and every iteration
        work += factor_work(columns) + Work({F64: 2.0 * config.rank * columns**2}, passes=8 * 6.0 * columns**2)
    return work


def term_work(rows: int, columns: int, rank: int, moment: bool) -> Work:
    """The closed form: a Krylov space, or on small sides all eigenvectors."""
    side, width, matrix = min(rows, columns), rank + OVERSAMPLING, 4.0 * rows * columns
    if side > KRYLOV_SIDE and 8 * width <= side:
        count = EXPANSIONS[moment]
        applied, ritz = (count + 1) * width * 2.0 * rows * columns, 9.0 * width**3 * count**4 / 4
        return Work({F64: applied}, ritz + count * 4.0 * rows * width**2, TERM * matrix, 20 * count)
    eigen = Work(factors=9.0 * side**3, passes=TERM * matrix, calls=60).in_products(F64, float(rows * columns * side))
    if rows > columns and moment:
        return eigen + Work({F64: 1.0 * rows * columns**2}, factors=9.0 * columns**3)
    return eigen


def _followed(rows: int, columns: int, rank: int) -> Work:
    return Work({F64: 3.0 * rank * rows * columns + 1.0 * rank * columns**2}, passes=20 * 4.0 * rows * columns, calls=60)


def factors_work(rows: int, columns: int, rank: int, bits: int, rounds: int) -> Work:
    """Factors rounded in turn, each solved again for the other, where they lie on a grid."""
    if bits == 16:
        return Work(calls=4)
    numbers = rank * (rows + columns)
    sweeps = _search("power", rank, columns) + _search("power", rows, rank) + Work(passes=4 * (SWEEP + PACK) * numbers)
    sweeps += Work({F32: 0.5 * rank * columns**2}, calls=COLUMN_CALLS * (rank + columns))
    solved = Work({F64: 3.0 * rank * rows * columns + 2.0 * rank * columns**2}, 9.0 * rank**3, 30 * 4.0 * rows * columns, 200)
    return (sweeps + solved) * rounds
