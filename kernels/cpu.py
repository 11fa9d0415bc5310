"""Chooses among the CPU operators by measurement on this machine, remembered per device.

The rows of a call decide, and so does the machine: 16-bit arithmetic is a gain on one and a hundred times slower than float32 on
another. Knows packed weights and their ways to multiply; not modules, files or models.
Legend: M tokens, O out, I in.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .choices import remembered
from .cpu_wide import HalfWeight

CPU = torch.device("cpu")
ROW_BUCKETS = (1, 16, 64, 512)  # a call takes the operator measured at the nearest of these from above
PACKED_PATIENCE = 8.0  # packed is kept unless a dense matmul of one row, out of the cache, is this many times faster
HALF_PATIENCE = 4.0  # a 16-bit dense weight is kept unless float32, out of the cache, is this many times faster
LARGEST = 1 << 25  # elements of a dense matrix made only to be timed
Product = Callable[[Tensor], Tensor]


class PackedWeight(Protocol):
    """A weight [O, I] in a narrow form."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def kind(self) -> str:
        """Its form in words, as part of a key."""
        ...

    def products(self, half_pays: Callable[[torch.dtype], bool], rows: int) -> dict[str, Product]:
        """Ways to multiply x [M, I] → [M, O] that are worth trying for this many rows."""
        ...

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [N, I] of rows ids int64 [N]."""
        ...

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor: ...

    def tensors(self) -> tuple[Tensor, ...]: ...


def bucket(rows: int) -> int:
    return next((b for b in ROW_BUCKETS if rows <= b), ROW_BUCKETS[-1])


def product_for(weight: PackedWeight, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """{"choice", "reason", "microseconds"}: the fastest way to multiply this many rows with a weight of this form and shape."""
    size = bucket(rows)
    key = f"{weight.kind} {weight.shape[0]}x{weight.shape[1]} rows {size} {_name(dtype)}"

    def measure() -> dict[str, object]:
        x, ways = torch.randn(size, weight.shape[1]).to(dtype), weight.products(half_pays, size)
        if len(ways) == 1:
            return {"choice": next(iter(ways)), "reason": "the only way", "microseconds": {}}
        return _fastest({name: microseconds(lambda f=f: f(x)) for name, f in ways.items()})

    return remembered(CPU, key, measure)


def half_pays(dtype: torch.dtype) -> bool:
    """Whether a product of many rows in this 16-bit type is faster than in float32."""

    def measure() -> dict[str, object]:
        factors = torch.randn(64, 256), torch.randn(256, 256)
        pairs = {form: tuple(factor.to(form) for factor in factors) for form in (torch.float32, dtype)}
        return _fastest({_name(form): microseconds(lambda pair=pair: torch.mm(*pair)) for form, pair in pairs.items()})

    return remembered(CPU, f"product 64x256x256 {_name(dtype)}", measure)["choice"] == _name(dtype)


def resident_form(weight: PackedWeight, dtype: torch.dtype) -> dict[str, Any]:
    """ "packed" or "dense" for one row: dense only where packed is hopeless (`PACKED_PATIENCE`)."""
    rows, columns = weight.shape

    def measure() -> dict[str, object]:
        x = torch.randn(1, columns).to(dtype)
        times = {weight.kind: min(microseconds(lambda f=f: f(x)) for f in weight.products(half_pays, 1).values())}
        times |= _dense_times(rows, columns, torch.bfloat16, dtype)
        dense = min((name for name in times if name != weight.kind), key=lambda name: times[name])
        packed = times[weight.kind] <= PACKED_PATIENCE * times[dense]
        reason = f"one row: {weight.kind} {times[weight.kind]:.0f} µs, {dense} {times[dense]:.0f} µs"
        reason += "" if packed else f"; packed is over {PACKED_PATIENCE:g} times slower on this machine"
        return {"choice": "packed" if packed else "dense", "reason": reason, "microseconds": times}

    return remembered(CPU, f"form {rows}x{columns} {weight.kind} {_name(dtype)}", measure)


def dense_form(rows: int, columns: int, half: torch.dtype, dtype: torch.dtype) -> dict[str, Any]:
    """The name of `half` or "float32" for a dense weight: the smaller unless it is over `HALF_PATIENCE` times slower at one row."""

    def measure() -> dict[str, object]:
        times = _dense_times(rows, columns, half, dtype)
        choice = _name(half) if times[_name(half)] <= HALF_PATIENCE * times["float32"] else "float32"
        reason = f"one row: {_name(half)} {times[_name(half)]:.0f} µs, float32 {times['float32']:.0f} µs"
        return {"choice": choice, "reason": reason, "microseconds": times}

    return remembered(CPU, f"dense {rows}x{columns} {_name(half)} {_name(dtype)}", measure)


def _dense_times(rows: int, columns: int, half: torch.dtype, dtype: torch.dtype) -> dict[str, float]:
    tried = min(rows, max(64, LARGEST // columns))
    x, weight = torch.randn(1, columns).to(dtype), torch.randn(tried, columns)
    ways = HalfWeight(weight.to(half)).products(half_pays, 1).values()
    times = {
        _name(half): min(microseconds(lambda f=f: f(x)) for f in ways),
        "float32": microseconds(lambda: F.linear(x.float(), weight)),
    }
    return {name: round(value * rows / tried, 2) for name, value in times.items()}


@torch.inference_mode()
def microseconds(run: Callable[[], object], budget_seconds: float = 0.03) -> float:
    """Best of 5 batches after a warm-up, since other work on the machine only ever adds; a batch fills a fifth of the budget but
    holds at least one call. A call that takes ten budgets is not repeated."""
    once = _seconds(run, 1)
    if once < 10 * budget_seconds:
        once = _seconds(run, 1)
    if once >= 10 * budget_seconds:
        return round(once * 1e6, 2)
    calls = max(1, min(200, int(budget_seconds / 5 / max(once, 1e-7))))
    return round(min(_seconds(run, calls) for _ in range(5)) / calls * 1e6, 2)


def _seconds(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - start


def _fastest(times: dict[str, float]) -> dict[str, object]:
    choice = min(times, key=lambda name: times[name])
    reason = "fastest of " + ", ".join(f"{name} {value:.0f} µs" for name, value in sorted(times.items(), key=lambda item: item[1]))
    return {"choice": choice, "reason": reason, "microseconds": times}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
