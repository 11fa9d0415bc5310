"""What the command line calls: a run as text in one of the formats, or on a terminal; several runs compared."""

from collections.abc import Callable, Sequence
from typing import Literal

from rich.console import Console
from rich.text import Text

from .advice import suggestions
from .columns import all_protocol_rows, extra_rows, protocol_lines, series, series_columns, stage_columns, text_table, used
from .findings import findings
from .record import RunRecord, dumps
from .tables import cells, csv_text, layer_table, markdown_table, rich_table, stage_table
from .units import exact

Format = Literal["html", "md", "csv", "json"]
ComparisonFormat = Literal["table", "md", "html", "json"]
TONES = {"hurt": "red", "helped": "green", "noise": "yellow", "adaptation": "yellow", "bytes": "yellow"}


def render(record: RunRecord, format: Format) -> str:
    """The report of a run as the text of one file."""
    known: dict[str, Callable[[RunRecord], str]] = {"html": _html, "md": markdown, "csv": csv_text, "json": dumps}
    if format not in known:
        raise ValueError(f"unknown report format {format!r}; choose one of {', '.join(known)}")
    return known[format](record)


def show(record: RunRecord, console: Console) -> None:
    """The stage table and the words, for a terminal."""
    console.print(rich_table(stage_columns(record.stages), record.stages, title=f"{record.model}, {record.run}", width=console.width))
    console.print(Text(f"perplexity on {'; '.join(protocol_lines(record))}", style="dim"))
    for found in findings(record):
        console.print(Text(found.text, style=TONES.get(found.kind, "")))
    for tip in suggestions(record):
        console.print(Text(f"try: {tip.replace('`', '')}", style="cyan"))


def compare(records: Sequence[RunRecord], format: ComparisonFormat = "table") -> str:
    """Several runs as one text: a plain or Markdown table, JSON, or a page."""
    from .compare import html, json_text, table

    known: dict[str, Callable[[Sequence[RunRecord]], str]] = {
        "table": table,
        "md": lambda runs: table(runs, markdown=True),
        "html": html,
        "json": json_text,
    }
    if format not in known:
        raise ValueError(f"unknown comparison format {format!r}; choose one of {', '.join(known)}")
    return known[format](records)


def markdown(record: RunRecord) -> str:
    """The whole record for a pull request or a README: words and stage table first, layers last."""
    line = f"Perplexity on {'; '.join(protocol_lines(record))}.\n"
    parts = [f"# {record.model}: {record.run}\n", line, stage_table(record, markdown=True)]
    sentences = [found.text for found in findings(record)] + [f"Try: {tip}" for tip in suggestions(record)]
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


def _html(record: RunRecord) -> str:
    from .page import html

    return html(record)
