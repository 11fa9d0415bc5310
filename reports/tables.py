"""Records as text: a table as wide as a terminal, plain text, Markdown, CSV.

Knows widths, quoting and alignment; `columns` knows what is in a table.
"""

import csv
import io
import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import zip_longest
from typing import TypeVar

from .columns import Column, layer_columns, series, stage_columns, used
from .json_values import finite, mapping, mappings, sequence
from .record import RunRecord, StageRecord
from .units import number as number

BOUND = "\u00a0"
Row = TypeVar("Row")


def fitting(columns: Sequence[Column[Row]], rows: Sequence[Row], width: int) -> list[Column[Row]]:
    """The columns in use; those of the highest rank are left out until the table fits `width` characters."""
    shown = used(columns, rows)
    while any(column.rank for column in shown) and _natural_width(*short_cells(shown, rows)[:2]) > width:
        shown.remove(max(shown, key=lambda column: column.rank))
    return shown


def short_cells(columns: Sequence[Column[Row]], rows: Sequence[Row]) -> tuple[list[str], list[list[str]], list[bool]]:
    """As `cells`, under the short titles."""
    _, texts, numeric = cells(columns, rows)
    return [column.short or column.title for column in columns], texts, numeric


def _natural_width(header: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, column)) for column in zip(header, *rows, strict=True)) + 2 * (len(header) - 1)


def fitted_table(header: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool], width: int) -> str:
    """Aligned text of at most `width` characters: what is no number wraps between words; where that is not enough, one paragraph a row."""
    columns = list(zip(header, *rows, strict=True))
    natural = [max(map(len, column)) for column in columns]
    words = [max((len(word) for cell in column for word in _bound(cell).split(" ")), default=0) for column in columns]
    least = [whole if right else word for whole, word, right in zip(natural, words, numeric, strict=True)]
    spare = width - 2 * (len(header) - 1) - sum(least)
    if spare < 0:
        return "".join(_paragraph(header, row, width) for row in rows)
    wanted = sum(natural) - sum(least)
    widths = [low + (high - low) * min(spare, wanted) // max(wanted, 1) for low, high in zip(least, natural, strict=True)]
    wrapped = [[_lines(cell, size) for cell, size in zip(row, widths, strict=True)] for row in (header, *rows)]
    lines = [list(line) for row in wrapped for line in zip_longest(*row, fillvalue="")]
    titles = max(map(len, wrapped[0]), default=1)
    return _aligned([*lines[:titles], ["-" * size for size in widths], *lines[titles:]], widths, numeric)


def paragraph(text: str, width: int | None) -> str:
    """The text in lines of at most `width` characters, broken between words."""
    return text if width is None else "\n".join(_lines(text, width))


def _lines(text: str, width: int) -> list[str]:
    lines = textwrap.wrap(_bound(text), max(width, 1), break_long_words=False, break_on_hyphens=False) or [""]
    return [line.replace(BOUND, " ") for line in lines]


def _bound(text: str) -> str:
    """No line ends between a number and its unit, its error or the other end of its range."""
    return re.sub(r"(?<=[\d…±]) (?=[%…±]|[kMGT]?B\b|s\b|min\b|h\b)|(?<=[…±]) (?=[\d−-])", BOUND, text)


def _paragraph(header: Sequence[str], row: Sequence[str], width: int) -> str:
    texts = [f"{title}: {cell}" for title, cell in zip(header, row, strict=True)]
    wrapped = [_lines(text, max(width - 4, 1)) for text in texts]
    return "".join(
        f"{'  ' * ((place > 0) + (number > 0))}{line}\n" for place, lines in enumerate(wrapped) for number, line in enumerate(lines)
    )


def plain_table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[bool]) -> str:
    """Aligned text without colours or lines."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(row[index]) for row in lines) for index in range(len(header))]
    return _aligned([lines[0], ["-" * width for width in widths], *lines[1:]], widths, numeric)


def _aligned(lines: Sequence[Sequence[str]], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    made = (
        "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, numeric, strict=True))
        for row in lines
    )
    return "".join(f"{line.rstrip()}\n" for line in made)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[bool]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|" + "|".join("---:" if right else "---" for right in numeric) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)]) + "\n"


def cells(columns: Sequence[Column[Row]], rows: Sequence[Row]) -> tuple[list[str], list[list[str]], list[bool]]:
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
    rows: list[dict[str, object]] = []
    protocol = _flat(record.protocol.to_json(), "protocol")
    for text, other in record.texts.items():
        protocol |= _flat(other.to_json(), f"texts.{text}.protocol")
    for index, stage in enumerate(record.stages):
        data: dict[str, object] = {**stage.to_json()}
        head = {"run": record.run, "model": record.model, "stage_index": index, "stage": stage.stage, "method": stage.method}
        layers, notes = mappings(data.pop("layers")), sequence(data.pop("notes"))
        for name in ("metrics", "settings", "texts", "tasks"):
            data.update(_flat(mapping(data.pop(name)), name))
        rows.append({**head, "kind": "stage", **data, "notes": " | ".join(map(str, notes)), **protocol})
        for name, steps in series(stage):
            rows += [{**head, "kind": "series", "series": name, **_flat(finite(step), name)} for step in steps]
            rows[-len(steps) - 1].pop(f"metrics.{name}", None)
        for layer in layers:
            own = {key: value for key, value in layer.items() if key not in ("name", "metrics")}
            rows.append({**head, "kind": "layer", "layer": layer["name"], **own, **_flat(mapping(layer["metrics"]), "metrics")})
    return _csv(rows)


def _csv(rows: Sequence[Mapping[str, object]]) -> str:
    first = ["run", "model", "stage_index", "kind", "stage", "method", "layer", "block", "role"]
    known = first + [f.name for f in fields(StageRecord)] + ["relative_output_error", "rank"]
    present = dict.fromkeys(key for row in rows for key in row)
    header = [key for key in dict.fromkeys(known) if key in present] + [key for key in present if key not in known]
    out = io.StringIO()
    writer = csv.DictWriter(out, header, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _flat(value: Mapping[str, object], prefix: str) -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, inner in value.items():
        name = f"{prefix}.{key}"
        if isinstance(inner, Mapping):
            flat.update(_flat(inner, name))
        elif isinstance(inner, list):
            flat[name] = json.dumps(inner, ensure_ascii=False)
        else:
            flat[name] = inner
    return flat
