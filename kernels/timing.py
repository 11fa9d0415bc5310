"""How the benchmark measures: weights colder than the cache, CUDA graphs on a card, medians with their spread, peaks of the device.

Knows callables and devices; not operators.
"""

import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .choices import device_name

COLD_BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}  # copies of a weight are visited in turn until this much has passed
MOST_COPIES = {"cuda": 64, "cpu": 8}


@dataclass(frozen=True)
class TimingProtocol:
    """warm_up passes over all copies, then `repeats` timed ones; fewer of both, three timed ones at least, where they would take more
    than `most_seconds`, and where one pass takes longer than that, this one alone."""

    warm_up: int = 3
    repeats: int = 11
    most_seconds: float = 1.0


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median over `repeats` passes, and the distance between the quartiles (None of fewer than three)."""

    microseconds: float
    spread: float | None
    repeats: int


def copies_for(resident_bytes: int, device: torch.device) -> int:
    """How many copies of a weight keep its bytes out of the cache."""
    return max(2, min(MOST_COPIES[device.type], -(-COLD_BYTES[device.type] // max(resident_bytes, 1))))


@torch.inference_mode()
def time_calls(calls: Sequence[Callable[[], object]], device: torch.device, protocol: TimingProtocol) -> Timing:
    """Time of one call when all are made in turn; on CUDA as one graph."""
    once = _graph(calls) if device.type == "cuda" else lambda: [call() for call in calls] and None
    measure = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    collecting = gc.isenabled()
    gc.disable()
    try:
        seconds = measure(once)
        if seconds > protocol.most_seconds:
            samples = [seconds]
        else:
            for _ in range(1, protocol.warm_up):
                seconds = min(seconds, measure(once))
            samples = [measure(once) for _ in range(max(3, min(protocol.repeats, int(protocol.most_seconds / max(seconds, 1e-9)))))]
    finally:
        if collecting:
            gc.enable()
    microseconds = [sample / len(calls) * 1e6 for sample in samples]
    quartiles = statistics.quantiles(microseconds, n=4) if len(microseconds) > 2 else None
    spread = None if quartiles is None else round(quartiles[2] - quartiles[0], 2)
    return Timing(round(statistics.median(microseconds), 2), spread, len(microseconds))


def _cpu_seconds(once: Callable[[], object]) -> float:
    start = time.perf_counter()
    once()
    return time.perf_counter() - start


def _cuda_seconds(once: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    once()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _graph(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """All calls recorded once; each is run beforehand on a side stream, which tunes and compiles it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def peaks(device: torch.device, protocol: TimingProtocol) -> dict[str, float]:
    """What this device was seen to reach: gigabytes a second of a copy (read and written), teraflops of torch's own matmul."""
    elements = (1 << 30 if device.type == "cuda" else 64 << 20) // 4
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    copy = time_calls([partial(target.copy_, source)], device, protocol)
    del source, target
    size, best = (8192 if device.type == "cuda" else 512), 0.0
    for dtype in (torch.bfloat16, torch.float32):
        left = torch.randn(size, size, device=device).to(dtype)
        product = time_calls([partial(torch.mm, left, left)], device, protocol)
        best = max(best, 2 * size**3 / product.microseconds / 1e6)
    return {"gigabytes_per_second": round(8 * elements / copy.microseconds / 1e3, 1), "teraflops": round(best, 3)}


def environment(device: torch.device, protocol: TimingProtocol) -> dict[str, object]:
    """Everything a reader needs to judge the numbers."""
    import triton

    return {
        "device": str(device),
        "device_name": device_name(device),
        "clocks": clocks(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "threads": torch.get_num_threads(),
        "warm_up": protocol.warm_up,
        "repeats": protocol.repeats,
        "most_seconds": protocol.most_seconds,
        "peak": peaks(device, protocol),
    }


def clocks(device: torch.device) -> str:
    """The current clocks as the system reports them; "unknown" where it does not."""
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw", "--format=csv,noheader", f"--id={device.index or 0}"]
        try:
            return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return "unknown"
    information = Path("/proc/cpuinfo")
    seen = [line.split(":")[1].strip() for line in information.read_text().splitlines() if "MHz" in line] if information.exists() else []
    return f"{' '.join(sorted(set(seen)))} MHz" if seen else "unknown"
