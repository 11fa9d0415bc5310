"""W ≈ Q + L1·L2: one solver; the published methods are settings of it.

min over Q on its grid and inside its mask, rank(L) ≤ r, of ‖(W − Q − L)·S‖_F, W the baseline: L makes up for pruning and
quantization together. Knows one matrix at a time; not models, not files, nor how Q was first found.
Legend: O out, I in, R rank, G groups.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .lowrank import Metric, best_low_rank, check_rank, spectrum, squared_error, store_factors
from .requantize import is_quantized, requantize
from .statistics import LayerStatistics
from .weights import LowRank, StoredWeight


@dataclass(frozen=True)
class Decomposition:
    """metric: what the error is measured in; plain ‖E‖_F, absmean diag E|x|, diagonal diag √E[x²], fisher √row mean × √column
    mean, second_moment R^½. quantizer, first, iterations: the schedule when Q is requantized (on the record's own grid).
    kept_rank: ranks of W kept before Q and held there (SRR); null lets SRR's criterion choose. factor_bits below 16 puts the
    factors on a grid. stop_when_worse ends the schedule at the first rise; the best iterate is returned either way."""

    rank: int = 16
    metric: Literal["plain", "absmean", "diagonal", "fisher", "second_moment"] = "second_moment"
    requantize: bool = False
    quantizer: Literal["rtn", "gptq"] = "rtn"
    first: Literal["q", "l"] = "q"
    iterations: int = 1
    kept_rank: int | None = 0
    factor_bits: Literal[4, 8, 16] = 16
    factor_dtype: Literal["float16", "bfloat16"] = "float16"
    stop_when_worse: bool = False


@dataclass(frozen=True)
class Problem:
    """One matrix to decompose: the record without its low-rank term, W, and the metric; moment_II is what GPTQ needs."""

    weight: StoredWeight
    target_OI: Tensor
    metric: Metric
    moment_II: Tensor | None
    config: Decomposition

    def error_OI(self, stored: StoredWeight) -> Tensor:
        return self.target_OI - stored.dense()

    def quantized(self, target_OI: Tensor) -> StoredWeight:
        """Q ≈ target on the record's grid, inside its mask."""
        return requantize(self.weight, target_OI, self.config.quantizer, self.metric.importance_I(), self.moment_II)

    def solved(self, base: StoredWeight, rank: int, held: tuple[Tensor, Tensor] | None = None) -> StoredWeight:
        """base with the best L for it; `held` factors stay and the rank comes on top of them."""
        error = self.error_OI(base)
        if held is None:
            up, down = best_low_rank(error, self.metric, rank)
        else:
            up, down = held
            if rank:
                more = best_low_rank(error - up @ down, self.metric, rank)
                up, down = torch.cat((up, more[0]), 1), torch.cat((down, more[1]), 0)
        return replace(base, low_rank=store_factors(up, down, self.config.factor_bits, self.config.factor_dtype, self.metric))


def needs(config: Decomposition) -> frozenset[str]:
    wanted = {"plain": set(), "absmean": {"absmean"}, "diagonal": {"norms"}, "fisher": {"fisher"}, "second_moment": {"second_moment"}}
    gptq = {"second_moment"} if config.requantize and config.quantizer == "gptq" else set()
    return frozenset(wanted[config.metric] | gptq)


def decompose(
    weight: StoredWeight, target_OI: Tensor, statistics: LayerStatistics, config: Decomposition
) -> tuple[StoredWeight, dict[str, float]]:
    """The best iterate of the schedule, by the config's metric, measured on the factors as stored; never worse than L = 0.

    Metrics: relative_error_before (the record as it came, without L) and relative_error, both ‖(W − Ŵ)·S‖ / ‖W·S‖; rank;
    iterations run; best_iteration (0: nothing beat L = 0, and up is 0); and what `metric_of` says of the statistics.
    ValueError for a rank above min(O, I), non-finite statistics, or a Fisher metric without Fisher information.
    """
    check_rank(config.rank, weight.shape)
    metric, notes = metric_of(statistics, config.metric)
    moment = statistics.inputs.second_moment_II if "second_moment" in statistics.inputs.needs else None
    problem = Problem(replace(weight, low_rank=None), target_OI.float(), metric, moment, config)
    before = squared_error(problem.error_OI(problem.weight), metric)
    best, best_error, best_at, last, previous, at = None, before, 0, None, float("inf"), 0
    for at, last in enumerate(_iterates(problem), 1):
        error = squared_error(problem.error_OI(last), metric)
        if error < best_error:
            best, best_error, best_at = last, error, at
        if config.stop_when_worse and error > previous:
            break
        previous = error
    assert last is not None
    if best is None:
        best = replace(problem.weight, low_rank=_without_effect(last))
    total = squared_error(problem.target_OI, metric)
    scale = total if total > 0 else 1.0
    return best, {
        "relative_error_before": (before / scale) ** 0.5,
        "relative_error": (best_error / scale) ** 0.5,
        "rank": float(config.rank),
        "iterations": float(at),
        "best_iteration": float(best_at),
        **notes,
    }


def _iterates(problem: Problem) -> Iterator[StoredWeight]:
    """Every Q + L that the schedule visits."""
    config, rank = problem.config, problem.config.rank
    if not (config.requantize and is_quantized(problem.weight)):
        yield problem.solved(problem.weight, rank)
        return
    kept = _kept_rank(problem) if config.kept_rank is None else min(config.kept_rank, rank)
    held = best_low_rank(problem.target_OI, problem.metric, kept) if kept else None
    low_OI = torch.zeros_like(problem.target_OI)
    if held is not None:
        low_OI = held[0] @ held[1]
    elif config.first == "l":
        up, down = best_low_rank(problem.target_OI, problem.metric, rank)
        low_OI = up @ down
    for _ in range(config.iterations):
        stored = problem.solved(problem.quantized(problem.target_OI - low_OI), rank - kept, held)
        yield stored
        assert stored.low_rank is not None
        low_OI = stored.low_rank.dense()


def _kept_rank(problem: Problem) -> int:
    """SRR's criterion (arXiv:2602.02001): the k for which (energy of W left to the quantizer) × (share of a noise's energy that
    rank r − k cannot reach) is least, both in the metric; the noise stands for the quantization error."""
    rank = problem.config.rank
    exposed = spectrum(problem.target_OI, problem.metric).flip(0).cumsum(0).flip(0)
    noise = torch.rand(problem.target_OI.shape, generator=torch.Generator().manual_seed(0)).to(problem.target_OI) - 0.5
    missed = spectrum(noise, problem.metric).flip(0).cumsum(0).flip(0)
    exposed, missed = (torch.nn.functional.pad(t, (0, 1)) for t in (exposed, missed))
    return int((exposed[: rank + 1] * missed[: rank + 1].flip(0)).argmin())


def metric_of(statistics: LayerStatistics, kind: str) -> tuple[Metric, dict[str, float]]:
    """The metric and what is to be said of its statistics: `tokens_short_of` (the tokens that would do, when there are fewer
    than input features), `moment_singular`, `statistics_zero` (nothing was seen: the plain metric stands in)."""
    inputs = statistics.inputs
    if kind == "plain":
        return Metric(), {}
    broken = inputs.non_finite()
    if broken is not None:
        raise ValueError(f"the calibration statistic {broken} holds NaN or Inf; look at the layers below, or use metric: plain")
    if kind == "fisher":
        return _fisher_metric(statistics)
    notes = {"tokens_short_of": float(inputs.features)} if inputs.tokens < inputs.features else {}
    if kind == "second_moment":
        moment = inputs.second_moment_II
        if not bool(moment.diagonal().sum() > 0):
            return Metric(), notes | {"statistics_zero": 1.0}
        return Metric(moment_II=moment), notes | ({"moment_singular": 1.0} if _singular(moment) else {})
    column = inputs.absmean_I if kind == "absmean" else inputs.norm_I / max(inputs.tokens, 1) ** 0.5
    return (Metric(column_I=column), notes) if bool(column.any()) else (Metric(), notes | {"statistics_zero": 1.0})


def _fisher_metric(statistics: LayerStatistics) -> tuple[Metric, dict[str, float]]:
    """D1 = √row mean, D2 = √column mean (LQ-LoRA, arXiv:2311.12023, section 3.3). A row without Fisher information gets a
    thousandth of the mean, since D1 is inverted; a matrix without any is measured plainly."""
    if statistics.fisher is None:
        raise ValueError("metric: fisher needs the Fisher diagonal of this weight, which was not collected; choose another metric")
    row, column = statistics.fisher.row_mean_O.double().sqrt(), statistics.fisher.column_mean_I.double().sqrt()
    if not bool(torch.isfinite(row).all() and torch.isfinite(column).all()):
        raise ValueError("the Fisher diagonal holds NaN, Inf or negative numbers; gradients overflowed: collect it in float32")
    if not bool(row.any() and column.any()):
        return Metric(), {"statistics_zero": 1.0}
    silent = float((row == 0).sum())
    return Metric(row.clamp(min=1e-3 * row.mean().item()), column), {"fisher_rows_zero": silent} if silent else {}


def _singular(moment_II: Tensor) -> bool:
    """Whether the correlation matrix's smallest eigenvalue is below 1e-6 (dead inputs, too few tokens)."""
    scale = moment_II.diagonal().double().clamp(min=0).sqrt()
    if not bool((scale > 0).all()):
        return True
    correlation = moment_II.double() / scale / scale.unsqueeze(1)
    correlation.diagonal().sub_(1e-6)
    return bool(torch.linalg.cholesky_ex(correlation).info)


def _without_effect(stored: StoredWeight) -> LowRank:
    """A term that adds nothing, but can be trained: up is 0, down is what was solved."""
    assert stored.low_rank is not None
    up, down = stored.low_rank.factors()
    return LowRank(torch.zeros_like(up).half(), down.half())
