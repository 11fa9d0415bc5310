"""`pipeline bench`: seconds, memory and error of the methods, on synthetic layers or, with a model, as whole stages of a run.

compress and decompose solve one random matrix a size (`synthetic_layers`); decompose measures the exact step against its published route as
well, and allocate the integer program of a budget (`solvers`);
recover, and every subject given a model, runs real stages through the runner, one row a method; scale on several processes (`process_scaling`).
kernels measures itself; generate a run's models (`decode_speed`), or one of random weights (`model_speed`).
"""

import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

from ...reports.json_values import integer, mappings, text
from ..devices.compute import chosen_device
from ..doctor import cpu_name
from ..errors import PipelineError, UsageError
from ..recipes.recipe import resolve
from ..recipes.settings import unknown
from ..recipes.stage_settings import StageSpec, methods
from . import solvers
from .command_times import command_rows
from .scaling import Row
from .synthetic_layers import layer_rows

log = logging.getLogger(__name__)

SIZES = (576, 1536, 4096)
STAGES = {"compress": ("prune", "quantize"), "decompose": ("decompose",), "recover": ("recover",)}
BEFORE = {
    "compress": [],
    "decompose": [{"quantize": {"method": "rtn", "bits": 3}}],
    "recover": [{"quantize": {"method": "rtn", "bits": 3}}],
}
RECOVERY_STEPS = 5
COUNTED = "135m"
"""The shape of which operators are counted where none is named."""


class BenchReport(TypedDict):
    """What a benchmark gives and writes."""

    schema: int
    bench: str
    environment: dict[str, object]
    rows: list[Row]
    growth: NotRequired[list[Row]]


@dataclass(frozen=True)
class Options:
    """The command line's options; `model` None means synthetic layers (recover: the demo model). `depths` (numbers of blocks) and
    `shape` (a name in synthetic.SHAPES, with so many of its `blocks`) mean whole runs on models made on the spot (generate: such a model itself),
    `count` that of one block of that shape, whose operators are counted."""

    device: str = "auto"
    sizes: tuple[int, ...] = SIZES
    only: tuple[str, ...] = ()
    repeats: int = 3
    model: str | None = None
    output: Path | None = None
    depths: tuple[int, ...] = ()
    shape: str | None = None
    full: bool = False
    blocks: int | None = None
    count: bool = False


def run(subject: str, options: Options) -> Mapping[str, Any]:
    """Measure, write <output>/bench-<subject>.{json,md,png,svg} where an output directory is named, and return the JSON object."""
    if options.blocks is not None and options.shape is None:
        raise UsageError("--blocks says how many blocks of a --shape are made: give it with one")
    if subject == "scale":
        return _over_processes(options)
    if subject == "generate" and options.shape is not None:
        return _of_random_model(options)
    if options.depths or options.shape is not None or options.count:
        return _of_scale(subject, options)
    if subject == "kernels":
        from .kernel_tables import kernels

        return kernels(options.device, options.full, options.output)
    if subject == "generate":
        from .decode_speed import generate

        return generate(options.device, options.model, options.repeats, options.output)
    device = _device(options)
    chosen = _chosen(subject, options.only) if subject not in ("allocate", "commands") else []
    if subject == "allocate":
        rows = solvers.allocation(options.repeats)
    elif subject == "commands":
        rows = command_rows(options.model, options.repeats)
    elif options.model is not None or subject == "recover":
        rows = _on_model(subject, chosen, options)
    else:
        exact = subject == "decompose" and (not options.only or "qera_exact" in options.only)
        rows = list(layer_rows(chosen, BEFORE[subject], options.sizes, options.repeats, device, exact, options.full))
    measured: BenchReport = {"schema": 1, "bench": subject, "environment": _environment(device, options), "rows": rows}
    if options.output is not None:
        _write(measured, options.output)
    return measured


def _over_processes(options: Options) -> BenchReport:
    """Scaling over gloo processes of one thread each."""
    from . import process_scaling

    if options.model is not None or options.depths or options.shape is not None or options.device == "cuda":
        raise UsageError("bench scale runs processes of one thread on a model of its own, on the CPU: give it without -m, --shape, --depths and --device cuda")
    for name in options.only:
        if name not in process_scaling.SUBJECTS:
            raise UsageError(f"bench scale: {unknown('subject', name, process_scaling.SUBJECTS)}")
    rows = process_scaling.rows(options.only, output=options.output)
    if options.count:
        rows = [process_scaling.of_a_block(row) for row in rows if integer(row["ranks"]) > 1]
    environment = _environment(torch.device("cpu"), options) | {"repeats": 1, "warm_up": 0, "threads": 1}
    measured: BenchReport = {"schema": 1, "bench": "scale", "environment": environment, "rows": rows}
    if options.output is not None:
        _write(measured, options.output)
    return measured


def _of_random_model(options: Options) -> BenchReport:
    """Tokens a second of a model of one shape, by the ways to store it."""
    from . import model_speed

    if options.model is not None or options.depths or options.count:
        raise UsageError("bench generate --shape makes a model of its own: give it without -m, --depths and --count")
    rows = model_speed.of_shape(options.shape or "", options.blocks, options.only, options.device, options.repeats, options.output)
    measured: BenchReport = {"schema": 1, "bench": f"generate-shape-{options.shape}", "environment": _environment(_device(options), options), "rows": rows}
    if options.output is not None:
        _write(measured, options.output)
    return measured


def _device(options: Options) -> torch.device:
    return chosen_device(options.device)


