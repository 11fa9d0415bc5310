"""`pipeline bench`: seconds, memory and error of the methods, on synthetic layers or, with a model, as whole stages of a run.

compress and decompose solve one random matrix a size, whose inputs have a decaying spectrum and a few outlier channels; decompose
measures the exact step against its published route as well, and allocate the integer program of a budget (`solvers`);
recover, and every subject given a model, runs real stages through the runner, one row a method; scale on several processes (`process_scaling`).
kernels measures itself; generate a run's models (`decode_speed`), or one of random weights (`model_speed`).
Legend: O out, I in, T tokens.
"""

import ctypes
import gc
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from ...compress.statistics import Fisher, InputStatistics, LayerStatistics
from ...compress.weights import DenseWeight, StoredWeight
from ...reports.json_values import integer, mappings, text
from ..devices.compute import chosen_device
from ..doctor import cpu_name
from ..errors import PipelineError, UsageError
from ..recipes.recipe import resolve
from ..recipes.settings import unknown
from ..recipes.stage_settings import StageSpec, build, methods
from . import solvers
from .command_times import command_rows
from .scaling import Row

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
        rows = list(_on_layers(subject, chosen, options, device))
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


# -- synthetic layers ------------------------------------------------------------------------------------------------------------


def synthetic_layer(size: int, needs: frozenset[str], device: torch.device) -> tuple[Tensor, LayerStatistics]:
    """A square matrix [O, I] and statistics of inputs with a decaying spectrum and outlier channels; the same for the same size."""
    draw = torch.Generator().manual_seed(size)
    weight_OI = (torch.randn(size, size, generator=draw) * size**-0.5).to(device)
    mix_II = torch.randn(size, size, generator=draw).mul_(torch.arange(1, size + 1).rsqrt().unsqueeze(1)).to(device)
    outliers_I = torch.ones(size, device=device)
    outliers_I[:: max(1, size // 8)] = 8.0
    gathered = InputStatistics(size, needs - {"fisher"}, device)
    for _ in range(max(2, -(-2 * size // 1024))):
        x_TI = torch.randn(1024, size, generator=draw).to(device) @ mix_II * outliers_I / size**0.5
        dense_TI = x_TI + 0.05 * torch.randn(1024, size, generator=draw).to(device) if "cross_moment" in needs else None
        gathered.update(x_TI, dense_TI)
    fisher = None
    if "fisher" in needs:
        fisher_O, fisher_I = (torch.rand(size, generator=draw).square().to(device) for _ in range(2))
        fisher = Fisher(fisher_O, fisher_I)
    return weight_OI, LayerStatistics(gathered, fisher)


def _on_layers(subject: str, chosen: Sequence[tuple[str, str]], options: Options, device: torch.device) -> Iterator[Row]:
    for size in options.sizes:
        for stage, method in chosen:
            row = methods(stage)[method]
            if getattr(row, "scope", "matrix") != "matrix":
                if size == options.sizes[0]:
                    yield {"stage": stage, "method": method, "error": "trains whole blocks, not a matrix: measure it with -m MODEL"}
                continue
            try:
                measured = _layer_row(subject, stage, method, size, options.repeats, device)
            except ValueError as error:
                log.warning("%s %s at %d: %s", stage, method, size, error)
                yield {"stage": stage, "method": method, "size": size, "error": str(error)}
                continue
            log.info("%s %s, %d × %d: %.3f s", stage, method, size, size, measured["seconds"])
            yield measured
        if subject == "decompose" and (not options.only or "qera_exact" in options.only):
            weight_OI, known = synthetic_layer(size, frozenset({"second_moment"}), device)
            moment_II = known.inputs.second_moment_II
            yield from solvers.exact_steps(weight_OI, moment_II, lambda s: _measured(s, options.repeats, device), options.full)


def _layer_row(subject: str, stage: str, method: str, size: int, repeats: int, device: torch.device) -> Row:
    row, spec = methods(stage)[method], build(stage, stage, {"method": method})
    assert spec is not None
    weight_OI, known = synthetic_layer(size, frozenset(row.needs(spec.config)) | {"second_moment"}, device)
    begun = StoredWeight(DenseWeight(weight_OI))
    for entry in BEFORE[subject]:
        ((name, settings),) = entry.items()
        earlier = build(name, name, settings)
        assert earlier is not None
        begun, _ = methods(name)[earlier.method].function(begun, weight_OI, known, earlier.config)
    result: list[StoredWeight] = []

    def solve() -> None:
        known.inputs.factors.clear()
        result[:] = [row.function(begun, weight_OI, known, spec.config)[0]]

    seconds, peak_bytes = _measured(solve, repeats, device)
    moment_II = known.inputs.second_moment_II.double()
    missing_OI = (weight_OI - result[0].dense()).double()
    error = ((missing_OI @ moment_II) * missing_OI).sum() / ((weight_OI.double() @ moment_II) * weight_OI.double()).sum()
    return {
        "stage": stage,
        "method": method,
        "size": size,
        "seconds": statistics.median(seconds),
        "spread_seconds": max(seconds) - min(seconds),
        "peak_bytes": peak_bytes,
        "relative_output_error": float(error.clamp_min(0).sqrt()),
        "bits_per_weight": result[0].bits_per_weight(),
    }


def _measured(solve: Callable[[], None], repeats: int, device: torch.device) -> tuple[list[float], int]:
    """Seconds of each repeat after one warm-up, and the most memory that the warm-up took beyond what was there before."""
    peak_bytes = _peak_bytes(solve, device)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        solve()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds, peak_bytes


def _peak_bytes(solve: Callable[[], None], device: torch.device) -> int:
    """On the GPU what torch allocated; elsewhere the kernel's own high-water mark, set back before, where it can be (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        solve()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _give_back_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status_bytes("VmRSS")
        solve()
        return max(0, _status_bytes("VmHWM") - before)
    except OSError:
        from ..evaluation.measure import Peak, resident_bytes

        before = resident_bytes()
        with Peak(device) as peak:
            solve()
        return max(0, peak.bytes - before)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _give_back_freed_memory() -> None:
    """Pages that earlier rows freed would hide what this one takes."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


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
