"""A run as one self-contained HTML file: words, plots, tables and the protocol; no script, nothing fetched.

Knows records and templates; `run_plots`, `findings` and `advice` know what to draw and say.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from . import run_plots
from .advice import suggestions
from .columns import (
    ROLE_COLUMNS,
    Column,
    all_protocol_rows,
    extra_rows,
    layer_columns,
    protocol_lines,
    role_rows,
    series,
    series_columns,
    stage_columns,
    text_table,
    used,
)
from .drawing import describe, inline_svg
from .findings import findings, named
from .plain_rows import rivals
from .record import RunRecord, StageRecord, perplexity_ratio
from .units import exact, number, percent, ratio, size

LONG = 200
Row = TypeVar("Row")
LABELS = {
    "hurt": "Hurt most",
    "helped": "Helped",
    "layers": "Layers",
    "noise": "Noise",
    "adaptation": "Domain",
    "bytes": "Bytes",
    "allocation": "Allocation",
    "note": "Note",
    "try": "Try",
    "protocol": "Protocol",
    "unbeaten": "Unbeaten",
    "loses": "Loses",
}


@dataclass(frozen=True)
class Cell:
    """Text for the reader; `exact`: the number(s) behind it at full precision."""

    text: str
    exact: str
    label: str
    classes: str


@dataclass(frozen=True)
class Records:
    columns: Sequence[Column[Any]]
    rows: Sequence[Sequence[Cell]]
    title: str = ""


@dataclass(frozen=True)
class Plot:
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Card:
    title: str
    text: str
    below: str


def html(record: RunRecord) -> str:
    """The page of one run."""
    results = findings(record)
    sentences = [(finding.kind, LABELS[finding.kind], finding.text) for finding in results if finding.kind != "summary"]
    columns = stage_columns(record.stages)
    quality = [column for column in columns if column.group in ("quality", "both")]
    cost = [column for column in columns if column.group in ("cost", "both")]
    measured_cost = used([column for column in cost if column.group == "cost"], record.stages)
    chosen = _allocated(record.stages)
    roles = role_rows(chosen.layers) if chosen else []
    return template("page.html.jinja").render(
        title=f"{record.model}: {record.run}",
        record=record,
        protocol_line="; ".join(protocol_lines(record)),
        lead=next((finding.text for finding in results if finding.kind == "summary"), ""),
        cards=_cards(record),
        sentences=sentences,
        tips=[("try", LABELS["try"], text) for text in suggestions(record)],
        figures=_figures(record),
        quality=records(used(quality, record.stages), record.stages),
        texts=[records(used(text_table(name), record.stages), record.stages, f"On {name}") for name in record.texts],
        cost=records(used(cost, record.stages), record.stages) if measured_cost else None,
        extra=_extra(record),
        series=[
            records(series_columns(rows), rows, f"{stage.stage}: {name.replace('_', ' ')}, {len(rows)} rows")
            for stage in record.stages
            for name, rows in series(stage)
        ],
        roles=records(used(ROLE_COLUMNS, roles), roles, f"By type of layer, {named(chosen)}") if chosen and roles else None,
        layers=[records(layer_columns(stage.layers), stage.layers, _layer_title(stage)) for stage in record.stages if stage.layers],
        settings=[(named(stage), _listed(stage.settings)) for stage in record.stages if stage.settings],
        protocol=all_protocol_rows(record) or [("protocol", "not recorded")],
        environment=[(str(key), _text(value)) for key, value in record.environment.items()],
    )


def template(name: str) -> Template:
    """A template of this folder; an undefined name in it is an error, and everything is escaped."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    environment.filters["code"] = code
    return environment.get_template(name)