def _of_scale(subject: str, options: Options) -> BenchReport:
    """Time and memory against the number of blocks, or of a model of one shape; or the operators of one block."""
    from . import operator_counts, scaling, shape

    option = "depths" if options.depths else "count" if options.count else "shape"
    if subject != "compress" or options.model is not None or (options.depths and options.shape is not None):
        raise UsageError(f"--{option} makes models of its own to compress: give it to `bench compress`, alone and without --model")
    if options.count and (options.depths or options.blocks is not None):
        raise UsageError("--count counts the operators of one block of a --shape: give it without --depths and --blocks")
    environment = _environment(_device(options), options) | {"repeats": 1, "warm_up": 0}  # whole runs, each in a process of its own
    growth: list[Row] | None = None
    if options.count:
        name = options.shape or COUNTED
        bench = f"compress-count-{name}-{_device(options).type}"
        rows = operator_counts.of_block(name, options.only, options.device, options.output)
    elif options.shape is not None:
        bench = f"compress-shape-{options.shape}"
        rows = shape.of_shape(options.shape, options.blocks, options.only, options.device, options.output)
    else:
        chosen = _chosen(subject, options.only or scaling.METHODS)
        bench, rows = "compress-depths", scaling.by_depth(options.depths, chosen, options.device, options.output)
        growth = scaling.growth(rows)
    measured: BenchReport = {"schema": 1, "environment": environment, "bench": bench, "rows": rows}
    if growth is not None:
        measured["growth"] = growth
    if options.output is not None:
        _write(measured, options.output)
    return measured


def _chosen(subject: str, only: Sequence[str]) -> list[tuple[str, str]]:
    """Stage and method of every row to measure; UsageError for a method the subject does not have."""
    known = [(stage, name) for stage in STAGES[subject] for name in methods(stage)]
    for name in only:
        if name not in [method for _, method in known]:
            raise UsageError(f"bench {subject}: {unknown('method', name, [method for _, method in known])}")
    return [row for row in known if not only or row[1] in only]


# -- stages of a model -----------------------------------------------------------------------------------------------------------


def _on_model(subject: str, chosen: Sequence[tuple[str, str]], options: Options) -> list[Row]:
    """One run a method in a shared run directory; what the methods have in common runs once, finished rows are read back. Of recoveries
    the seconds of a step as well, measured anew by all in turn. Where every method is refused, which happens before any works, the first
    one's error."""
    from ..run import runner

    model = options.model or "demo"
    place = (options.output or Path("runs")) / f"bench-{subject}"
    served: dict[str, StageSpec] = {}
    rows: list[Row] = []
    errors: list[PipelineError] = []
    for stage, method in chosen:
        settings = {"method": method} | ({"steps": RECOVERY_STEPS} if stage == "recover" else {})
        recipe = resolve({"name": f"bench-{subject}", "model": model, "stages": [*BEFORE[subject], {stage: settings}]})
        try:
            record = runner.run(recipe, place, device=options.device)
        except PipelineError as error:
            log.warning("%s %s: %s", stage, method, error)
            rows.append({"stage": stage, "method": method, "model": model, "error": str(error)})
            errors.append(error)
            continue
        last, served[method] = record.stages[-1], recipe.stages[-1]
        fields = ("seconds", "peak_bytes", "perplexity", "perplexity_ratio", "bits_per_weight", "total_bytes", "trainable_parameters")
        rows.append({"stage": stage, "method": method, "model": model, **{name: getattr(last, name) for name in fields}})
    if not served:
        raise type(errors[0])(
            f"bench {subject} could measure nothing: {errors[0]} (--set is an option of `pipeline run`; bench keeps to the defaults)"
        )
    if subject == "recover":
        from .training_step import step_seconds

        steps = step_seconds(runner.last_artifact(place, "quantize"), list(served.values()), _device(options), options.repeats)
        rows = [row | steps.get(text(row["method"]), {}) for row in rows]
    return rows


def refuse_failed(measured: Mapping[str, object]) -> None:
    """PipelineError with the first reason, where a method was to be measured on a model and could not be."""
    stages = [row for row in mappings(measured["rows"]) if "model" in row and "stage" in row]
    failed = [row for row in stages if "error" in row]
    if failed:
        names = ", ".join(text(row["method"]) for row in failed)
        raise PipelineError(
            f"bench {measured['bench']}: {len(failed)} of {len(stages)} methods could not be measured ({names}): {failed[0]['error']}; "
            "the others are measured, and --method NAME asks for some alone"
        )


# -- what all have in common -----------------------------------------------------------------------------------------------------


def _environment(device: torch.device, options: Options) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "repeats": options.repeats,
        "warm_up": 1,
    }


def _write(measured: BenchReport, output: Path) -> None:
    from ...reports.drawing import save
    from ...reports.plots import Look, lines_figure
    from ...reports.tables import markdown_table
    from ...reports.units import number

    output.mkdir(parents=True, exist_ok=True)
    path = output / f"bench-{measured['bench']}"
    path.with_suffix(".json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    tables = []
    for rows in (measured["rows"], measured.get("growth", [])):
        keys = list(dict.fromkeys(key for row in rows for key in row))
        numeric = [any(isinstance(row.get(key), int | float) for row in rows) for key in keys]
        tables += [markdown_table(keys, [[number(row.get(key)) for key in keys] for row in rows], numeric)] if rows else []
    lines = [f"{key}: {value}" for key, value in measured["environment"].items()]
    path.with_suffix(".md").write_text("\n\n".join([f"# bench {measured['bench']}", ", ".join(lines), *tables]), encoding="utf-8")
    drawn = [row for row in measured["rows"] if "size" in row and "seconds" in row]
    if drawn:
        title = f"one square matrix, median of {measured['environment']['repeats']}"
        save(lines_figure(drawn, "size", "seconds", "method", look=Look(title=title, log_x=True, log_y=True)), path)
    log.info("written: %s", path.with_suffix(".json"))
