"""Records as text: a table for a terminal, plain text, Markdown, CSV.

Knows widths, quoting and alignment; `columns` knows what is in a table.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from rich.table import Table
from rich.text import Text

from .columns import Column, layer_columns, series, stage_columns, used
from .record import RunRecord, StageRecord, finite
from .units import number as number


def rich_table(columns: Sequence[Column], rows: Sequence[Any], title: str | None = None, width: int | None = None) -> Table:
    """A rich table of the columns in use; those of high rank are left out until it fits `width` characters."""
    shown = used(columns, rows)
    while width is not None and _table_width(shown, rows) > width and any(column.rank for column in shown):
        shown.remove(max(shown, key=lambda column: column.rank))
    table = Table(title=title, title_justify="left", header_style="bold", pad_edge=False, box=None, padding=(0, 1))
    for column in shown:
        table.add_column(column.short or column.title, justify="right" if column.numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(column.show(column.get(row))) for column in shown))
    return table


def _table_width(columns: Sequence[Column], rows: Sequence[Any]) -> int:
    widths = [
        max(len(text) for text in (column.short or column.title, *(column.show(column.get(row)) for row in rows))) for column in columns
    ]
    return sum(widths) + 2 * (len(columns) - 1)


def plain_table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[bool]) -> str:
    """Aligned text without colours or lines."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(header))]
    lines = [
        "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, numeric, strict=True))
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines) + "\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[bool]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|" + "|".join("---:" if right else "---" for right in numeric) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)]) + "\n"


def cells(columns: Sequence[Column], rows: Sequence[Any]) -> tuple[list[str], list[list[str]], list[bool]]:
    """(header, rows of text, which columns are numeric), as the two functions above take them."""
    return (
        [column.title for column in columns],
        [[column.show(column.get(row)) for column in columns] for row in rows],
        [column.numeric for column in columns],
    )


def stage_table(record: RunRecord, markdown: bool = False) -> str:
    table = cells(used(stage_columns(record.stages), record.stages), record.stages)
    return markdown_table(*table) if markdown else plain_table(*table)


def layer_table(stage: StageRecord, markdown: bool = False) -> str:
    table = cells(layer_columns(stage.layers), stage.layers)
    return markdown_table(*table) if markdown else plain_table(*table)


def csv_text(record: RunRecord) -> str:
    """Tidy rows at full precision: `kind` is "stage", "series" or "layer"; extra metrics, settings and protocol are dotted columns."""
    rows: list[dict[str, Any]] = []
    protocol = _flat(record.protocol.to_json(), "protocol")
    for text, other in record.texts.items():
        protocol |= _flat(other.to_json(), f"texts.{text}.protocol")
    for index, stage in enumerate(record.stages):
        data = stage.to_json()
        head = {"run": record.run, "model": record.model, "stage_index": index, "stage": stage.stage, "method": stage.method}
        layers, notes = data.pop("layers"), data.pop("notes")
        for name in ("metrics", "settings", "texts"):
            data.update(_flat(data.pop(name), name))
        rows.append({**head, "kind": "stage", **data, "notes": " | ".join(notes), **protocol})
        for name, steps in series(stage):
            rows += [{**head, "kind": "series", "series": name, **_flat(finite(step), name)} for step in steps]
            rows[-len(steps) - 1].pop(f"metrics.{name}", None)
        for layer in layers:
            name = layer.pop("name")
            layer.update(_flat(layer.pop("metrics"), "metrics"))
            rows.append({**head, "kind": "layer", "layer": name, **layer})
    return _csv(rows)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    first = ["run", "model", "stage_index", "kind", "stage", "method", "layer", "block", "role"]
    known = first + [f.name for f in fields(StageRecord)] + ["relative_output_error", "rank"]
    present = dict.fromkeys(key for row in rows for key in row)
    header = [key for key in dict.fromkeys(known) if key in present] + [key for key in present if key not in known]
    out = io.StringIO()
    writer = csv.DictWriter(out, header, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _flat(value: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        name = f"{prefix}.{key}"
        if isinstance(inner, Mapping):
            flat.update(_flat(inner, name))
        elif isinstance(inner, list):
            flat[name] = json.dumps(inner, ensure_ascii=False)
        else:
            flat[name] = inner
    return flat
