"""The columns of every table, and rows that are gathered from several records.

Knows what a reader wants to see of a stage, a layer, a layer type and a protocol; not in which format.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar

from .json_values import numbers
from .record import LayerRecord, Protocol, RunRecord, StageRecord, TextRecord
from .units import MISSING, difference, duration, exact, number, percent, ratio, size

Row = TypeVar("Row", contravariant=True)
"""What a table has a row for: a stage, a layer, a run."""
Whole = TypeVar("Whole")


@dataclass(frozen=True)
class Column(Generic[Row]):
    """One column: `get` finds the raw value in a row, `show` writes a value of `get`'s kind for a reader.

    A terminal too narrow for all columns leaves out those of the highest `rank` first; `short` is its heading there.
    """

    key: str
    title: str
    get: Callable[[Row], object]
    show: Callable[[Any], str]
    numeric: bool = True
    group: str = "quality"
    rank: int = 0
    short: str = ""

    def read_by(self, get: "Callable[[Whole], object]") -> "Column[Whole]":
        """The same column of another kind of row."""
        return Column(self.key, self.title, get, self.show, self.numeric, self.group, self.rank, self.short)


def _field(name: str) -> Callable[[object], object]:
    return lambda record: getattr(record, name)


def _pair(name: str) -> Callable[[object], object]:
    def get(stage: object) -> object:
        value = getattr(stage, name)
        return None if value is None else (value, getattr(stage, f"{name}_stderr"))

    return get


def _show_pair(pair: tuple[float, float | None] | None) -> str:
    return MISSING if pair is None else difference(*pair)


STAGE_COLUMNS: tuple[Column[StageRecord], ...] = (
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


def stage_columns(stages: Sequence[StageRecord]) -> list[Column[StageRecord]]:
    """Every column of a stage: behind those of quality, two for each further evaluation text and each metric of a task."""
    texts = dict.fromkeys(name for stage in stages for name in stage.texts)
    tasks = dict.fromkeys(name for stage in stages for name in stage.tasks)
    more = [column for names, columns in ((texts, _text_columns), (tasks, _task_columns)) for name in names for column in columns(name)]
    cost = next(place for place, column in enumerate(STAGE_COLUMNS) if column.group == "cost")
    return [*STAGE_COLUMNS[:cost], *more, *STAGE_COLUMNS[cost:]]


def _text_columns(name: str) -> list[Column[StageRecord]]:
    """In the table of the run: perplexity, and what was lost to the baseline."""
    perplexity, lost = (next(c for c in text_table(name) if c.key == key) for key in ("perplexity", "nll_difference"))
    return [
        replace(perplexity, key=f"texts.{name}.perplexity", title=f"perplexity, {name}", rank=1, short=name),
        replace(lost, key=f"texts.{name}.nll_difference", title=f"Δ to baseline, {name}", rank=12, short=""),
    ]


def _task_columns(name: str) -> list[Column[StageRecord]]:
    """The score with its standard error over documents, and the change to the baseline with the paired one."""

    def of(value: str, error: str) -> Callable[[StageRecord], object]:
        def get(stage: StageRecord) -> object:
            task = stage.tasks.get(name)
            return None if task is None or getattr(task, value) is None else (getattr(task, value), getattr(task, error))

        return get

    return [
        Column(f"tasks.{name}.score", name, of("score", "stderr"), _show_score, rank=1),
        Column(f"tasks.{name}.difference", f"Δ to baseline, {name}", of("difference", "difference_stderr"), _show_pair, rank=12),
    ]


def _show_score(pair: tuple[float, float | None] | None) -> str:
    if pair is None:
        return MISSING
    score, stderr = pair
    return number(score, 3) if stderr is None else f"{score:.3f} ± {stderr:.3f}"


def text_table(name: str) -> list[Column[StageRecord]]:
    """The columns of a table of one further evaluation text, a row a stage."""
    known = {field.name for field in fields(TextRecord)}
    return [STAGE_COLUMNS[0], *(replace(column, get=_of_text(name, column.key)) for column in STAGE_COLUMNS if column.key in known)]


def _of_text(name: str, key: str) -> Callable[[StageRecord], object]:
    get = _pair(key) if key == "nll_difference" else _field(key)
    return lambda stage: get(stage.texts[name]) if name in stage.texts else None


LAYER_COLUMNS: tuple[Column[LayerRecord], ...] = (
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
    "dtype": "computed in",
    "device": "computed on",
}


def used(columns: Sequence[Column[Whole]], rows: Sequence[Whole]) -> list[Column[Whole]]:
    """The columns that hold something in at least one row."""
    return [column for column in columns if any(column.get(row) is not None for row in rows)]


def layer_columns(layers: Sequence[LayerRecord]) -> list[Column[LayerRecord]]:
    """The fixed layer columns in use, then one for every extra number of `metrics`."""
    keys: dict[str, None] = {}
    for layer in layers:
        keys.update(dict.fromkeys(key for key, _ in numbers(layer.metrics)))
    extra: list[Column[LayerRecord]] = [Column(key, key.replace("_", " ").replace(".", ": "), _metric(key), exact) for key in keys]
    return used(LAYER_COLUMNS, layers) + extra


def _metric(key: str) -> Callable[[LayerRecord], object]:
    return lambda layer: dict(numbers(layer.metrics)).get(key)


def protocol_rows(protocol: Protocol) -> list[tuple[str, str]]:
    """(title, text) of every field of the protocol that is known."""
    rows = [(title, protocol_text(getattr(protocol, key))) for key, title in PROTOCOL_TITLES.items() if getattr(protocol, key) is not None]
    return rows + [(str(key), protocol_text(value)) for key, value in protocol.details.items() if value is not None]


def all_protocol_rows(record: RunRecord) -> list[tuple[str, str]]:
    """Those of the run's text, then of each further text what is not the same."""
    rows = protocol_rows(record.protocol)
    return rows + [
        (f"{name}: {title}", text)
        for name, other in record.texts.items()
        for title, text in protocol_rows(other)
        if (title, text) not in rows
    ]


