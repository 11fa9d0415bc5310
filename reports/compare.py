"""Comparison of several runs: one row each, the Pareto line of bytes against perplexity, and which runs lose at equal bytes.

Perplexities are compared only between runs of one protocol, text and model. Where two runs differ by less than two standard errors, neither
is called better: the paired error between two runs is at most the sum of their paired errors to a common baseline.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .columns import PROTOCOL_TITLES, Column, protocol_text, stage_columns, used
from .pareto import pareto_front
from .record import SCHEMA, RunRecord, StageRecord
from .tables import cells, fitted_table, fitting, markdown_table, paragraph, plain_table, short_cells
from .units import difference, number

EQUAL_BYTES = 0.01


@dataclass(frozen=True)
class Entry:
    """A run's last measured stage, with the time and memory of the whole run."""

    run: str
    model: str
    way: str
    stage: StageRecord
    protocol: str
    on_front: bool = False
    beaten_by: str | None = None
    verdict: str = ""


def entries(runs: Sequence[RunRecord]) -> list[Entry]:
    """One entry per run that has a measured stage, in the given order, each with its verdict."""
    result = [entry for run in runs if (entry := _entry(run)) is not None]
    for members in groups(result):
        if len(members) == 1 < len(result):
            result[members[0]] = replace(result[members[0]], verdict="not judged: no other run has its model and protocol")
            continue
        placed = [index for index in members if result[index].stage.total_bytes is not None]
        front = {placed[index] for index in pareto_front([_point(result[index]) for index in placed])}
        for index in placed:
            rivals = [result[other] for other in placed if other != index]
            result[index] = _judged(result[index], index in front, rivals)
    return result


def groups(result: Sequence[Entry]) -> list[list[int]]:
    """The places of the entries that may be judged against one another: of one model, measured on one text under one protocol."""
    alike: dict[tuple[str, str], list[int]] = {}
    for index, entry in enumerate(result):
        alike.setdefault((entry.model, entry.protocol), []).append(index)
    return list(alike.values())


def warnings(runs: Sequence[RunRecord]) -> list[str]:
    """What forbids or weakens the comparison."""
    result = [entry for run in runs if (entry := _entry(run)) is not None]
    texts = []
    if len({entry.protocol for entry in result}) > 1:
        texts.append(f"These runs were measured under different protocols, so their perplexities do not compare. {_apart(result)}")
    for name in dict.fromkeys(name for run in runs for name in run.texts):
        if len({run.texts[name].identity() for run in runs if name in run.texts}) > 1:
            texts.append(f"The runs measured {name} under different protocols, so its perplexities do not compare.")
    if len({entry.model for entry in result}) > 1:
        named = _who([(entry.run, entry.model) for entry in result])
        texts.append(
            f"These runs are of different models ({named}): token perplexities compare only within one tokenizer; bits per byte do across."
        )
    if missing := [run.run for run in runs if run.run not in {entry.run for entry in result}]:
        texts.append(f"Not measured yet: {', '.join(missing)}.")
    return texts


def _apart(result: Sequence[Entry]) -> str:
    """In which fields of the protocol they differ, and who has what."""
    known = [(entry.run, json.loads(entry.protocol)) for entry in result]
    apart = [key for key in PROTOCOL_TITLES if len({json.dumps(protocol[key]) for _, protocol in known}) > 1]
    return " ".join(
        f"{PROTOCOL_TITLES[key].capitalize()}: {_who([(run, protocol_text(protocol[key])) for run, protocol in known])}." for key in apart
    )


def _who(pairs: Sequence[tuple[str, str]]) -> str:
    """`512 (a, b), 2,048 (c)` from (run, value)."""
    values = dict.fromkeys(value for _, value in pairs)
    return ", ".join(f"{value} ({', '.join(run for run, its in pairs if its == value)})" for value in values)


def columns(result: Sequence[Entry]) -> list[Column[Entry]]:
    """A run's head, its last stage's columns, the verdict."""
    left_out = ("stage", "method", "nll_difference_previous", "gap_closed", "trainable_parameters")
    of_stage = [column for column in stage_columns([entry.stage for entry in result]) if column.key not in left_out]
    return [
        Column("run", "run", lambda entry: entry.run, str, numeric=False),
        Column("way", "stages", lambda entry: entry.way, str, numeric=False),
        *(column.read_by(_of_last_stage(column)) for column in of_stage),
        Column("verdict", "at equal bytes", lambda entry: entry.verdict or None, number, numeric=False),
    ]


