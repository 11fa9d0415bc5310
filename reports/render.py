"""What the command line calls: a run as text in one of the formats, or on a terminal; several runs compared."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from .advice import suggestions
from .columns import all_protocol_rows, extra_rows, protocol_lines, series, series_columns, stage_columns, text_table, used
from .findings import findings
from .record import RunRecord, dumps
from .tables import cells, csv_text, fitted_table, fitting, layer_table, markdown_table, paragraph, short_cells, stage_table
from .units import exact

if TYPE_CHECKING:
    from rich.console import Console

Format = Literal["html", "md", "csv", "json"]
ComparisonFormat = Literal["table", "md", "html", "json"]
TONES = {"hurt": "red", "helped": "green", "noise": "yellow", "adaptation": "yellow", "bytes": "yellow"}


def render(record: RunRecord, format: Format) -> str:
    """The report of a run as the text of one file."""
    known: dict[str, Callable[[RunRecord], str]] = {"html": _html, "md": markdown, "csv": csv_text, "json": dumps}
    if format not in known:
        raise ValueError(f"unknown report format {format!r}; choose one of {', '.join(known)}")
    return known[format](record)


def show(record: RunRecord, console: "Console") -> None:
    """The stage table and the words, for a terminal."""
    from rich.text import Text

    columns = fitting(stage_columns(record.stages), record.stages, console.width)
    console.print(Text(f"{record.model}, {record.run}", style="italic"))
    console.print(Text(fitted_table(*short_cells(columns, record.stages), console.width), end=""), soft_wrap=True)
    lines = [(f"perplexity on {'; '.join(protocol_lines(record))}", "dim")]
    lines += [(result.text, TONES.get(result.kind, "")) for result in findings(record)]
    lines += [(f"try: {tip.replace('`', '')}", "cyan") for tip in suggestions(record)]
    for line, style in lines:
        console.print(Text(paragraph(line, console.width), style=style), soft_wrap=True)


def compare(records: Sequence[RunRecord], format: ComparisonFormat = "table", width: int | None = None) -> str:
    """Several runs as one text: a plain table, of at most `width` characters, a Markdown table, JSON, or a page."""
    from .compare import json_text, table

    known: dict[str, Callable[[Sequence[RunRecord]], str]] = {
        "table": lambda runs: table(runs, width=width),
        "md": lambda runs: table(runs, markdown=True),
        "html": _comparison_page,
        "json": json_text,
    }
    if format not in known:
        raise ValueError(f"unknown comparison format {format!r}; choose one of {', '.join(known)}")
    return known[format](records)


def markdown(record: RunRecord) -> str:
    """The whole record for a pull request or a README: words and stage table first, layers last."""
    line = f"Perplexity on {'; '.join(protocol_lines(record))}.\n"
    parts = [f"# {record.model}: {record.run}\n", line, stage_table(record, markdown=True)]
    sentences = [result.text for result in findings(record)] + [f"Try: {tip}" for tip in suggestions(record)]
    parts.append("".join(f"- {text}\n" for text in sentences))
    extra = [(stage, path, exact(value)) for stage, path, value in extra_rows(record.stages)]
    if extra:
        parts += ["## Also measured\n", markdown_table(("stage", "what", "value"), extra, (False, False, True))]
    for name in record.texts:
        parts += [f"## On {name}\n", markdown_table(*cells(used(text_table(name), record.stages), record.stages))]
    for stage in record.stages:
        for name, rows in series(stage):
            table = cells(series_columns(rows), rows)
            parts += [f"## {stage.stage}: {name.replace('_', ' ')}\n", markdown_table(*table)]
    parts += ["## Protocol\n", markdown_table(("field", "value"), all_protocol_rows(record), (False, False))]
    for stage in record.stages:
        if stage.layers:
            parts += [f"## Layers after {stage.stage}\n", layer_table(stage, markdown=True)]
    return "\n".join(parts)


def _comparison_page(records: Sequence[RunRecord]) -> str:
    from .compare_page import comparison_html

    return comparison_html(records)


def _html(record: RunRecord) -> str:
    from .page import html

    return html(record)
