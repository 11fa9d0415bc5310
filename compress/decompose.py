"""W ≈ Q + L1·L2: one solver; the published methods are settings of it.

min over Q on its grid and inside its mask, rank(L) ≤ r, of ‖(W − Q − L)·S‖_F, W the baseline: L compensates pruning and
quantization error. Knows one matrix at a time; not models, not files, nor where the first Q comes from.
Legend: O out, I in, R rank.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Literal

import torch
from torch import Tensor

from .factors import FactorForm, follow_factors, store_factors
from .feedback import InverseFactor, factor_of
from .grids import Clip, clip_needs
from .lowrank import Metric, WeightedError, best_low_rank, check_rank, spectrum, squared_error
from .metrics import MetricName, metric_of
from .ranges import Iterations, ReadWhere, ShareOrAll, Width, WidthOrZero
from .requantize import is_quantized, requantize
from .sharing import rows_of
from .statistics import LayerStatistics
from .weights import LowRank, StoredWeight

_AGAIN = ReadWhere("requantize is true", lambda config: config.requantize)
_NONE_KEPT = ReadWhere("kept_rank is 0 or null", lambda config: not config.kept_rank)


@dataclass(frozen=True)
class Decomposition:
    """metric: what the error is measured in (compress/metrics.py). requantize: Q is solved again for W − L, on the record's own
    grid, by `quantizer` with `clip`, `iterations` times, each time followed by L; `first` says what comes before the first Q
    (q: nothing; l: L of W; kept: L for the record's own Q). keep_start: the record's own Q with its best L is a candidate, too,
    and is visited first. kept_rank: ranks of W taken before Q and held (SRR); null lets
    SRR's criterion choose. factor_bits below 16 puts the factors on a grid; null takes, within the bytes of `rank` at 16 bits,
    whichever of 16, 8 and 4 bits errs least, at the larger rank it allows. stop_when_worse ends the schedule at the first
    rise; the best iterate is returned either way. follow: after the first L each new one starts from the factors that are there, in a third of
    the time, instead of from the closed form. overlap below 1: a new Q is solved under the second moment without what the rows of `down`
    reach, but for that share of it: rounding may err where the next up makes up for it. shared: matrices that read one input get one
    right factor, stored once; `rank` is then that of each of them and of their stack."""

    rank: Width = 16
    metric: MetricName = "second_moment"
    requantize: bool = False
    quantizer: Annotated[Literal["rtn", "gptq"], _AGAIN] = "rtn"
    clip: Annotated[Clip, _AGAIN] = "power"
    first: Annotated[Literal["q", "l", "kept"], _AGAIN, _NONE_KEPT] = "q"
    keep_start: Annotated[bool, _AGAIN] = False
    iterations: Annotated[Iterations, _AGAIN] = 1
    kept_rank: Annotated[WidthOrZero | None, _AGAIN] = 0
    factor_bits: Literal[4, 8, 16] | None = 16
    factor_dtype: Annotated[
        Literal["float16", "bfloat16"], ReadWhere("factor_bits is 16 or null", lambda c: c.factor_bits in (16, None))
    ] = "float16"
    stop_when_worse: Annotated[bool, _AGAIN] = False
    follow: Annotated[bool, _AGAIN, _NONE_KEPT] = False
    overlap: ShareOrAll = 1.0
    shared: bool = False

    def __post_init__(self) -> None:
        if self.kept_rank is not None and self.kept_rank > self.rank:
            raise ValueError(f"kept_rank {self.kept_rank} must lie in 0…rank ({self.rank}), or be null")
        if self.overlap < 1.0 and not (self.requantize and self.quantizer == "gptq" and self.metric == "second_moment"):
            raise ValueError(f"overlap {self.overlap} needs requantize: true, quantizer: gptq and metric: second_moment; or set overlap: 1")


@dataclass(frozen=True)
class FactoredMatrix:
    """One of the matrices that get one right factor: its record without a low-rank term, its target, what is known of it."""

    weight: StoredWeight
    target_OI: Tensor
    statistics: LayerStatistics


Stored = tuple[StoredWeight, ...]
"""One record for each part; their low-rank terms have one and the same right factor."""


@dataclass(frozen=True)
class Problem:
    """What to decompose, most often one matrix; several that read one input are solved as one matrix, their rows on top of one another.
    O counts the rows of all parts."""

    parts: tuple[FactoredMatrix, ...]
    metric: Metric
    config: Decomposition

    @cached_property
    def target_OI(self) -> Tensor:
        return torch.cat([part.target_OI.float() for part in self.parts])

    @property
    def start(self) -> Stored:
        return tuple(part.weight for part in self.parts)

    @property
    def shape(self) -> tuple[int, int]:
        return self.target_OI.shape[0], self.target_OI.shape[1]

    def error(self, stored: Stored) -> WeightedError:
        return WeightedError(self.target_OI - torch.cat([record.dense() for record in stored]), self.metric)

    @cached_property
    def start_error(self) -> WeightedError:
        return self.error(self.start)

    def with_term(self, base: Stored, low_rank: LowRank | None) -> Stored:
        """Every part with its rows of the term."""
        row, out = 0, []
        for record in base:
            rows, row = slice(row, row + record.shape[0]), row + record.shape[0]
            term = None if low_rank is None else LowRank(rows_of(low_rank.up, rows), low_rank.down)
            out.append(replace(record, low_rank=term))
        return tuple(out)

    def quantized(self, low_rank: LowRank | None) -> Stored:
        """Q for W − L, without L."""
        held = zip(self.with_term(self.start, low_rank), self.parts, strict=True)
        beyond = None
        if self.config.overlap < 1.0 and low_rank is not None and self.metric.moment_II is not None:
            inputs = self.parts[0].statistics.inputs
            beyond = LayerStatistics(inputs.with_moment(self.metric.beyond(low_rank.factors()[1], self.config.overlap)))
        result = (requantize(w, part.target_OI, beyond or part.statistics, self.config.quantizer, self.config.clip) for w, part in held)
        return tuple(replace(record, low_rank=None) for record in result)

    def solved(
        self, base: Stored, error: WeightedError, form: FactorForm, rank: int, held: tuple[Tensor, Tensor] | None = None
    ) -> "Solved":
        """base, whose error that is, with the best L for it; `held` factors stay, and `rank` comes on top of theirs."""
        if held is None:
            up, down = error.best(rank)
        else:
            up, down = held
            if rank:
                more = best_low_rank(error.error_OI - up @ down, self.metric, rank)
                up, down = torch.cat((up, more[0]), 1), torch.cat((down, more[1]), 0)
        return self._rated(base, error, store_factors(up, down, form, error, self._feedback(form)))

    def followed(self, base: Stored, error: WeightedError, form: FactorForm, low_rank: LowRank) -> "Solved":
        """base, whose error that is, with an L for it that starts from the one before."""
        return self._rated(base, error, follow_factors(low_rank, form, error, self._feedback(form)))

    def _rated(self, base: Stored, error: WeightedError, low_rank: LowRank) -> "Solved":
        return Solved(self.with_term(base, low_rank), low_rank, error.left_by(*low_rank.factors()))

    def forms(self) -> list[tuple[FactorForm, int]]:
        """Every form of the factors to try, with its rank, the plain 16-bit one first."""
        config, (rows, columns) = self.config, self.shape
        if config.factor_bits is not None:
            return [(FactorForm(config.factor_bits, config.factor_dtype), config.rank)]
        budget = FactorForm(16).stored_bits(config.rank, rows, columns)
        forms = [FactorForm(16, config.factor_dtype), FactorForm(8), FactorForm(4)]
        ranked = [(form, form.largest_rank(budget, rows, columns)) for form in forms]
        return [ranked[0], *((form, rank) for form, rank in ranked[1:] if rank > config.rank)]

    def _feedback(self, form: FactorForm) -> InverseFactor | None:
        """What the rounding of down feeds its errors back by."""
        if form.bits == 16 or self.metric.moment_II is None:
            return None
        return factor_of(self.parts[0].statistics.inputs, 0.01, True)


@dataclass(frozen=True)
class Solved:
    """Q + L, the L of all parts, and what is left of the squared error."""

    stored: Stored
    low_rank: LowRank
    squared_error: float


def needs(config: Decomposition) -> frozenset[str]:
    wanted = {"plain": set(), "absmean": {"absmean"}, "diagonal": {"norms"}, "fisher": {"fisher"}, "second_moment": {"second_moment"}}
    gptq = {"second_moment"} if config.requantize and config.quantizer == "gptq" else set()
    inputs = {"norms"} if config.shared else set()  # who reads one input is seen by whose statistics are one
    result = frozenset(wanted[config.metric] | gptq | inputs)
    has_norms = "second_moment" in result or not config.requantize
    return result if has_norms else result | clip_needs(config.clip)


def decompose(
    weight: StoredWeight, target_OI: Tensor, statistics: LayerStatistics, config: Decomposition
) -> tuple[StoredWeight, dict[str, float]]:
    """The best iterate of the schedule, by the config's metric, measured on the factors as stored; never worse than L = 0.

    Metrics: relative_error_before (the record as it came, without L) and relative_error, both ‖(W − Ŵ)·S‖ / ‖W·S‖; rank and
    factor_bits of the result; iterations run; best_iteration (0: nothing beat L = 0, and up is 0); and what `metric_of` says
    of the statistics. ValueError for a rank above min(O, I), non-finite statistics, or a Fisher metric without a Fisher diagonal.
    """
    metric, notes = metric_of(statistics, config.metric)
    part = FactoredMatrix(replace(weight, low_rank=None), target_OI, statistics)
    (record,), metrics = _best(Problem((part,), metric, config))
    return record, metrics | notes


def decompose_shared(
    weights: Mapping[str, StoredWeight], targets: Mapping[str, Tensor], statistics: Mapping[str, LayerStatistics], config: Decomposition
) -> tuple[dict[str, StoredWeight], dict[str, dict[str, float]]]:
    """Matrices that read one input (q/k/v, gate/up) with one right factor, which the first of them stores: the error of the stacked matrix
    in the metric of the input is the sum of theirs, so that its closed form is exact (GlowQ, arXiv:2603.25385). The rank is that of the
    stack; metrics as `decompose` says, those of the stack. ValueError for the Fisher metric, which weighs the columns of each its own way."""
    if config.metric == "fisher":
        raise ValueError("metric: fisher weighs the columns of every matrix its own way, so they cannot share a factor; set shared: false")
    first, *others = weights
    metric, notes = metric_of(statistics[first], config.metric)
    parts = tuple(FactoredMatrix(replace(weights[n], low_rank=None), targets[n], statistics[n]) for n in weights)
    result, metrics = _best(Problem(parts, metric, config))
    records = dict(zip(weights, result, strict=True))
    for name in others:
        low_rank = records[name].low_rank
        assert low_rank is not None
        records[name] = replace(records[name], low_rank=replace(low_rank, shared=first))
    return records, dict.fromkeys(weights, metrics | notes)


def _best(problem: Problem) -> tuple[Stored, dict[str, float]]:
    """The iterate that errs least, and what `decompose` says of it."""
    check_rank(problem.config.rank, problem.shape)
    before = problem.start_error.squared
    best, least, best_at, last, previous, at = None, before, 0, None, float("inf"), 0
    for at, last in enumerate(_iterates(problem), 1):
        if last.squared_error < least:
            best, least, best_at = last.stored, last.squared_error, at
        if problem.config.stop_when_worse and last.squared_error > previous:
            break
        previous = last.squared_error
    assert last is not None
    if best is None:
        best = tuple(replace(start, low_rank=_without_effect(result)) for start, result in zip(problem.start, last.stored, strict=True))
    total = squared_error(problem.target_OI, problem.metric) or 1.0
    assert best[0].low_rank is not None
    return best, {
        "relative_error_before": (before / total) ** 0.5,
        "relative_error": (least / total) ** 0.5,
        "rank": float(best[0].low_rank.rank),
        "factor_bits": float(getattr(best[0].low_rank.up, "bits", 16)),
        "iterations": float(at),
        "best_iteration": float(best_at),
    }


def _iterates(problem: Problem) -> Iterator[Solved]:
    """Every Q + L that the schedule visits."""
    config, forms = problem.config, problem.forms()
    again = config.requantize and all(is_quantized(weight) for weight in problem.start)
    (form, rank), low_rank = forms[0], None
    if not again or config.keep_start or config.first == "kept" or len(forms) > 1:
        problem.start_error.best(max(rank for _, rank in forms))  # the smaller ranks' vectors are its first ones
        tried = [problem.solved(problem.start, problem.start_error, *choice) for choice in forms]
        errors = [solved.squared_error for solved in tried]
        chosen = errors.index(min(errors))
        vars(problem).pop("start_error", None)  # its products are not needed again
        yield tried[chosen]
        (form, rank), low_rank = forms[chosen], tried[chosen].low_rank
    if again:
        yield from _alternating(problem, form, rank, low_rank if config.first == "kept" else None)


def _alternating(problem: Problem, form: FactorForm, rank: int, low_rank: LowRank | None) -> Iterator[Solved]:
    """Q for W − L, then L for W − Q, `iterations` times, from the given L, or one of W, or none."""
    config, held = problem.config, None
    kept = _kept_rank(problem, rank) if config.kept_rank is None else config.kept_rank
    if kept:
        held = best_low_rank(problem.target_OI, problem.metric, kept)
        low_rank = LowRank(*held)
    elif config.first == "l":
        low_rank = LowRank(*best_low_rank(problem.target_OI, problem.metric, rank))
    for _ in range(config.iterations):
        base = problem.quantized(low_rank)
        error = problem.error(base)
        if config.follow and low_rank is not None and not kept:
            result = problem.followed(base, error, form, low_rank)
        else:
            result = problem.solved(base, error, form, rank - kept, held)
        low_rank = result.low_rank
        del base, error  # before the next Q is looked for
        yield result


def _kept_rank(problem: Problem, rank: int) -> int:
    """SRR's criterion (arXiv:2602.02001): the k for which (energy of W left to the quantizer) × (share of a noise's energy that
    rank r − k cannot reach) is least, both in the metric; the noise stands for the quantization error."""
    noise = torch.rand(problem.target_OI.shape, generator=torch.Generator().manual_seed(0)).to(problem.target_OI) - 0.5
    spectra = (spectrum(matrix, problem.metric).cpu() for matrix in (problem.target_OI, noise))  # CUDA sums up in no fixed order
    exposed, missed = (torch.nn.functional.pad(s_R.flip(0).cumsum(0).flip(0), (0, 1)) for s_R in spectra)
    return int((exposed[: rank + 1] * missed[: rank + 1].flip(0)).argmin())


def _without_effect(stored: StoredWeight) -> LowRank:
    """A term that adds nothing, but can be trained: up is 0, down is what was solved."""
    assert stored.low_rank is not None
    up, down = stored.low_rank.factors()
    return LowRank(torch.zeros_like(up).half(), down.half())
