"""SVDQuant for language models (arXiv:2411.05007): smooth the inputs, keep a low-rank term of the smoothed weight in 16 bits,
quantize the residual and the inputs to a few bits.

Matrices that read one input (q/k/v, gate/up) share one smoothing vector, so that their input is quantized once. The stored term
sees the raw input: its right factor is divided by the smoothing here. Knows matrices and sampled inputs; not models.
Legend: T sampled tokens, O out, I in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from .activation_grid import fake_quantize
from .block import BlockProblem
from .factors import FactorForm, store_factors
from .grids import Clip, UniformGrid
from .lowrank import Metric, WeightedError, check_rank
from .ranges import Bits, Group, Iterations, ReadWhere, Width
from .requantize import is_quantized, requantize
from .rounding import grid_importance, round_uniform
from .statistics import InputStatistics, LayerStatistics
from .weights import ActivationGrid, StoredWeight


@dataclass(frozen=True)
class SvdQuantConfig:
    """bits, group_size and symmetric are the residual's grid where the matrix is not quantized yet (else it keeps its own);
    activation_bits 16 leaves the input alone. smoothing_steps: exponents α tried from 0 to 1, in addition to no smoothing.
    iterations: how often L and Q are solved, ended by the first rise of the output error."""

    rank: Width = 32
    bits: Bits = 4
    group_size: Group = 64
    symmetric: bool = True
    activation_bits: Literal[4, 8, 16] = 8
    activation_group_size: Annotated[Group, ReadWhere("activation_bits is below 16", lambda config: config.activation_bits < 16)] = 64
    quantizer: Literal["rtn", "gptq"] = "rtn"
    clip: Clip = "power"
    smoothing_steps: Iterations = 10
    iterations: Iterations = 4
    factor_dtype: Literal["float16", "bfloat16"] = "float16"


@dataclass(frozen=True)
class SmoothedMatrix:
    """One of the matrices that read an input: its record on a grid, without low-rank term or smoothing, and W float32 [O, I]."""

    weight: StoredWeight
    target_OI: Tensor
    statistics: LayerStatistics
    config: SvdQuantConfig


def needs(config: SvdQuantConfig) -> frozenset[str]:
    return frozenset({"absmax", "samples"} | ({"second_moment"} if config.quantizer == "gptq" else set()))


def svdquant(problem: BlockProblem, configs: Mapping[str, SvdQuantConfig]) -> tuple[dict[str, StoredWeight], dict[str, dict[str, float]]]:
    """Every matrix of a block; those that share their input statistics share one smoothing vector.

    Metrics of each: relative_error_before (on its grid, activations too, without smoothing and term) and relative_error, both
    ‖X·Wᵀ − Ŷ‖ / ‖X·Wᵀ‖ over the sampled inputs; iterations; best_iteration (0: rounding alone was best, and nothing else is stored); smoothing_alpha,
    absent where no smoothing was best; statistics_zero where no token reached the matrix, which then is only rounded.
    """
    groups: dict[int, list[str]] = {}
    for name in configs:
        groups.setdefault(id(problem.statistics[name].inputs), []).append(name)
    units, share = list(groups.values()), problem.share

    def solve(unit: int) -> dict[str, tuple[StoredWeight, dict[str, float]]]:
        solution = _solved(problem, units[unit], configs)
        return solution if share.size == 1 else {name: (record.to("cpu"), metrics) for name, (record, metrics) in solution.items()}

    shapes = [[problem.targets[name].shape for name in names] for names in units]
    costs = [float(sum(rows for rows, _ in few) + few[0][1]) * few[0][1] ** 2 for few in shapes]
    solved = {name: solution for part in share.solved(costs, solve) for name, solution in part.items()}
    return {n: record.to(problem.targets[n].device) for n, (record, _) in solved.items()}, {
        n: metrics for n, (_, metrics) in solved.items()
    }


def _solved(
    problem: BlockProblem, names: Sequence[str], configs: Mapping[str, SvdQuantConfig]
) -> dict[str, tuple[StoredWeight, dict[str, float]]]:
    """(record, metrics) of the matrices that read one input."""
    parts = [part_of(problem.weights[n], problem.targets[n], problem.statistics[n], configs[n]) for n in names]
    smooth_I, alpha = smoothing(parts)
    solutions = [split(part, None if smooth_I is None else smooth_I.clone()) for part in parts]  # files hold no shared tensors
    of_all = {} if alpha is None else {"smoothing_alpha": alpha}
    return {name: (record, metrics | of_all) for name, (record, metrics) in zip(names, solutions, strict=True)}


def part_of(weight: StoredWeight, target_OI: Tensor, statistics: LayerStatistics, config: SvdQuantConfig) -> SmoothedMatrix:
    """The matrix on its grid (the config's, if it has none yet), its activations' grid set. ValueError for an impossible rank."""
    check_rank(config.rank, weight.shape)
    activations = None if config.activation_bits == 16 else ActivationGrid(config.activation_bits, config.activation_group_size)
    plain = replace(weight, low_rank=None, smooth=None, delta=None, activations=activations)
    if not is_quantized(plain):
        grid = UniformGrid(config.bits, config.group_size, config.symmetric)
        importance_I = grid_importance(plain, statistics, config.clip)
        plain = replace(plain, base=round_uniform(target_OI.float(), grid, config.clip, importance_I))
    return SmoothedMatrix(requantize(plain, target_OI, statistics, config.quantizer, config.clip), target_OI.float(), statistics, config)


def smoothing(parts: Sequence[SmoothedMatrix]) -> tuple[Tensor | None, float | None]:
    """(smooth [I], α) of the matrices that read one input: s = max|x|^α / max|w|^(1−α) (section 4.2), the α with the least output
    summed error of all of them, each with its low-rank term; (None, None) where none does better. Stored in float16."""
    inputs = parts[0].statistics.inputs
    if inputs.samples_TI is None or not bool(inputs.samples_TI.any()):
        return None, None
    absmax_w_I = torch.stack([part.target_OI.abs().amax(0) for part in parts]).amax(0)
    best, least = (None, None), sum(_output_error(part, _attempt(part, None)) for part in parts)
    for alpha in torch.linspace(0, 1, parts[0].config.smoothing_steps).tolist():
        smooth_I = _smooth(inputs, absmax_w_I, alpha)
        error = sum(_output_error(part, _attempt(part, smooth_I)) for part in parts)
        if error < least:
            best, least = (smooth_I, alpha), error
    return best


def split(part: SmoothedMatrix, smooth_I: Tensor | None) -> tuple[StoredWeight, dict[str, float]]:
    """L from the smoothed weight, Q from the residual, again until the output error rises; the best is returned."""
    whole = _output_error(part, None) or 1.0
    before = _output_error(part, part.weight)
    if part.statistics.inputs.samples_TI is None:
        return part.weight, {
            "relative_error_before": 0.0,
            "relative_error": 0.0,
            "iterations": 0.0,
            "best_iteration": 0.0,
            "statistics_zero": 1.0,
        }
    best, least, best_at, previous, at = part.weight, before, 0, float("inf"), 0
    error_OI = part.target_OI
    for at in range(1, part.config.iterations + 1):
        stored = _term_and_residual(part, smooth_I, error_OI, part.config.clip)
        error = _output_error(part, stored)
        if error < least:
            best, least, best_at = stored, error, at
        if error > previous:
            break
        previous = error
        error_OI = part.target_OI - replace(stored, low_rank=None).dense()
    return best, {
        "relative_error_before": (before / whole) ** 0.5,
        "relative_error": (least / whole) ** 0.5,
        "iterations": float(at),
        "best_iteration": float(best_at),
    }


def _smooth(inputs: InputStatistics, absmax_w_I: Tensor, alpha: float) -> Tensor:
    """float16 [I] with geometric mean 1; a channel that is always 0 counts as a hundred-thousandth of the largest."""
    x_I, w_I = (a.clamp(min=1e-5 * a.max().item()).clamp(min=torch.finfo(torch.float32).tiny) for a in (inputs.absmax_I, absmax_w_I))
    log_I = alpha * x_I.log() - (1 - alpha) * w_I.log()
    return (log_I - log_I.mean()).exp().clamp(2.0**-12, 2.0**12).half()


def _attempt(part: SmoothedMatrix, smooth_I: Tensor | None) -> StoredWeight:
    """One round without clipping search: quick, and good enough to compare exponents."""
    return _term_and_residual(part, smooth_I, part.target_OI, "none")


def _term_and_residual(part: SmoothedMatrix, smooth_I: Tensor | None, error_OI: Tensor, clip: Clip) -> StoredWeight:
    """The best low-rank term of the smoothed error, and the residual of W on the grid."""
    metric = Metric() if smooth_I is None else Metric(column_I=smooth_I.float())
    error = WeightedError(error_OI, metric)
    term = store_factors(*error.best(part.config.rank), FactorForm(16, part.config.factor_dtype), error)
    held = replace(part.weight, smooth=smooth_I, low_rank=term)
    return requantize(held, part.target_OI, part.statistics, part.config.quantizer, clip)


def _output_error(part: SmoothedMatrix, stored: StoredWeight | None) -> float:
    """‖X·Wᵀ − Ŷ‖² over the sampled inputs; of no record, ‖X·Wᵀ‖²."""
    x_TI = part.statistics.inputs.samples_TI
    if x_TI is None:
        return 0.0
    if stored is None:
        return (x_TI @ part.target_OI.T).square_().sum(dtype=torch.float64).item()
    seen_TI = x_TI if stored.smooth is None else x_TI / stored.smooth.float()
    if stored.activations is not None:
        seen_TI = fake_quantize(seen_TI, stored.activations.bits, stored.activations.group_size)
    lost_TO = seen_TI @ stored.base_dense().T
    if stored.low_rank is not None:
        up, down = stored.low_rank.factors()
        lost_TO += (x_TI @ down.T) @ up.T
    return lost_TO.sub_(x_TI @ part.target_OI.T).square_().sum(dtype=torch.float64).item()
