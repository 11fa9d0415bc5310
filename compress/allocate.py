"""Mixed-precision allocation: one setting per matrix, least predicted loss, under a budget in bytes that counts everything stored.

Knows a table of bytes and a table of losses; what a setting is, and what it costs, is `options`' business.
Legend: M matrices, K settings, N settings left after the dominated ones are gone, over all matrices.
"""

import ctypes
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array


class InfeasibleBudget(ValueError):
    """No choice meets the constraints; `smallest_bytes` is the least budget that would."""

    def __init__(self, budget_bytes: float, smallest_bytes: int) -> None:
        super().__init__(f"a budget of {budget_bytes:,.0f} bytes is infeasible; the smallest feasible one is {smallest_bytes:,} bytes")
        self.smallest_bytes = smallest_bytes


@dataclass(frozen=True)
class Allocation:
    """choice[m] is the setting of matrix m; total_loss and total_bytes are those of the choice; gap is the proven relative
    distance of its loss from the optimum; settings counts the binary unknowns that were left."""

    choice: list[int]
    total_bytes: int
    total_loss: float
    gap: float
    seconds: float
    settings: int


def choose(
    costs_bytes: ArrayLike,
    losses: ArrayLike,
    budget_bytes: float,
    sparsity: ArrayLike | None = None,
    least_sparsity: float = 0.0,
    gap: float = 1e-4,
    time_limit_s: float = 60.0,
) -> Allocation:
    """min Σ_m losses[m, choice[m]] subject to Σ_m costs[m, choice[m]] ≤ budget: LQ-LoRA's program (arXiv:2311.12023, section
    3.2) by HiGHS, with the low-rank factors in the costs.

    costs [M, K] whole bytes; losses [M, K], inf or NaN where a setting does not fit a matrix. sparsity [M, K] counts the
    removed weights, Σ_m sparsity[m, choice[m]] ≥ least_sparsity. A setting that another beats in every respect is taken out
    first, which loses nothing. InfeasibleBudget names the smallest budget; ValueError a matrix that no setting fits;
    RuntimeError says that the time ran out before any choice was found.
    """
    started = time.perf_counter()
    costs, loss = np.asarray(costs_bytes, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if costs.shape != loss.shape or costs.ndim != 2:
        raise ValueError(f"costs {costs.shape} and losses {loss.shape} must both be [matrices, settings]")
    removed = None if sparsity is None else np.asarray(sparsity, dtype=np.float64)
    matrix_N, setting_N = _undominated(costs, loss, removed)
    columns = costs[matrix_N, setting_N], loss[matrix_N, setting_N], None if removed is None else removed[matrix_N, setting_N]
    smallest = _solve(matrix_N, columns[0], columns, None, least_sparsity, gap=0.0, time_limit_s=time_limit_s)
    smallest_bytes = round(float(columns[0][smallest.picked].sum()))
    if smallest_bytes > budget_bytes:
        raise InfeasibleBudget(budget_bytes, smallest_bytes)
    limit, solution = float(budget_bytes), smallest
    for _ in range(8):  # the solver's tolerance may overdraw by a few bytes: ask again for that much less
        solution = _solve(matrix_N, columns[1], columns, limit, least_sparsity, gap, time_limit_s)
        overdrawn = float(columns[0][solution.picked].sum()) - budget_bytes
        if overdrawn <= 0:
            break
        limit -= overdrawn
    else:
        solution = smallest
    picked = solution.picked
    return Allocation(
        choice=setting_N[picked].tolist(),
        total_bytes=round(float(columns[0][picked].sum())),
        total_loss=float(columns[1][picked].sum()),
        gap=solution.gap,
        seconds=time.perf_counter() - started,
        settings=len(matrix_N),
    )


@dataclass(frozen=True)
class _Solution:
    picked: NDArray[np.int64]
    gap: float


def _undominated(
    costs: NDArray[np.float64], losses: NDArray[np.float64], removed: NDArray[np.float64] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(matrix, setting) of every setting that no other setting of its matrix equals or beats in all respects."""
    matrices, settings = [], []
    for m in range(len(costs)):
        usable = np.flatnonzero(np.isfinite(losses[m]) & np.isfinite(costs[m]))
        if not len(usable):
            raise ValueError(f"no setting fits matrix {m}: every loss of it is infinite")
        marks = [costs[m, usable], losses[m, usable]] + ([] if removed is None else [-removed[m, usable]])
        usable = usable[np.lexsort(marks[::-1])]
        marks = np.stack([costs[m, usable], losses[m, usable]] + ([] if removed is None else [-removed[m, usable]]), 1)
        # sorted lexicographically, only an earlier setting can be at most as large in every respect
        beaten = np.tril((marks[:, None] >= marks[None]).all(-1), -1).any(1)
        settings.append(usable[~beaten])
        matrices.append(np.full(int((~beaten).sum()), m))
    return np.concatenate(matrices), np.concatenate(settings)


def _solve(
    matrix_N: NDArray[np.int64],
    objective_N: NDArray[np.float64],
    columns: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None],
    limit: float | None,
    least_sparsity: float,
    gap: float,
    time_limit_s: float,
) -> _Solution:
    """One setting of every matrix, least objective; limits scaled to 1, for the solver's tolerances are absolute."""
    count, costs, removed = len(matrix_N), columns[0], columns[2]
    one_each = csr_array((np.ones(count), (matrix_N, np.arange(count))))
    constraints = [LinearConstraint(one_each, 1, 1)]
    if limit is not None:
        constraints.append(LinearConstraint(csr_array(costs[None] / limit), -np.inf, 1))
    if removed is not None and least_sparsity > 0:
        constraints.append(LinearConstraint(csr_array(removed[None] / least_sparsity), 1, np.inf))
    program = {"bounds": Bounds(0, 1), "constraints": constraints}
    largest = float(np.abs(objective_N).max()) or 1.0
    relaxed: object = milp(objective_N / largest, integrality=np.zeros(count), **program)
    optimum = max(float(relaxed.fun or 0.0), 1e-12)  # the solver stops at an absolute gap of 1e-6 too: let the optimum be about 1,000
    options = {"mip_rel_gap": gap, "time_limit": time_limit_s}
    with _silent():
        result: object = milp(objective_N / largest * (1e3 / optimum), integrality=np.ones(count), options=options, **program)
    if result.x is None:
        if result.status == 2:
            most = 0.0 if removed is None else sum(removed[matrix_N == m].max() for m in range(matrix_N[-1] + 1))
            raise ValueError(f"no choice removes {least_sparsity:,.0f} weights; the settings allow {most:,.0f} at most")
        raise RuntimeError(f"no allocation was found within {time_limit_s:g} s ({result.message}); allow more time or fewer settings")
    return _Solution(np.flatnonzero(result.x > 0.5), float(result.mip_gap or 0.0))


@contextmanager
def _silent() -> Iterator[None]:
    """HiGHS writes some notes to file descriptor 1 whatever its options say; they would end up among a command's results."""
    flush = ctypes.CDLL(None).fflush if os.name == "posix" else lambda stream: None
    sys.stdout.flush()
    flush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
