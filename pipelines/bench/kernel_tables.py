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
from typing import TYPE_CHECKING

from ...reports.json_values import text

if TYPE_CHECKING:
    from ...kernels.bench import KernelReport

log = logging.getLogger(__name__)

COLUMNS = (
    ("operator", "operator", "text"), ("variant", "variant", "text"), ("model", "model", "text"), ("out", "out", "exact"),
    ("inputs", "in", "exact"), ("rows", "rows", "exact"), ("rank", "rank", "exact"), ("microseconds", "µs", "number"),
    ("spread", "spread µs", "number"), ("repeats", "repeats", "exact"), ("times_bfloat16", "× bf16", "number"), ("bandwidth_share", "of bandwidth", "percent"),
    ("arithmetic_share", "of arithmetic", "percent"), ("resident_bytes", "weights", "bytes"),
)  # fmt: skip


def kernels(device: str, full: bool, output: Path | None) -> "KernelReport":
    """The kernels' own benchmark; it refuses to report an operator whose check fails. <output>/kernels-<device>.{json,md,png,svg}."""
    from ...kernels import bench

    measured = bench.run(device=device, full=full, output=output)
    if output is not None:
        for path in write_kernels(measured, output):
            log.info("written: %s", path)
        for name in ("bench-kernels.json", "bench-kernels.md"):
            (output / name).unlink()
    return measured


def write_kernels(measured: "KernelReport", directory: Path) -> list[Path]:
    """Table and plot of what the kernels' benchmark returned, here or elsewhere."""
    from ...kernels.bench import relative_to_bfloat16
    from ...reports import published
    from ...reports.plots import kernels_figure

    rows, environment = relative_to_bfloat16(measured["rows"]), measured["environment"]
    against = "torch float32" if any(row["variant"] == "torch float32" for row in rows) else "torch bfloat16"
    notes = [
        "µs: median of one call over the repeats; spread: the distance between the quartiles; weights: the bytes that stay in memory.",
        f"A row is measured {environment['warm_up']} + {environment['repeats']} times over copies of its weight that no cache holds; fewer "
        f"times where that would take more than {environment['most_seconds']} s.",
        "× bf16: relative to torch's bfloat16 matmul with as many rows and no rank.",
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


STATIC = "kernels-static"
STATIC_COLUMNS = (
    ("card", "for", "text"), ("way", "way", "text"), ("rows", "rows", "text"), ("default", "default", "text"), ("kernel", "kernel", "text"),
    ("n", "outputs", "exact"), ("m", "tokens", "exact"), ("warps", "warps", "exact"), ("stages", "stages", "exact"), ("step", "step", "exact"),
    ("registers", "registers", "exact"), ("spilled_bytes", "spilled bytes", "exact"), ("shared_bytes", "shared bytes", "exact"),
    ("matrix", "matrix instruction", "text"), ("load_bits", "widest load, bits", "exact"),
)  # fmt: skip


def publish_static(directory: Path) -> list[Path]:
    """What the compiler makes of every configuration for cards that are not here (kernels/compiled_form). `directory` is not needed: what
    was compiled lies in Triton's own cache, from which a stopped table goes on."""
    import triton

    from ...kernels import compiled_form as form
    from ...reports import published

    rows = [row | {"default": "yes" if row["default"] else "", "matrix": row["matrix"] or "none"} for row in form.table()]
    limits = ", ".join(f"sm_{major}{minor} {size >> 10} KB" for (major, minor), size in form.SHARED_LIMITS.items())
    spilled = sum(bool(row["spilled_bytes"]) for row in rows)
    notes = [
        f"Compiled without a card by Triton {triton.__version__} and its ptxas, for {form.OUT} × {form.INPUTS} in {form.BITS} bits, groups of "
        f"{form.GROUP}, bfloat16, rank {form.RANK}. Nothing is timed.",
        f"{len(rows)} kernels, {spilled} with spilled registers, {sum(not row['fits'] for row in rows)} over the shared memory of a program ({limits}).",
        "default: what the chooser takes on that card for some of those rows when nothing was measured. step: tiles of codes under way at once, or what one "
        "step of the loop multiplies. Rows: those of x that the configuration was compiled for.",
    ]
    return published.write(STATIC, rows, STATIC_COLUMNS, {"triton": triton.__version__}, title="Kernels as compiled", notes=notes)


def short_name(environment: Mapping[str, object]) -> str:
    """cpu, or a card's short name: h200."""
    if text(environment["device"]).startswith("cpu"):
        return "cpu"
    match = re.search(r"\b([A-Z]+\d+\w*)\b", text(environment["device_name"]))
    return match.group(1).lower() if match else "cuda"


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
