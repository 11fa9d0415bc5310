"""`pipeline bench kernels`: what `kernels/bench` measures, as a published table with a plot.

    python -m bitmend.pipelines.bench.kernel_tables bench-kernels.json -o DIR      (table and plot of what a machine without matplotlib measured)

Knows the benchmark's rows; not how they were measured.
"""

import argparse
import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

COLUMNS = (
    ("operator", "operator", "text"), ("variant", "variant", "text"), ("model", "model", "text"), ("out", "out", "exact"),
    ("inputs", "in", "exact"), ("rows", "rows", "exact"), ("rank", "rank", "exact"), ("microseconds", "µs", "number"),
    ("spread", "spread µs", "number"), ("repeats", "repeats", "exact"), ("bandwidth_share", "of bandwidth", "percent"),
    ("arithmetic_share", "of arithmetic", "percent"), ("resident_bytes", "weights", "bytes"),
)  # fmt: skip


def kernels(device: str, full: bool, output: Path | None) -> dict[str, Any]:
    """The kernels' own benchmark; it refuses to report an operator whose check fails. <output>/kernels-<device>.{json,md,png,svg}."""
    from ...kernels import bench

    measured = bench.run(device=device, full=full, output=output)
    if output is not None:
        for path in write_kernels(measured, output):
            log.info("written: %s", path)
        for name in ("bench-kernels.json", "bench-kernels.md"):
            (output / name).unlink()
    return measured


def write_kernels(measured: Mapping[str, Any], directory: Path) -> list[Path]:
    """Table and plot of what the kernels' benchmark returned, here or elsewhere."""
    from ...reports import published
    from ...reports.plots import kernels_figure

    rows, environment = measured["rows"], measured["environment"]
    against = "torch float32" if any(row["variant"] == "torch float32" for row in rows) else "torch bfloat16"
    notes = [
        "µs: median of one call over the repeats; spread: the distance between the quartiles; weights: the bytes that stay in memory.",
        f"A row is measured {environment['warm_up']} + {environment['repeats']} times over copies of its weight that no cache holds; fewer "
        f"times where that would take more than {environment['most_seconds']} s.",
        f"Shares are of what this device was seen to reach: {environment['peak']}.",
    ]
    refused = [
        f"{r['operator']} {r['variant']} {r['out']} × {r['inputs']}, {r['rows']} rows, rank {r['rank']}: {r.get('reason', 'its output is wrong')}"
        for r in measured["refused"]
    ]
    notes += [f"Refused: {what}." for what in refused]
    name = f"kernels-{short_name(environment)}"
    figure = kernels_figure(rows, rank=16, against=against, title=f"Linears on {environment['device_name']}")
    title = f"Kernels on {environment['device_name']}"
    return published.write(name, rows, COLUMNS, environment, figure, title=title, notes=notes, directory=directory)


def short_name(environment: Mapping[str, Any]) -> str:
    """cpu, or what tells a card from others: h200."""
    if environment["device"].startswith("cpu"):
        return "cpu"
    found = re.search(r"\b([A-Z]+\d+\w*)\b", environment["device_name"])
    return found.group(1).lower() if found else "cuda"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Table and plot of a kernel benchmark that was measured elsewhere.")
    parser.add_argument("measured", type=Path, help="bench-kernels.json, as `python -m bitmend.kernels.bench --output` writes it")
    parser.add_argument("-o", "--output", type=Path, default=Path("reports/published"))
    chosen = parser.parse_args(arguments)
    for path in write_kernels(json.loads(chosen.measured.read_text(encoding="utf-8")), chosen.output):
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
