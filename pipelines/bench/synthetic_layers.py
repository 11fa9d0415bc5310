"""Synthetic layers of `pipeline bench`: random matrices whose inputs have a decaying spectrum and a few outlier channels, and the seconds,
memory and error of the methods that solve one.

Knows the methods by stage and name; no models, no runs.
Legend: O out, I in, T tokens.
"""

import ctypes
import gc
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...compress.statistics import Fisher, InputStatistics, LayerStatistics
from ...compress.weights import DenseWeight, StoredWeight
from ..recipes.stage_settings import build, methods
from . import solvers
from .scaling import Row

log = logging.getLogger(__name__)

Stage = Mapping[str, Mapping[str, object]]
"""As in a recipe: {name: settings}."""


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


def layer_rows(
    chosen: Sequence[tuple[str, str]],
    before: Sequence[Stage],
    sizes: Sequence[int],
    repeats: int,
    device: torch.device,
    exact: bool,
    full: bool,
) -> Iterator[Row]:
    """A row for every (stage, method) at every size, on what the stages `before` leave; one with the reason where a method cannot be measured. `exact`:
    the exact low-rank step against its published route as well, `full` with its slowest part."""
    for size in sizes:
        for stage, method in chosen:
            row = methods(stage)[method]
            if getattr(row, "scope", "matrix") != "matrix":
                if size == sizes[0]:
                    yield {"stage": stage, "method": method, "error": "trains whole blocks, not a matrix: measure it with -m MODEL"}
                continue
            try:
                row_of_size = _layer_row(stage, method, before, size, repeats, device)
            except ValueError as error:
                log.warning("%s %s at %d: %s", stage, method, size, error)
                yield {"stage": stage, "method": method, "size": size, "error": str(error)}
                continue
            log.info("%s %s, %d × %d: %.3f s", stage, method, size, size, row_of_size["seconds"])
            yield row_of_size
        if exact:
            weight_OI, known = synthetic_layer(size, frozenset({"second_moment"}), device)
            moment_II = known.inputs.second_moment_II
            yield from solvers.exact_steps(weight_OI, moment_II, lambda solve: measured(solve, repeats, device), full)


def _layer_row(stage: str, method: str, before: Sequence[Stage], size: int, repeats: int, device: torch.device) -> Row:
    row, spec = methods(stage)[method], build(stage, stage, {"method": method})
    assert spec is not None
    weight_OI, known = synthetic_layer(size, frozenset(row.needs(spec.config)) | {"second_moment"}, device)
    begun = StoredWeight(DenseWeight(weight_OI))
    for entry in before:
        ((name, settings),) = entry.items()
        earlier = build(name, name, settings)
        assert earlier is not None
        begun, _ = methods(name)[earlier.method].function(begun, weight_OI, known, earlier.config)
    result: list[StoredWeight] = []

    def solve() -> None:
        known.inputs.factors.clear()
        result[:] = [row.function(begun, weight_OI, known, spec.config)[0]]

    seconds, peak_bytes = measured(solve, repeats, device)
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


def measured(solve: Callable[[], None], repeats: int, device: torch.device) -> tuple[list[float], int]:
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