def protocol_lines(record: RunRecord) -> list[str]:
    """A caption a text."""
    return [protocol_line(record.protocol), *(f"{name}: {protocol_line(protocol)}" for name, protocol in record.texts.items())]


def protocol_line(protocol: Protocol) -> str:
    """One line for a caption: what was read, in windows of what."""
    parts = [" ".join(filter(None, [protocol.dataset, protocol.split]))]
    if protocol.windows is not None and protocol.seq_len is not None:
        parts.append(f"{protocol.windows:,} windows of {protocol.seq_len:,} tokens")
    if protocol.tokenizer:
        parts.append(f"tokenizer {protocol.tokenizer}")
    if protocol.dtype not in (None, "float32"):
        parts.append(protocol.dtype)
    return ", ".join(part for part in parts if part) or "protocol not recorded"


def protocol_text(value: object) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False) if value != value.strip() or not value else value
    return number(value, 7) if isinstance(value, int | float) else json.dumps(value, ensure_ascii=False, default=str)


def extra_rows(stages: Sequence[StageRecord]) -> list[tuple[str, str, float]]:
    """(stage, readable path, value) of every number in the stages' extra metrics, series left out."""
    rows = []
    for stage in stages:
        apart = {name for name, _ in series(stage)}
        single = {name: value for name, value in stage.metrics.items() if name not in apart}
        rows += [(stage.stage, path.replace("_", " ").replace(".", ": "), value) for path, value in numbers(single)]
    return rows


def series(stage: StageRecord) -> list[tuple[str, list[Mapping[str, object]]]]:
    """(name, rows) of the extra metrics that are lists of mappings, such as a training history."""
    result = []
    for name, value in stage.metrics.items():
        if isinstance(value, list | tuple) and value and len(rows := [row for row in value if isinstance(row, Mapping)]) == len(value):
            result.append((name, rows))
    return result


def series_columns(rows: Sequence[Mapping[str, object]]) -> list[Column[Mapping[str, object]]]:
    keys = dict.fromkeys(key for row in rows for key in row)
    ordered = sorted(keys, key=lambda key: key != "step")
    return [Column(key, key.replace("_", " "), _item(key), exact) for key in ordered]


def _item(key: str) -> Callable[[Mapping[str, object]], object]:
    return lambda row: row.get(key)


@dataclass(frozen=True)
class RoleSummary:
    """What the layers of one type were given and lost, summed or averaged over the blocks."""

    role: str
    layers: int
    bits_per_weight: float | None
    rank: float | None
    sparsity: float | None
    relative_output_error: float | None
    predicted_loss: float | None
    measured_loss: float | None


ROLE_COLUMNS: tuple[Column[RoleSummary], ...] = (
    Column("role", "type", _field("role"), str, numeric=False),
    Column("layers", "layers", _field("layers"), number),
    Column("bits_per_weight", "mean bits/weight", _field("bits_per_weight"), number),
    Column("rank", "mean rank", _field("rank"), exact),
    Column("sparsity", "mean sparsity", _field("sparsity"), percent),
    Column("relative_output_error", "mean relative output error", _field("relative_output_error"), number),
    Column("predicted_loss", "predicted loss, summed", _field("predicted_loss"), number),
    Column("measured_loss", "measured loss, summed", _field("measured_loss"), number),
)


def role_rows(layers: Sequence[LayerRecord]) -> list[RoleSummary]:
    """One row per type of layer, in order of appearance; layers without a value do not count in its mean."""
    rows = []
    for role in dict.fromkeys(str(layer.role) for layer in layers):
        members = [layer for layer in layers if str(layer.role) == role]
        columns = [
            _mean([getattr(layer, name) for layer in members]) for name in ("bits_per_weight", "rank", "sparsity", "relative_output_error")
        ]
        losses = [_sum([layer.metrics.get(name) for layer in members]) for name in ("predicted_loss", "measured_loss")]
        rows.append(RoleSummary(role, len(members), *columns, *losses))
    return rows


def _sum(values: Sequence[object]) -> float | None:
    known = [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return math.fsum(known) if known else None


def _mean(values: Sequence[object]) -> float | None:
    known = [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None
