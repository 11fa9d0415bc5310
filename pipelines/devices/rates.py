"""Throughput of a device from a short measurement on it, and work counted in the same units.

Knows torch and a device; not models, stages or methods.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from .compute import Compute

REPEATS = 5
LONG = 0.2
"""Seconds that one measurement may take."""
SIDE = 1024
ELEMENTS = 1 << 18
"""What lies in the caches of a CPU and keeps a GPU busy."""


@dataclass(frozen=True)
class Work:
    """`products`: multiply-adds of matrix products by dtype; `factors`: those of eigenvectors, QR and Cholesky, in float64; `passes`: bytes
    that elementwise operations read and write; `powers`: numbers raised to a power; `calls`: single operations, however small; `files`: bytes
    hashed and written."""

    products: Mapping[torch.dtype, float] = field(default_factory=dict)
    factors: float = 0.0
    passes: float = 0.0
    calls: float = 0.0
    files: float = 0.0
    powers: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        dtypes = {**self.products, **other.products}
        products = {dtype: self.products.get(dtype, 0.0) + other.products.get(dtype, 0.0) for dtype in dtypes}
        return Work(products, *(a + b for a, b in zip(self.other_counts, other.other_counts, strict=True)))

    def __mul__(self, times: float) -> "Work":
        products = {dtype: count * times for dtype, count in self.products.items()}
        return Work(products, *(count * times for count in self.other_counts))

    __rmul__ = __mul__

    @property
    def other_counts(self) -> tuple[float, ...]:
        return self.factors, self.passes, self.calls, self.files, self.powers

    def in_products(self, dtype: torch.dtype, count: float) -> "Work":
        return self + Work({dtype: count})


@dataclass(frozen=True)
class Speeds:
    """Per second: multiply-adds of products by dtype, multiply-adds of factorizations, bytes of elementwise passes, calls, bytes of files, powers."""

    products: Mapping[torch.dtype, float]
    factors: float
    passes: float
    calls: float
    files: float
    powers: float

    def seconds(self, work: Work) -> float:
        products = sum(count / self.products[dtype] for dtype, count in work.products.items())
        speeds = (self.factors, self.passes, self.calls, self.files, self.powers)
        return products + sum(count / speed for count, speed in zip(work.other_counts, speeds, strict=True))


def measured(compute: Compute, clock: Callable[[], float] = time.perf_counter) -> Speeds:
    """About half a second of this device's time (a few milliseconds of a GPU's). `clock`: time.process_time where others use the processor."""
    device, dtypes = compute.device, {torch.float32, torch.float64, compute.dtype}
    products = {dtype: _products(device, dtype, clock) for dtype in dtypes}
    a, b = (torch.ones(ELEMENTS, device=device) for _ in range(2))
    out, few = torch.empty_like(a), torch.ones(256, device=device)
    square = torch.ones(256, 256, device=device, dtype=torch.float64) + torch.eye(256, device=device, dtype=torch.float64)
    passes = 3 * out.nbytes / _seconds(lambda: torch.add(a, b, out=out), device, 20, clock)
    calls = 1 / _seconds(lambda: few.add_(1.0), device, 200, clock)
    factors = EIGEN * 256**3 / _seconds(lambda: torch.linalg.eigh(square), device, 1, clock)
    powers = out.numel() / _seconds(lambda: torch.pow(a, 2.4, out=out), device, 2, clock)
    return Speeds(products, factors, passes, calls, _file_bytes_per_second(clock), powers)


EIGEN = 9.0
"""Multiply-adds of all eigenvectors of an n × n matrix, in n³: what `factors` counts in."""


def _products(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    rows = SIDE // 4
    x, weight = torch.ones(rows, SIDE, device=device, dtype=dtype), torch.ones(SIDE, SIDE, device=device, dtype=dtype)
    return rows * SIDE * SIDE / _seconds(lambda: torch.nn.functional.linear(x, weight), device, 1, clock)


def _seconds(work: Callable[[], object], device: torch.device, times: int, clock: Callable[[], float]) -> float:
    """Of one call, the median of a few measurements after a first that warms up; no more of them where they take long."""
    result: list[float] = []
    while len(result) < REPEATS + 1 and sum(result) * times < LONG:
        began = clock()
        for _ in range(times):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        result.append((clock() - began) / times)
    measured = sorted(result[1:] or result)
    return max(measured[len(measured) // 2], 1e-9)


def _file_bytes_per_second(clock: Callable[[], float]) -> float:
    """Hashing bounds how fast an artifact is written where the disk is quick, reading it how fast it is checked."""
    block = bytes(1 << 22)
    began = clock()
    hashlib.sha256(block).digest()
    return len(block) / max(clock() - began, 1e-9)
