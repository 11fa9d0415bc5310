"""Records as tables: one list of columns, written to a terminal, Markdown or CSV.

Knows units and how many digits a reader wants; not where the numbers come from.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from rich.table import Table
from rich.text import Text

from .record import LayerRecord, Protocol, RunRecord, StageRecord, numbers

MISSING = "–"
MINUS = "−"


@dataclass(frozen=True)
class Column:
    """One column: `get` finds the raw value in a record, `show` writes it for a reader.

    A terminal too narrow for all columns leaves out those of the highest `rank` first; `short` is its heading there.
    """

    key: str
    title: str
    get: Callable[[Any], Any]
    show: Callable[[Any], str]
    numeric: bool = True
    group: str = "quality"
    rank: int = 0
    short: str = ""


def number(value: Any, digits: int = 4) -> str:
    """A number to `digits` significant digits with thousands separated; anything else as its text."""
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return MISSING
    if isinstance(value, int) or value == 0:
        return _signed(f"{int(value):,}")
    if not 1e-4 <= abs(value) < 1e7:
        return _signed(f"{value:.{digits - 1}e}")
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return _signed(f"{value:,.{places}f}")


def ratio(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}×" if value < 100 else f"{number(value, 4)}×"


def percent(value: float | None) -> str:
    if value is None:
        return MISSING
    return _signed(f"{100 * value:.1f} %" if abs(value) < 10 else f"{100 * value:,.0f} %")


def nats(value: float | None, places: int = 4) -> str:
    return MISSING if value is None else _signed(f"{value:+.{places}f}")


def size(value: int | float | None) -> str:
    """Decimal units, as budgets are written."""
    if value is None:
        return MISSING
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= size:
            return f"{number(value / size, 4 if abs(value) >= 10 * size else 3)} {unit}"
    return f"{int(value)} B"


def duration(value: float | None) -> str:
    if value is None:
        return MISSING
    if value < 10:
        return f"{value:.2g} s" if value < 1 else f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def difference(value: float | None, stderr: float | None) -> str:
    """`+0.0431 ± 0.0052`: a difference with one standard error."""
    if value is None:
        return MISSING
    places = 4 if max(abs(value), stderr or 0.0) >= 1e-3 else 6
    return nats(value, places) if stderr is None else f"{nats(value, places)} ± {stderr:.{places}f}"


def _signed(text: str) -> str:
    """A true minus sign, and none before a zero."""
    if not text.startswith("-"):
        return text
    return text.replace("-", MINUS, 1) if any(digit in text for digit in "123456789") else text[1:]


def _field(name: str) -> Callable[[Any], Any]:
    return lambda record: getattr(record, name)


def _pair(name: str) -> Callable[[Any], Any]:
    def get(stage: Any) -> Any:
        value = getattr(stage, name)
        return None if value is None else (value, getattr(stage, f"{name}_stderr"))

    return get


def _show_pair(pair: tuple[float, float | None] | None) -> str:
    return MISSING if pair is None else difference(*pair)


STAGE_COLUMNS: tuple[Column, ...] = (
    Column("stage", "stage", _field("stage"), str, numeric=False, group="both"),
    Column("method", "method", _field("method"), number, numeric=False, group="both"),
    Column("perplexity", "perplexity", _field("perplexity"), number),
    Column("perplexity_ratio", "× baseline", _field("perplexity_ratio"), ratio, rank=3, short="× base"),
    Column("nll_difference", "Δ nats/token to baseline", _pair("nll_difference"), _show_pair, rank=11, short="Δ to baseline"),
    Column("nll_difference_previous", "Δ to the stage before", _pair("nll_difference_previous"), _show_pair, rank=8, short="Δ to previous"),
    Column("gap_closed", "gap closed", _field("gap_closed"), percent, rank=2, short="gap closed"),
    Column("kl_to_baseline", "KL to baseline", _field("kl_to_baseline"), number, rank=4, short="KL"),
    Column("top1_agreement", "top-1 agreement", _field("top1_agreement"), percent, rank=5, short="top-1"),
    Column("bits_per_byte", "bits/byte", _field("bits_per_byte"), number, rank=10),
    Column("total_bytes", "size", _field("total_bytes"), size, group="cost"),
    Column("bits_per_weight", "bits/weight", _field("bits_per_weight"), number, group="cost", rank=1, short="bits/w"),
    Column("sparsity", "sparsity", _field("sparsity"), percent, group="cost", rank=7, short="sparse"),
    Column("trainable_parameters", "trained parameters", _field("trainable_parameters"), number, group="cost", rank=9, short="trained"),
    Column("seconds", "time", _field("seconds"), duration, group="cost", rank=2),
    Column("peak_bytes", "peak memory", _field("peak_bytes"), size, group="cost", rank=6, short="memory"),
    Column("tokens_per_second", "tokens/s", _field("tokens_per_second"), number, group="cost", rank=9),
)

LAYER_COLUMNS: tuple[Column, ...] = (
    Column("name", "layer", _field("name"), str, numeric=False),
    Column("relative_output_error", "relative output error", _field("relative_output_error"), number),
    Column("bits_per_weight", "bits/weight", _field("bits_per_weight"), number),
    Column("rank", "rank", _field("rank"), number),
    Column("sparsity", "sparsity", _field("sparsity"), percent),
)

PROTOCOL_TITLES = {
    "dataset": "text",
    "split": "split",
    "fingerprint": "fingerprint",
    "tokenizer": "tokenizer",
    "join": "documents joined by",
    "bos": "BOS in each window",
    "seq_len": "window, tokens",
    "windows": "windows",
    "tokens": "predicted tokens",
}


def used(columns: Sequence[Column], rows: Sequence[Any]) -> list[Column]:
    """The columns that hold something in at least one row."""
    return [column for column in columns if any(column.get(row) is not None for row in rows)]


def layer_columns(layers: Sequence[LayerRecord]) -> list[Column]:
    """The fixed layer columns in use, then one for every extra number of `metrics`."""
    keys: dict[str, None] = {}
    for layer in layers:
        keys.update(dict.fromkeys(key for key, _ in numbers(layer.metrics)))
    extra = [Column(key, key.replace("_", " "), _metric(key), number) for key in keys]
    return used(LAYER_COLUMNS, layers) + extra


def _metric(key: str) -> Callable[[Any], Any]:
    return lambda layer: dict(numbers(layer.metrics)).get(key)


def protocol_rows(protocol: Protocol) -> list[tuple[str, str]]:
    """(title, text) of every field of the protocol that is known."""
    rows = [(title, _protocol_text(getattr(protocol, key))) for key, title in PROTOCOL_TITLES.items() if getattr(protocol, key) is not None]
    return rows + [(str(key), _protocol_text(value)) for key, value in protocol.details.items() if value is not None]


def protocol_line(protocol: Protocol) -> str:
    """One line for a caption: what was read, in windows of what."""
    parts = [" ".join(filter(None, [protocol.dataset, protocol.split]))]
    if protocol.windows is not None and protocol.seq_len is not None:
        parts.append(f"{protocol.windows:,} windows of {protocol.seq_len:,} tokens")
    if protocol.tokenizer:
        parts.append(f"tokenizer {protocol.tokenizer}")
    return ", ".join(part for part in parts if part) or "protocol not recorded"


def _protocol_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False) if value != value.strip() or not value else value
    return number(value, 7) if isinstance(value, int | float) else json.dumps(value, ensure_ascii=False, default=str)


def extra_rows(stages: Sequence[StageRecord]) -> list[tuple[str, str, Any]]:
    """(stage, path, value) of every number in the stages' extra metrics."""
    return [(stage.stage, path, value) for stage in stages for path, value in numbers(stage.metrics)]


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
    table = cells(used(STAGE_COLUMNS, record.stages), record.stages)
    return markdown_table(*table) if markdown else plain_table(*table)


def layer_table(stage: StageRecord, markdown: bool = False) -> str:
    table = cells(layer_columns(stage.layers), stage.layers)
    return markdown_table(*table) if markdown else plain_table(*table)


def csv_text(record: RunRecord) -> str:
    """Tidy rows at full precision: `kind` is "stage" or "layer"; extra metrics, settings and protocol are dotted columns."""
    rows: list[dict[str, Any]] = []
    protocol = _flat(record.protocol.to_json(), "protocol")
    for index, stage in enumerate(record.stages):
        data = stage.to_json()
        head = {"run": record.run, "model": record.model, "stage_index": index, "stage": stage.stage, "method": stage.method}
        layers, notes = data.pop("layers"), data.pop("notes")
        for name in ("metrics", "settings"):
            data.update(_flat(data.pop(name), name))
        rows.append({**head, "kind": "stage", **data, "notes": " | ".join(notes), **protocol})
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
