"""Reference results: one command that measures every method on the demo model and writes `reports/published/NAME.{json,md,png,svg}`.

    python -m bitmend.pipelines.publishing compress [-o RUN_DIR] [--only PATTERN]

It can be stopped and continued: stages are artifacts of one run directory, rows are kept as they are finished. What is measured is data below.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..reports import published
from ..reports.plots import pareto_figure
from ..reports.record import RunRecord
from . import logs, recipe, runner
from .doctor import cpu_name

COLUMNS = (
    ("name", "method"), ("bits", "bits"), ("perplexity", "perplexity", "perplexity"), ("bits_per_weight", "bits per weight", "number"),
    ("total_bytes", "bytes", "bytes"), ("sparsity", "sparsity", "percent"), ("seconds", "seconds", "seconds"), ("peak_bytes", "memory", "bytes"),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One measurement: what is shown as its name, and the stages (in recipe form) that lead to it."""

    name: str
    stages: tuple[Mapping[str, Mapping[str, Any]], ...]
    bits: str = ""


def _quantized(bits: int) -> list[Row]:
    plain = {"bits": bits, "group_size": 64}
    normal = {"bits": bits, "block_size": 64}
    rows = {
        "rtn": {"method": "rtn", **plain},
        "rtn, clip weighted by the inputs": {"method": "rtn", "clip": "hessian", **plain},
        "gptq": {"method": "gptq", **plain},
        "gptq, clip weighted by the inputs": {"method": "gptq", "clip": "hessian", **plain},
        "gptq, correction 0.5": {"method": "gptq", "correction": 0.5, **plain},
        "normal_float": {"method": "normal_float", **normal},
        "gptq_nf": {"method": "gptq_nf", **normal},
    }
    if bits < 4:
        rows["block_training"] = {"method": "block_training", **plain}
        rows["learned_rounding"] = {"method": "learned_rounding", **plain}
    return [Row(name, ({"quantize": settings},), str(bits)) for name, settings in rows.items()]


def _pruned(pattern: str, shown: str) -> list[Row]:
    settings = {"sparsity": 0.5, "pattern": pattern}
    return [Row(f"{method}, {shown}", ({"prune": {"method": method, **settings}},)) for method in ("magnitude", "wanda", "sparsegpt")]


COMPRESS = [*_pruned("unstructured", "50 %"), *_pruned("2:4", "2:4"), *_quantized(3), *_quantized(4), *_quantized(2)]
TABLES = {"compress": (COMPRESS, "Pruning and quantization of the demo model")}
SETTINGS = {"calibration": {"samples": 32, "seq_len": 512}, "evaluation": {"seq_len": 512, "windows": 16}}


def publish(name: str, directory: Path, only: str | None = None) -> list[Path]:
    """Measure what is missing, then write the table of all rows that are there."""
    rows, title = TABLES[name]
    kept = published.Rows(directory / f"{name}.jsonl", ["name", "bits"], {"settings": SETTINGS, "processor": cpu_name()})
    protocol: Any = None
    for row in rows:
        if (only is None or re.search(only, f"{row.name} {row.bits}")) and {"name": row.name, "bits": row.bits} not in kept:
            record = _measure(row, directory / "run")
            kept.append({"name": row.name, "bits": row.bits, "protocol": record.protocol.to_json(), **_numbers(record)})
    done = [kept.get(name=row.name, bits=row.bits) for row in rows if {"name": row.name, "bits": row.bits} in kept]
    found = [row for row in done if row is not None]
    protocol = found[0]["protocol"] if found else None
    shown = [{k: v for k, v in row.items() if k != "protocol"} for row in found]
    figure = pareto_figure(
        [r | {"label": f"{r['name']} {r['bits']}".strip()} for r in shown if r["bits"]],
        x="bits_per_weight",
        y="perplexity",
        label="label",
        series="name",
    )
    notes = [
        f"Baseline: {found[0]['baseline_perplexity']:.2f}." if found else "",
        f"Made by `make publish`; calibration {SETTINGS['calibration']['samples']} × {SETTINGS['calibration']['seq_len']} tokens of the demo text; {cpu_name()}, 2 cores shared with other work: seconds are an upper bound.",
    ]
    return published.write(name, shown, COLUMNS, protocol, figure, title=title, notes=notes)


def _measure(row: Row, directory: Path) -> RunRecord:
    settings = directory.parent / "row.yaml"
    settings.parent.mkdir(parents=True, exist_ok=True)
    from .settings import dump

    settings.write_text(
        dump({"name": "published", "model": "demo", "profile": "demo", **SETTINGS, "stages": [dict(stage) for stage in row.stages]})
    )
    return runner.run(recipe.resolve(str(settings)), directory)


def _numbers(record: RunRecord) -> dict[str, Any]:
    last = record.stages[-1]
    baseline = {"baseline_perplexity": record.stages[0].perplexity}
    fields = (
        "perplexity",
        "perplexity_ratio",
        "nll_difference",
        "nll_difference_stderr",
        "kl_to_baseline",
        "bits_per_weight",
        "total_bytes",
        "sparsity",
        "seconds",
        "peak_bytes",
    )
    return baseline | {field: getattr(last, field) for field in fields}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(TABLES))
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/published"))
    parser.add_argument("--only", help="a regular expression on 'NAME BITS'")
    given = parser.parse_args()
    logs.setup()
    for path in publish(given.name, given.output.resolve(), given.only):
        print(path)


if __name__ == "__main__":
    main()
