"""Two more benchmarks of `pipeline bench`: the exact low-rank step against the route of the papers' code, and the integer program of a budget.

Knows synthetic layers and tables; nothing of models. Legend: O out, I in, R rank, M matrices, K settings.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from ...compress.allocate import choose
from ...compress.grids import UniformGrid
from ...compress.lowrank import Metric, best_low_rank, squared_error
from ...compress.options import costs_bytes, settings
from ...compress.rounding import round_uniform
from .scaling import Row

RANK = 32
SQUARE_ROOT_SIDE = 1536
"""A square root of a larger moment takes minutes: it is measured with --full only."""
SHAPES_7B = [*[(4096, 4096)] * 4, *[(11008, 4096)] * 2, (4096, 11008)] * 32
BITS_PER_WEIGHT = 2.75


def by_square_root(error_OI: Tensor, moment_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(up [O, R], down [R, I]) float64: the best low-rank term under the second moment as QERA's and EoRA's code finds it (arXiv:2410.06040,
    theorem 1): S = R^½ by `scipy.linalg.sqrtm`, a full SVD of E·S, and S⁻¹ behind it."""
    root_II = np.real(np.asarray(scipy.linalg.sqrtm(moment_II.double().cpu().numpy())))
    left, values, right = scipy.linalg.svd(error_OI.double().cpu().numpy() @ root_II, full_matrices=False)
    down = scipy.linalg.solve(root_II.T, right[:rank].T).T
    return torch.from_numpy(left[:, :rank] * values[:rank]), torch.from_numpy(down)


def exact_steps(
    weight_OI: Tensor, moment_II: Tensor, measured: Callable[[Callable[[], None]], tuple[list[float], int]], full: bool
) -> Iterator[Row]:
    """The exact step on a 3-bit error of this matrix, and the square root's, with how much longer it takes and how far the errors are apart."""
    size, grid = len(weight_OI), UniformGrid(3, 64 if weight_OI.shape[1] % 64 == 0 else -1)
    error_OI = weight_OI - round_uniform(weight_OI, grid, "power").dense()
    metric, factors = Metric(moment_II=moment_II), list[Tensor]()
    whole = squared_error(weight_OI, metric)
    seconds, peak_bytes = measured(lambda: factors.__setitem__(slice(None), best_low_rank(error_OI, metric, RANK)))
    ours = squared_error(error_OI - factors[0] @ factors[1], metric)
    row: Row = {"stage": "decompose", "size": size}
    spread, median = max(seconds) - min(seconds), statistics.median(seconds)
    yield row | {
        "method": "exact step", "seconds": median, "spread_seconds": spread, "peak_bytes": peak_bytes, "relative_output_error": (ours / whole) ** 0.5,
    }  # fmt: skip
    if size > SQUARE_ROOT_SIDE and not full:
        yield row | {"method": "exact step by sqrtm", "error": f"takes minutes above {SQUARE_ROOT_SIDE}: --full measures it"}
        return
    began = time.perf_counter()
    up, down = by_square_root(error_OI, moment_II, RANK)
    took = time.perf_counter() - began
    theirs = squared_error(error_OI.double() - (up @ down).to(error_OI.device), metric)
    yield row | {
        "method": "exact step by sqrtm", "seconds": took, "relative_output_error": (theirs / whole) ** 0.5,
        "times_slower": took / median, "error_difference": (theirs / ours) ** 0.5 - 1,
    }  # fmt: skip


def allocation(repeats: int) -> list[Row]:
    """The program at the size of a 7B model: 224 matrices × 432 settings (bits × groups × masks × ranks × factor bits), 2.75 bits per weight.

    Losses are made up as they tend to be: four-fold less for every bit, growing with the group, a share of it caught by the rank, and matrices
    of very different sensitivity."""
    sparsities = (("dense", 0.0), ("2:4", 0.5), ("4:8", 0.5), ("unstructured", 0.5))
    choices = settings((2, 3, 4, 8), (32, 64, 128), (), (0, 8, 16, 32, 64), (16, 8), sparsities)
    costs_MK = np.array(costs_bytes(SHAPES_7B, choices))
    draw = np.random.default_rng(0)
    grids = np.array([4.0**-s.grid.bits * (s.grid.group_size / 32) ** 0.5 + (s.grid.pattern != "dense") * 0.03 for s in choices])
    caught = np.array([1 - 0.4 * (s.rank / 64) ** 0.5 for s in choices])
    size_M = np.array([rows * columns for rows, columns in SHAPES_7B])
    losses_MK = draw.lognormal(0, 2, (len(size_M), 1)) * size_M[:, None] * (grids * caught) * draw.lognormal(0, 0.1, costs_MK.shape)
    budget = size_M.sum() * BITS_PER_WEIGHT / 8
    runs = [choose(costs_MK, losses_MK, budget) for _ in range(repeats)]
    within = np.flatnonzero(costs_MK.sum(0) <= budget)
    uniform = losses_MK[:, within].sum(0).min()
    return [
        {
            "matrices": len(SHAPES_7B),
            "settings": len(choices),
            "left": runs[0].settings,
            "seconds": statistics.median(run.seconds for run in runs),
            "gap": max(run.gap for run in runs),
            "bits_per_weight": runs[0].total_bytes * 8 / size_M.sum(),
            "loss_to_best_uniform": runs[0].total_loss / uniform,
        }
    ]