def _of_last_stage(column: Column[StageRecord]) -> Callable[[Entry], object]:
    return lambda entry: column.get(entry.stage)


def table(runs: Sequence[RunRecord], markdown: bool = False, width: int | None = None) -> str:
    """Plain text (of at most `width` characters) or Markdown; below the plain table what each run did and its verdict, then the warnings."""
    result, below = entries(runs), warnings(runs)
    every = columns(result)
    if markdown:
        return markdown_table(*cells(used(every, result), result)) + "".join(f"\n{line}\n" for line in below)
    shown = [column for column in every if column.key not in ("way", "verdict")]
    if width is None:
        text = plain_table(*cells(used(shown, result), result))
    else:
        text = fitted_table(*short_cells(fitting(shown, result, width), result), width)
    lines = [f"{entry.run}: {entry.way}{f'; {entry.verdict}' if entry.verdict else ''}" for entry in result]
    return text + "".join(f"\n{paragraph(line, width)}\n" for line in [*lines, *below])


def json_text(runs: Sequence[RunRecord]) -> str:
    """One object: a list of runs with their last stage's numbers (layers left out), the Pareto line and the verdicts."""
    rows = []
    for entry in entries(runs):
        stage = entry.stage.to_json()
        stage.pop("layers")
        head = {"run": entry.run, "model": entry.model, "stages": entry.way}
        rows.append({**head, **stage, "pareto": entry.on_front, "beaten_by": entry.beaten_by, "verdict": entry.verdict})
    return json.dumps({"schema": SCHEMA, "runs": rows, "warnings": warnings(runs)}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _entry(run: RunRecord) -> Entry | None:
    measured = [stage for stage in run.stages if stage.perplexity is not None and math.isfinite(stage.perplexity)]
    if not measured:
        return None
    taken = [stage.seconds for stage in run.stages if stage.seconds is not None]
    peaks = [stage.peak_bytes for stage in run.stages if stage.peak_bytes is not None]
    whole = replace(measured[-1], seconds=math.fsum(taken) if taken else None, peak_bytes=max(peaks, default=None))
    way = " → ".join(_step(stage) for stage in run.stages if stage.stage not in ("baseline", "fuse")) or run.stages[-1].stage
    return Entry(run.run, run.model, way, whole, run.protocol.identity())


def _step(stage: StageRecord) -> str:
    """`gptq 3 bit g64`: a method with the settings that decide its bytes."""
    settings = stage.settings
    parts = [stage.method or stage.stage]
    for key, text in (("bits", "{} bit"), ("group_size", "g{}"), ("sparsity", "{}"), ("pattern", "{}"), ("rank", "r{}")):
        if settings.get(key) is not None and settings[key] != "unstructured":
            parts.append(text.format(settings[key]))
    return " ".join(parts)


def _point(entry: Entry) -> tuple[float, float]:
    return float(entry.stage.total_bytes or 0), float(entry.stage.perplexity or math.inf)


def _judged(entry: Entry, on_front: bool, rivals: Sequence[Entry]) -> Entry:
    """Beaten: another run needs no more bytes (within 1 %) and is better by more than two standard errors."""
    size, perplexity = _point(entry)
    beating = []
    for rival in rivals:
        rival_size, rival_perplexity = _point(rival)
        gain = math.log(perplexity / rival_perplexity)
        if rival_size <= size * (1 + EQUAL_BYTES) and gain > _noise(entry, rival):
            beating.append((rival_perplexity, rival, gain, rival_size))
    if not beating:
        return replace(entry, on_front=on_front, verdict="not beaten by a run of its size or below")
    _, best, gain, best_size = min(beating, key=lambda item: item[0])
    where = "at equal bytes" if abs(best_size / size - 1) <= EQUAL_BYTES else f"with {100 * (1 - best_size / size):.0f} % fewer bytes"
    error = _noise(entry, best) / 2
    verdict = f"loses to {best.run} {where}: {difference(gain, error if error > 0 else None)} nats per token"
    return replace(entry, on_front=on_front, beaten_by=best.run, verdict=verdict)


def _noise(a: Entry, b: Entry) -> float:
    """Two standard errors of the difference, from above."""
    return 2 * ((a.stage.nll_difference_stderr or 0.0) + (b.stage.nll_difference_stderr or 0.0))
