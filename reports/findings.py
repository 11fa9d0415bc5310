"""A run's results in sentences: what each stage did to perplexity, which layers suffered. What to try next is `advice`.

Every sentence follows from numbers of the record. A change within two paired standard errors is called noise, one that no printed digit
shows is no verdict either; a perplexity below the baseline is called adaptation to the text's domain.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

from .json_values import is_finite, real
from .record import LayerRecord, RunRecord, StageRecord
from .units import difference, duration, number, percent, size

SLIGHT = 5e-4
"""Relative change of perplexity that is written as 0.0 %."""
KINDS = ("summary", "hurt", "helped", "layers", "noise", "adaptation", "bytes", "allocation", "note")


@dataclass(frozen=True)
class Finding:
    """One sentence or two; `kind` is one of KINDS."""

    kind: str
    text: str


@dataclass(frozen=True)
class Change:
    """From one measured stage to the next: nats per token (positive is worse) and its paired standard error."""

    before: StageRecord
    after: StageRecord
    nats: float
    stderr: float | None

    @property
    def is_noise(self) -> bool:
        return self.stderr is not None and abs(self.nats) <= 2 * self.stderr

    @property
    def is_slight(self) -> bool:
        return abs(math.expm1(self.nats)) < SLIGHT

    @property
    def counts(self) -> bool:
        """Whether it may be called a loss or a gain."""
        return not self.is_noise and not self.is_slight

    @property
    def text(self) -> str:
        """`perplexity 28.69 → 43.40 (+51.3 %)`."""
        growth = percent(math.expm1(self.nats))
        return f"perplexity {number(self.before.perplexity)} → {number(self.after.perplexity)} ({'+' if self.nats > 0 else ''}{growth})"


def findings(record: RunRecord) -> list[Finding]:
    """Sentences about a run, in the order they should be read."""
    result = changes(record.stages)
    worst = worst_change(result)
    sentences = [*_summary(record), *_hurt(result, worst), *_helped(result)]
    if worst is not None:
        sentences += _layers(worst.after)
    sentences += [*_noise(result), *_adaptation(record), *_expensive_factors(record), *_budget(record), *_prediction(record)]
    return sentences + _notes(record.stages)


def changes(stages: Sequence[StageRecord]) -> list[Change]:
    """Between consecutive stages that have a perplexity, in ln(perplexity) where no paired difference was measured."""
    known = [stage for stage in stages if is_finite(stage.perplexity) and (stage.perplexity or 0) > 0]
    result = []
    for before, after in pairwise(known):
        measured = after.nll_difference_previous
        moved = math.log((after.perplexity or 1) / (before.perplexity or 1)) if measured is None else measured
        result.append(Change(before, after, moved, after.nll_difference_previous_stderr))
    return result


def named(stage: StageRecord) -> str:
    return f"{stage.stage} ({stage.method})" if stage.method and stage.method != stage.stage else stage.stage


def _notes(stages: Sequence[StageRecord]) -> list[Finding]:
    """Every note once, with the stages that made it."""
    makers: dict[str, list[str]] = {}
    for stage in stages:
        for note in stage.notes:
            makers.setdefault(note, []).append(stage.stage)
    return [Finding("note", f"{', '.join(names)}: {note}") for note, names in makers.items()]


def worst_change(result: Sequence[Change]) -> Change | None:
    rising = [change for change in result if change.nats > 0 and change.counts]
    return max(rising, key=lambda change: change.nats, default=None)


def _summary(record: RunRecord) -> list[Finding]:
    baseline = record.baseline
    if baseline is None:
        return [Finding("summary", "No stage has been measured yet.")]
    last = record.stages[-1]
    if last is baseline:
        return [Finding("summary", f"Only the baseline has been measured: perplexity {number(last.perplexity)}, {size(last.total_bytes)}.")]
    parts = []
    if last.kl_to_baseline is not None and any(
        stage.settings.get("loss") == "distill" for stage in record.stages
    ):  # it was taught to imitate
        agreement = "" if last.top1_agreement is None else f", the same first choice for {percent(last.top1_agreement)} of the tokens"
        parts.append(f"KL to it {number(last.kl_to_baseline)} nats per token{agreement}")
    if last.perplexity and baseline.perplexity and is_finite(last.perplexity):
        growth = last.perplexity / baseline.perplexity - 1
        parts.append(f"perplexity {number(baseline.perplexity)} → {number(last.perplexity)} ({'+' if growth > 0 else ''}{percent(growth)})")
    if last.total_bytes and baseline.total_bytes:
        share = percent(last.total_bytes / baseline.total_bytes)
        parts.append(f"{size(baseline.total_bytes)} → {size(last.total_bytes)} ({share} of the baseline)")
    if last.bits_per_weight is not None:
        parts.append(f"{number(last.bits_per_weight, 3)} bits per compressed weight")
    taken = [stage.seconds for stage in record.stages if stage.seconds is not None]
    if taken:
        parts.append(f"{duration(math.fsum(taken))} in all")
    return [Finding("summary", f"From baseline to {named(last)}: {'; '.join(parts)}.")] if parts else []


def _hurt(result: Sequence[Change], worst: Change | None) -> list[Finding]:
    if not result:
        return []
    if worst is None:
        slight = any(change.is_slight and not change.is_noise for change in result)
        least = f"{percent(SLIGHT * 2)}" if slight else "two standard errors"
        return [Finding("hurt", f"No stage raised perplexity by {'as much as' if slight else 'more than'} {least}.")]
    total = math.fsum(change.nats for change in result if change.nats > 0 and change.counts)
    share = f", {percent(worst.nats / total)} of all that was lost on the way" if worst.nats < total else ""
    error = "" if worst.stderr is None else f"; {difference(worst.nats, worst.stderr)} nats per token"
    return [Finding("hurt", f"{named(worst.after)} hurt most: {worst.text}{share}{error}.")]


def _helped(result: Sequence[Change]) -> list[Finding]:
    falling = [change for change in result if change.nats < 0 and change.counts]
    sentences = []
    for change in falling:
        closed = change.after.gap_closed
        gap = "" if closed is None else f", {percent(closed)} of the log-perplexity gap to the baseline"
        sentences.append(Finding("helped", f"{named(change.after)} helped: {change.text}{gap}."))
    return sentences


def _layers(stage: StageRecord) -> list[Finding]:
    """The layers with the largest relative output error, and the role or blocks where errors gather."""
    measured = [layer for layer in stage.layers if is_finite(layer.relative_output_error)]
    if len(measured) < 2:
        return []
    ordered = sorted(measured, key=_error, reverse=True)
    listed = ", ".join(f"{layer.name} ({number(_error(layer), 3)})" for layer in ordered[:3])
    middle = median(_error(layer) for layer in measured)
    text = f"Worst layers after {stage.stage}, by relative output error: {listed}; the median layer has {number(middle, 3)}."
    role = worst_role(measured)
    if role is not None:
        text += f" By type {role[0]} is worst: {number(role[1], 3)} on average, {number(role[1] / role[2], 2)} times the other types."
    gathered = _gathered_blocks(ordered)
    return [Finding("layers", text + (f" {gathered}" if gathered else ""))]


def worst_role(layers: Sequence[LayerRecord]) -> tuple[str, float, float] | None:
    """(role, its mean error, mean error of the others) where one role's mean is at least 1.2 times the others'."""
    means: dict[str, list[float]] = {}
    for layer in layers:
        if is_finite(layer.relative_output_error):
            means.setdefault(str(layer.role), []).append(_error(layer))
    if len(means) < 2:
        return None
    role = max(means, key=lambda name: fmean(means[name]))
    others = fmean([error for name, errors in means.items() if name != role for error in errors])
    return (role, fmean(means[role]), others) if others > 0 and fmean(means[role]) >= 1.2 * others else None


def _gathered_blocks(ordered: Sequence[LayerRecord]) -> str | None:
    """Says so where the worst tenth of the layers lies in few blocks."""
    blocks = {layer.block for layer in ordered if layer.block is not None}
    worst = [layer.block for layer in ordered[: max(4, len(ordered) // 10)] if layer.block is not None]
    places = sorted(set(worst))
    if len(blocks) < 8 or len(worst) < 4 or len(places) > max(1, len(blocks) // 6):
        return None
    return f"The worst tenth of all layers lies in block{'s' if len(places) > 1 else ''} {', '.join(map(str, places))}."


def _error(layer: LayerRecord) -> float:
    return float(layer.relative_output_error or 0.0)


def _noise(result: Sequence[Change]) -> list[Finding]:
    sentences = []
    for change in result:
        if change.is_noise:
            moved = f"{difference(change.nats, change.stderr)} nats per token"
            verdict = f"{named(change.after)}: {change.text} is within two standard errors ({moved})"
            sentences.append(Finding("noise", f"{verdict}: not a difference this evaluation can tell from none."))
        elif change.is_slight:
            sentences.append(Finding("noise", f"{named(change.after)}: {change.text} is too little to count as a loss or a gain."))
    blind = [change.after.stage for change in result if change.stderr is None]
    if blind:
        text = f"No paired standard error was recorded for {', '.join(blind)}: small changes there may be noise."
        sentences.append(Finding("noise", text))
    return sentences


def _adaptation(record: RunRecord) -> list[Finding]:
    baseline = record.baseline
    if baseline is None or not baseline.perplexity:
        return []
    below = [stage for stage in record.stages if stage is not baseline and _clearly_below(stage, baseline)]
    if not below:
        return []
    last = below[-1]
    measures = [f"top-1 agreement {percent(last.top1_agreement)}"] if last.top1_agreement is not None else []
    measures += [f"KL {number(last.kl_to_baseline)} nats"] if last.kl_to_baseline is not None else []
    distance = f" How far it is from the baseline, its {' and '.join(measures)} tell." if measures else ""
    numbers = f"{number(last.perplexity)} < {number(baseline.perplexity)}"
    reason = "That is no sign of a better model: training on text of the evaluation's domain adapts to that domain."
    return [Finding("adaptation", f"{named(last)} is below the baseline ({numbers}). {reason}{distance}")]


def _clearly_below(stage: StageRecord, baseline: StageRecord) -> bool:
    if not stage.perplexity or not baseline.perplexity or stage.perplexity >= baseline.perplexity:
        return False
    return abs(_to_baseline(stage, baseline)) > 2 * (stage.nll_difference_stderr or 0.0)


def _to_baseline(stage: StageRecord, baseline: StageRecord) -> float:
    if stage.nll_difference is not None:
        return stage.nll_difference
    return math.log((stage.perplexity or 1.0) / (baseline.perplexity or 1.0))


def _expensive_factors(record: RunRecord) -> list[Finding]:
    """A low-rank term that costs more than another bit would."""
    sentences = []
    for before, after in pairwise(record.stages):
        if before.bits_per_weight is None or after.bits_per_weight is None or not after.stage.startswith("decompose"):
            continue
        added = after.bits_per_weight - before.bits_per_weight
        if added >= 1.0:
            text = f"{named(after)} added {number(added, 3)} bits per weight, more than a further bit everywhere: compare at equal bytes."
            sentences.append(Finding("bytes", text))
    return sentences


def _budget(record: RunRecord) -> list[Finding]:
    """What a budget was spent on, and what it was expected to cost."""
    spent = [(stage, facts) for stage in record.stages if isinstance(facts := stage.metrics.get("allocation"), Mapping)]
    if not spent:
        return []
    stage, facts = spent[-1]
    given = Counter((real(layer.metrics["bits"]), layer.metrics.get("grid")) for layer in stage.layers if "bits" in layer.metrics)
    each = sorted(given.items(), key=lambda item: (item[0][0], str(item[0][1] or "")))
    bits = ", ".join(f"{count} matrices {f'have {number(size)} bits' if kind is None else f'are {kind}'}" for (size, kind), count in each)
    ranks = [layer.rank for layer in stage.layers if layer.rank and "bits" in layer.metrics]
    term = f"; {len(ranks)} have a low-rank term, of rank {min(ranks)} to {max(ranks)}" if ranks else ""
    text = f"The budget {facts.get('budget')} was spent by {named(stage)}, {facts.get('stored')} at the end of the run: {bits}{term}."
    if facts.get("weighting") == "fisher" and stage.nll_difference is not None and is_finite(facts.get("total_loss")):
        cost = f"{number(facts['total_loss'], 3)} nats per token, to second order; on the evaluation text it cost {number(stage.nll_difference, 3)}"
        text += f" Against the baseline it was predicted to cost {cost}."
    return [Finding("allocation", text)]


def _prediction(record: RunRecord) -> list[Finding]:
    """How far an allocation's predicted loss was from the measured one."""
    sentences = []
    for stage in record.stages:
        metrics = [layer.metrics for layer in stage.layers]
        pairs = [(each.get("predicted_loss"), each.get("measured_loss")) for each in metrics]
        known = [(float(p), float(m)) for p, m in pairs if is_finite(p) and is_finite(m)]
        if not known:
            continue
        predicted, measured = math.fsum(p for p, _ in known), math.fsum(m for _, m in known)
        off = f" ({percent(measured / predicted - 1)} off)" if predicted > 0 else ""
        text = f"{named(stage)}: predicted loss {number(predicted)}, measured {number(measured)}{off}, over {len(known)} layers."
        sentences.append(Finding("allocation", text))
    return sentences
