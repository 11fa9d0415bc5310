"""Options that several commands share, and how results are written to stdout."""

import io
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ...compress.ranges import DtypeName
from .streams import echo, takes

if TYPE_CHECKING:
    from ...reports.record import RunRecord

Model = Annotated[str | None, typer.Option("-m", "--model", metavar="MODEL", help="demo, a directory, a Hub id or a .gguf file")]
Revision = Annotated[str | None, typer.Option("--revision", metavar="REV", help="revision of a Hub model")]
Teacher = Annotated[str | None, typer.Option("--teacher", metavar="MODEL", help="the dense model to recover towards (else the baseline)")]
Source = Annotated[
    str | None, typer.Option("--data", metavar="SRC", help="all text: demo, a .txt/.raw/.md/.jsonl/.parquet file or a datasets id")
]
CalibrationSource = Annotated[str | None, typer.Option("--calibration", metavar="SRC", help="text for calibration")]
TrainSource = Annotated[str | None, typer.Option("--train", metavar="SRC", help="text for recovery")]
EvalSource = Annotated[str | None, typer.Option("--eval", metavar="SRC", help="text for perplexity")]
SettingsFile = Annotated[Path | None, typer.Option("-c", "--config", metavar="FILE.yaml", help="settings laid over the recipe")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any setting, as in quantize.bits=3; repeatable")]
Profile = Annotated[Literal["demo", "standard"] | None, typer.Option("--profile", help="small and fast, or the papers' settings")]
BudgetText = Annotated[str | None, typer.Option("--budget", metavar="3.0bpw|60MB", help="let the allocation meet this size")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="seed of everything random")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="where to compute")]
Dtype = Annotated[
    DtypeName | None,
    typer.Option("--dtype", help="of forward passes; auto: bfloat16 on a GPU, on a CPU what is faster"),
]
RunDirectory = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="a directory that `pipeline run` made")]


def place(text: str) -> Path:
    """A path that names something: `-o ""` would mean the working directory."""
    if not text.strip():
        raise typer.BadParameter("the name is empty; give a path")
    return Path(text)


OutputRun = Annotated[
    Path | None, typer.Option("-o", "--output", parser=place, metavar="RUN_DIR", help="run directory; default runs/<recipe>")
]
FromStage = Annotated[str | None, typer.Option("--from", metavar="STAGE", help="refuse to run unless all before it is finished")]
UntilStage = Annotated[str | None, typer.Option("--until", metavar="STAGE", help="stop after this stage")]
ForceStage = Annotated[str | None, typer.Option("--force", metavar="STAGE", help="redo this stage and those after it, finished or not")]


def _finite_number(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


Gate = Annotated[
    float | None,
    typer.Option(
        "--max-perplexity-ratio", metavar="X", min=0.0, callback=_finite_number, help="exit 4 if the result is worse than X × baseline"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="machine-readable result on stdout")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="more log lines, tracebacks")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="errors only")]


def width() -> int:
    """Characters of a line of results: $COLUMNS, else the terminal's, else 140."""
    return shutil.get_terminal_size((140, 24)).columns


def write_json(value: object) -> None:
    """One JSON object on stdout; numbers that JSON cannot hold become null."""
    echo_json(json.dumps(_finite(value), indent=2, ensure_ascii=False, default=str))


def echo_json(text: str) -> None:
    """JSON whose characters a stream in ASCII gets as escapes, so that it says the same."""
    echo(text if takes(text) else json.dumps(json.loads(text), indent=2))


def write(value: Mapping[str, object], as_json: bool) -> None:
    """A mapping as JSON, or as lines for a person: lists of mappings become tables."""
    if as_json:
        write_json(value)
    else:
        _write_section(value, "")


def show_record(record: "RunRecord", as_json: bool) -> None:
    """A run's stage table and what it says in words, or the one JSON object."""
    from ...reports.render import render, show

    if as_json:
        echo_json(render(record, "json").rstrip("\n"))
        return
    from rich.console import Console

    text = io.StringIO()
    show(record, Console(file=text, width=width(), highlight=False, force_terminal=sys.stdout.isatty()))
    echo(text.getvalue(), end="")


def _write_section(section: Mapping[str, object], indent: str) -> None:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            echo(f"{indent}{key}:")
            _write_section(value, indent + "  ")
        elif isinstance(value, Sequence) and value and all(isinstance(row, Mapping) for row in value):
            echo(f"{indent}{key}:")
            echo(table(value).rstrip("\n"))
        else:
            echo(f"{indent}{key}: {_cell(str(key), value)}")


def table(rows: Sequence[Mapping[str, object]], titles: Mapping[str, str] | None = None) -> str:
    """A table of mappings, as wide as the terminal at most; `titles` are shorter names for keys."""
    from ...reports.tables import fitted_table

    keys = list(dict.fromkeys(key for row in rows for key in row))
    numeric = [all(isinstance(row.get(key), int | float | None) for row in rows) for key in keys]
    header = [(titles or {}).get(key, str(key)) for key in keys]
    return fitted_table(header, [[_cell(str(key), row.get(key)) for key in keys] for row in rows], numeric, width())


def _cell(key: str, value: object) -> str:
    """A value for a person, its unit taken from the key's name."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        if key == "bytes" or key.endswith("_bytes"):
            return next(
                (f"{value / size:,.3g} {unit}" for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if value >= size), f"{value} B"
            )
        if key == "seconds" or key.endswith("_seconds"):
            if value >= 36_000:
                return f"{value / 3600:,.1f} h"
            return f"{value:.3g} s" if value < 10 else f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"
        return (
            f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else f"{value:.6g}" if isinstance(value, float) else str(value)
        )
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell("", item) for item in value) or "none"
    if isinstance(value, str) and not value.isprintable():
        return json.dumps(value, ensure_ascii=False)
    return str(value) if not isinstance(value, Mapping) else "none" if not value else json.dumps(_finite(value), default=str)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