def code(text: str) -> Markup:
    """Escaped text with `words between backticks` as <code>."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def records(columns: Sequence[Column[Row]], rows: Sequence[Row], title: str = "") -> Records:
    return Records(columns, [[_cell(column, row) for column in columns] for row in rows], title)


def _cell(column: Column[Row], row: Row) -> Cell:
    value = column.get(row)
    parts = value if isinstance(value, tuple) else (value,)
    exact = " ".join(repr(part) for part in parts if isinstance(part, int | float) and not isinstance(part, bool))
    classes = ["number"] if column.numeric else []
    classes += ["empty"] if value is None else []
    classes += ["wide"] if column.key == "way" else []
    classes += ["long"] if isinstance(value, tuple) or not column.numeric else []
    return Cell(column.show(value), exact, column.title, " ".join(classes))


def _cards(record: RunRecord) -> list[Card]:
    """The last stage's four or five numbers that matter most, each with what it compares to."""
    baseline = record.baseline
    if baseline is None:
        return []
    last, first = record.stages[-1], baseline
    cards = []
    if last.perplexity is not None:
        moved = perplexity_ratio(last.perplexity, first.perplexity)
        below = "baseline" if last is first else f"{ratio(moved)} the baseline’s {number(first.perplexity)}"
        cards.append(Card("Perplexity", number(last.perplexity), below))
    if last.total_bytes is not None:
        below = (
            f"{percent(last.total_bytes / first.total_bytes)} of {size(first.total_bytes)}"
            if first.total_bytes and last is not first
            else "weights on disk"
        )
        cards.append(Card("Size on disk", size(last.total_bytes), below))
    if last.bits_per_weight is not None:
        cards.append(Card("Bits per weight", number(last.bits_per_weight, 3), "compressed linears, all counted"))
    if last.top1_agreement is not None and last is not first:
        cards.append(
            Card("Agrees with baseline", percent(last.top1_agreement), f"of next tokens; KL {number(last.kl_to_baseline, 3)} nats")
        )
    if last.tokens_per_second is not None:
        cards.append(Card("Speed", number(last.tokens_per_second, 3), "tokens per second"))
    return cards


def _figures(record: RunRecord) -> list[Plot]:
    stages = record.stages
    chosen = _allocated(stages)
    trained = [(stage, figure) for stage in stages if (figure := run_plots.training(stage)) is not None]
    by_stage = "Bars: two paired standard errors of the difference to the baseline. Logarithmic."
    plain = rivals(record)
    by_size = "The way from the baseline to the last stage; down and to the left is better."
    by_size += " Circles: plain methods on this model with the default recipe's embeddings, as published." if plain else ""
    by_layer = "Relative output error of every compressed linear, by block and type."
    drawn = [
        ("Perplexity by stage", by_stage, run_plots.perplexity_by_stage(stages)),
        ("Size against perplexity", by_size, run_plots.size_against_perplexity(stages, plain)),
        ("Where the error is", by_layer, run_plots.error_heat_map(stages)),
    ]
    for stage, figure in trained:
        drawn.append((f"Training: {named(stage)}", "Loss by step; the dashed line is the step that was kept.", figure))
    if chosen is not None:
        text = f"What each linear was given at {named(chosen)}."
        drawn.append(("Bits and rank by layer", text, run_plots.allocation(chosen.layers)))
        text = "Each point is a linear; on the dashed line the prediction was right."
        drawn.append(("Predicted against measured loss", text, run_plots.predicted_against_measured(chosen.layers)))
    return [
        Plot(title, caption, inline_svg(figure, f"plot{index}", _description(title, record)))
        for index, (title, caption, figure) in enumerate(drawn)
        if figure is not None
    ]


def _allocated(stages: Sequence[StageRecord]) -> StageRecord | None:
    """The last stage that has predicted losses, else the first whose layers of one type differ in bits or rank."""
    predicted = [stage for stage in stages if any("predicted_loss" in layer.metrics for layer in stage.layers)]
    return next(reversed(predicted), None) or next((stage for stage in stages if _mixed(stage)), None)


def _mixed(stage: StageRecord) -> bool:
    given: dict[object, set[tuple[object, object]]] = {}
    for layer in stage.layers:
        given.setdefault(layer.role, set()).add((layer.bits_per_weight, layer.rank))
    return any(len(different) > 1 for different in given.values())


def _description(title: str, record: RunRecord) -> str:
    values = describe([(stage.stage, stage.perplexity) for stage in record.stages])
    return f"{title}: perplexity {values}" if values and "erplexity" in title else title


def _extra(record: RunRecord) -> Records | None:
    rows = extra_rows(record.stages)
    columns: tuple[Column[tuple[str, str, float]], ...] = (
        Column("stage", "stage", lambda row: row[0], str, numeric=False),
        Column("name", "what", lambda row: row[1], str, numeric=False),
        Column("value", "value", lambda row: row[2], exact),
    )
    return records(columns, rows) if rows else None


def _layer_title(stage: StageRecord) -> str:
    return f"{named(stage)}: {len(stage.layers)} layer{'' if len(stage.layers) == 1 else 's'}"


def _listed(settings: Mapping[str, object]) -> str:
    """Settings as words; what names hundreds of matrices is cut short, the other formats have it in full."""
    texts = {key: _text(value) for key, value in settings.items() if value is not None}
    return ", ".join(f"{key} {text if len(text) <= LONG else f'{text[:LONG]}… ({len(text):,} characters)'}" for key, text in texts.items())


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
