"""Several runs beside each other: one row each, the Pareto line of bytes against perplexity, and who loses at equal bytes.

Perplexities are compared only between runs of one protocol. Where two runs differ by less than two standard errors, neither
is called better: the paired error between two runs is at most the sum of their paired errors to a common baseline.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .columns import Column, protocol_line, stage_columns, used
from .drawing import WIDTH, inline_svg
from .page import LABELS, Plot, records, template
from .plots import pareto_figure, pareto_front
from .record import SCHEMA, RunRecord, StageRecord
from .tables import cells, markdown_table, plain_table
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
    found = [entry for run in runs if (entry := _entry(run)) is not None]
    groups: dict[str, list[int]] = {}
    for index, entry in enumerate(found):
        groups.setdefault(entry.protocol, []).append(index)
    for members in groups.values():
        placed = [index for index in members if found[index].stage.total_bytes is not None]
        front = {placed[index] for index in pareto_front([_point(found[index]) for index in placed])}
        for index in placed:
            rivals = [found[other] for other in placed if other != index]
            found[index] = _judged(found[index], index in front, rivals)
    return found


def warnings(runs: Sequence[RunRecord]) -> list[str]:
    """What forbids or weakens the comparison."""
    found = [entry for run in runs if (entry := _entry(run)) is not None]
    texts = []
    if len({entry.protocol for entry in found}) > 1:
        named = "; ".join(f"{run.run}: {protocol_line(run.protocol)}" for run in runs)
        texts.append(f"These runs were measured under different protocols, so their perplexities do not compare ({named}).")
    for name in dict.fromkeys(name for run in runs for name in run.texts):
        if len({run.texts[name].identity() for run in runs if name in run.texts}) > 1:
            texts.append(f"The runs measured {name} under different protocols, so its perplexities do not compare.")
    if len({entry.model for entry in found}) > 1:
        texts.append("These runs are of different models: token perplexities compare only within one tokenizer; bits per byte do across.")
    if missing := [run.run for run in runs if run.run not in {entry.run for entry in found}]:
        texts.append(f"Not measured yet: {', '.join(missing)}.")
    return texts


def columns(found: Sequence[Entry]) -> list[Column]:
    """Those in use: a run's head, its last stage's, the verdict."""
    left_out = ("stage", "method", "nll_difference_previous", "gap_closed", "trainable_parameters")
    of_stage = [column for column in stage_columns([entry.stage for entry in found]) if column.key not in left_out]
    every = [
        Column("run", "run", lambda entry: entry.run, str, numeric=False),
        Column("way", "stages", lambda entry: entry.way, str, numeric=False),
        *(replace(column, get=(lambda get: lambda entry: get(entry.stage))(column.get)) for column in of_stage),
        Column("verdict", "at equal bytes", lambda entry: entry.verdict or None, number, numeric=False),
    ]
    return used(every, found)


def table(runs: Sequence[RunRecord], markdown: bool = False) -> str:
    """Plain text or Markdown, warnings below the table."""
    found = entries(runs)
    parts = cells(columns(found), found)
    text = markdown_table(*parts) if markdown else plain_table(*parts)
    return text + "".join(f"\n{line}\n" for line in warnings(runs))


def json_text(runs: Sequence[RunRecord]) -> str:
    """One object: a list of runs with their last stage's numbers (layers left out), the Pareto line and the verdicts."""
    rows = []
    for entry in entries(runs):
        stage = entry.stage.to_json()
        stage.pop("layers")
        head = {"run": entry.run, "model": entry.model, "stages": entry.way}
        rows.append({**head, **stage, "pareto": entry.on_front, "beaten_by": entry.beaten_by, "verdict": entry.verdict})
    return json.dumps({"schema": SCHEMA, "runs": rows, "warnings": warnings(runs)}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def html(runs: Sequence[RunRecord]) -> str:
    """A self-contained page: the table, the verdicts and the figure."""
    found = entries(runs)
    hidden = {"verdict"} if len({entry.model for entry in found}) > 1 else {"verdict", "bits_per_byte"}
    sentences = [("protocol", LABELS["protocol"], text) for text in warnings(runs)]
    for entry in found:
        if entry.verdict:
            kind = "loses" if entry.beaten_by else "unbeaten"
            sentences.append((kind, LABELS[kind], f"{entry.run}: {entry.verdict}."))
    return template("compare.html.jinja").render(
        title=f"{len(found)} runs compared",
        models=", ".join(dict.fromkeys(entry.model for entry in found)),
        protocol_line="; ".join(dict.fromkeys(protocol_line(run.protocol) for run in runs)),
        sentences=sentences,
        figures=_figures(found),
        runs=records([column for column in columns(found) if column.key not in hidden], found),
    )


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


def _figures(found: Sequence[Entry]) -> list[Plot]:
    plots = []
    for index, protocol in enumerate(dict.fromkeys(entry.protocol for entry in found)):
        rows: list[dict[str, Any]] = [
            {
                "megabytes": entry.stage.total_bytes / 1e6,
                "perplexity": entry.stage.perplexity,
                "run": entry.run,
                "kind": "loses" if entry.beaten_by else "unbeaten",
            }
            for entry in found
            if entry.protocol == protocol and entry.stage.total_bytes is not None
        ]
        if rows:
            figure = pareto_figure(
                rows, "megabytes", "perplexity", "run", "kind", xlabel="size on disk, MB", ylabel="perplexity", width=WIDTH
            )
            text = "Down and to the left is better; the line joins the runs that no other beats in both."
            described = ", ".join(f"{row['run']} {number(row['megabytes'])} MB {number(row['perplexity'])}" for row in rows)
            plots.append(Plot("Perplexity against total bytes", text, inline_svg(figure, f"plot{index}", described)))
    return plots
