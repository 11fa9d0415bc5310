"""The CPU's operators, and which of them this machine should use: decided by measurement, remembered per device.

What torch ships that keeps a 2-, 3- or 4-bit grid packed is `_weight_int4pack_mm_for_cpu`: bfloat16 activations, four bits,
float32 accumulation, weight = (code − 8)·scale + zero. Narrower codes are widened to four bits when they are bound. For many rows
it may lose to unpacking and an ordinary matmul, so the rows of a call decide too. Where it is slow (no AVX2/AVX-512 build) or
cannot hold a weight, a dense matrix is used, and the reason says so.
Knows records of weights and torch; not modules, files or models.
Legend: M tokens, O out, I in, G groups, R rank.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compress.weights import UniformWeight
from .choices import remembered

CPU = torch.device("cpu")
GROUP_SIZES = (256, 128, 64, 32)  # what torch's operator accepts
PADDED_ROWS = 64  # weights are padded to whole blocks of any instruction set, so that unpacking knows one layout only
ROW_BUCKETS = (1, 8, 64, 512)  # a call takes the operator measured at the nearest of these from above
PACKED_PATIENCE = 3.0  # packed is kept unless a dense matmul of one row is this many times faster
HALF_PATIENCE = 1.5  # a 16-bit dense weight is kept unless float32 is this many times faster
_pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
_matmul = torch.ops.aten._weight_int4pack_mm_for_cpu


@dataclass(frozen=True)
class Int4Weight:
    """packed uint8 [O', I/2] in torch's order, O' = O rounded up to 64; scales_zeros bfloat16 [G, O', 2]."""

    packed: Tensor
    scales_zeros: Tensor
    group_size: int
    out_features: int

    @property
    def in_features(self) -> int:
        return self.packed.shape[1] * 2

    def resident_bytes(self) -> int:
        return self.packed.numel() + self.scales_zeros.numel() * 2

    def dense_IO(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[I, O], transposed: what the packed operator multiplies with, computed in float32 in few passes."""
        (block, order), inputs = row_layout(), self.in_features
        blocks = self.packed.view(-1, inputs, block // 2)
        codes = torch.cat((blocks & 15, blocks >> 4), dim=-1)
        if order is not None:
            codes = codes[:, :, order]
        codes_GSO = codes.transpose(0, 1).reshape(self.scales_zeros.shape[0], self.group_size, -1)
        scales, zeros = self.scales_zeros.float().unbind(-1)
        values = torch.addcmul((zeros - 8 * scales).unsqueeze(1), codes_GSO.float(), scales.unsqueeze(1))
        return values.view(inputs, -1)[:, : self.out_features].to(dtype)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[O, I]."""
        return self.dense_IO(dtype).t()


@cache
def row_layout() -> tuple[int, Tensor | None]:
    """(rows of a block, int64 [rows]: where row r of a block stands among its low nibbles followed by its high ones; None: in order),
    found by packing the row numbers themselves, since it differs between instruction sets (AVX-512: blocks of 64; AVX2: of 32).
    ValueError if this torch packs in yet another way."""
    rows = torch.arange(PADDED_ROWS, dtype=torch.int32).unsqueeze(1).expand(-1, 4)
    low, high = (_pack(part.contiguous(), 2) for part in (rows % 16, rows // 16))
    for block in (64, 32):
        a, b = (part.view(-1, 4, block // 2) for part in (low, high))
        found = torch.cat(((a & 15) + 16 * (b & 15), (a >> 4) + 16 * (b >> 4)), dim=-1).long()
        expected = torch.arange(PADDED_ROWS).view(-1, 1, block)
        order = found[0, 0].argsort()
        if torch.equal(found[..., order], expected.expand_as(found)):
            return block, None if torch.equal(order, torch.arange(block)) else order
    raise ValueError(f"torch {torch.__version__} packs int4 weights in an unknown order on {torch.backends.cpu.get_cpu_capability()}")


def pack_int4(base: UniformWeight) -> Int4Weight:
    """Widen to four bits and pack. ValueError says why torch's operator cannot hold this weight.

    Codes are shifted, per group, so that an integer zero point lies at 8 where the codes in use allow (always below four bits):
    then no zero has to be rounded to bfloat16 and masked weights are exactly 0."""
    row_layout()
    rows, columns = base.shape
    if base.bits > 4:
        raise ValueError(f"torch ships no packed operator for {base.bits}-bit groups on the CPU")
    if base.group_index is not None:
        raise ValueError("torch's operator needs contiguous groups and group_index is set")
    stored = columns // base.groups
    fitting = [g for g in GROUP_SIZES if stored % g == 0]
    if not fitting:
        raise ValueError(f"torch's operator needs groups of a multiple of 32; group_size is {stored}")
    codes, zeros, scales = base.codes_OI().int(), base.zeros_OG(), base.scales.float()
    grouped = codes.view(rows, base.groups, stored)
    shift = torch.minimum(torch.maximum(8 - zeros.round(), -grouped.amin(-1)), 15 - grouped.amax(-1))
    codes = codes + shift.int().repeat_interleave(stored, dim=1)
    offsets = (8 - zeros - shift) * scales
    repeat = stored // fitting[0]
    both = torch.stack((scales, offsets), dim=-1).repeat_interleave(repeat, dim=1)
    padding = -rows % PADDED_ROWS
    packed = _pack(F.pad(codes, (0, 0, 0, padding)).contiguous(), 2)
    both = F.pad(both, (0, 0, 0, 0, 0, padding)).transpose(0, 1).to(torch.bfloat16).contiguous()
    return Int4Weight(packed, both, fitting[0], rows)


def int4_matmul(x_MI: Tensor, weight: Int4Weight) -> Tensor:
    """bfloat16 [M, O]: torch's packed operator."""
    y = _matmul(x_MI.to(torch.bfloat16), weight.packed, weight.group_size, weight.scales_zeros)
    return y if y.shape[1] == weight.out_features else y[:, : weight.out_features]


def unpacked_matmul_float32(x_MI: Tensor, weight: Int4Weight) -> Tensor:
    return x_MI.float() @ weight.dense_IO(torch.float32)


def unpacked_matmul_bfloat16(x_MI: Tensor, weight: Int4Weight) -> Tensor:
    return x_MI.to(torch.bfloat16) @ weight.dense_IO(torch.bfloat16)


PACKED_OPERATORS: Mapping[str, Callable[[Tensor, Int4Weight], Tensor]] = {
    "int4": int4_matmul,
    "unpack+float32": unpacked_matmul_float32,
    "unpack+bfloat16": unpacked_matmul_bfloat16,
}


def bucket(rows: int) -> int:
    return next((b for b in ROW_BUCKETS if rows <= b), ROW_BUCKETS[-1])


def packed_operator(weight: Int4Weight, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """{"choice", "reason", "microseconds"}: the fastest way to multiply this many rows with a packed weight of this shape."""
    size = bucket(rows)
    key = f"packed {weight.out_features}x{weight.in_features} group {weight.group_size} rows {size} {_name(dtype)}"

    def measure() -> dict[str, Any]:
        x = torch.randn(size, weight.in_features).to(dtype)
        times = {name: microseconds(lambda f=f: f(x, weight)) for name, f in PACKED_OPERATORS.items()}
        return _fastest(times)

    return remembered(CPU, key, measure)


def resident_form(weight: Int4Weight, dtype: torch.dtype) -> dict[str, Any]:
    """Packed or dense, for one row: dense only where packed is hopeless (`PACKED_PATIENCE`)."""
    rows, columns = weight.out_features, weight.in_features
    key = f"form {rows}x{columns} group {weight.group_size} {_name(dtype)}"

    def measure() -> dict[str, Any]:
        x = torch.randn(1, columns).to(dtype)
        times = {"int4": microseconds(lambda: int4_matmul(x, weight))} | _dense_times(rows, columns, dtype)
        dense = min((name for name in times if name != "int4"), key=lambda name: times[name])
        packed = times["int4"] <= PACKED_PATIENCE * times[dense]
        choice = "int4" if packed else dense
        reason = f"one row: int4 {times['int4']:.0f} µs, {dense} {times[dense]:.0f} µs"
        reason += "" if packed else f"; packed is over {PACKED_PATIENCE:g} times slower on this machine"
        return {"choice": choice, "reason": reason, "microseconds": times}

    return remembered(CPU, key, measure)


def dense_form(rows: int, columns: int, dtype: torch.dtype) -> dict[str, Any]:
    """ "bfloat16" or "float32" for a dense weight: the smaller unless it is over `HALF_PATIENCE` times slower at one row."""

    def measure() -> dict[str, Any]:
        times = _dense_times(rows, columns, dtype)
        choice = "bfloat16" if times["bfloat16"] <= HALF_PATIENCE * times["float32"] else "float32"
        reason = f"one row: bfloat16 {times['bfloat16']:.0f} µs, float32 {times['float32']:.0f} µs"
        return {"choice": choice, "reason": reason, "microseconds": times}

    return remembered(CPU, f"dense {rows}x{columns} {_name(dtype)}", measure)


def _dense_times(rows: int, columns: int, dtype: torch.dtype) -> dict[str, float]:
    x, weight = torch.randn(1, columns).to(dtype), torch.randn(rows, columns)
    times = {}
    for form in (torch.bfloat16, torch.float32):
        matrix = weight.to(form)
        times[_name(form)] = microseconds(lambda m=matrix: F.linear(x.to(m.dtype), m))
    return times


@torch.inference_mode()
def microseconds(run: Callable[[], Any], budget_seconds: float = 0.03) -> float:
    """Best of 5 batches after a warm-up, since other work on the machine only ever adds; a batch fills a fifth of the budget but holds at least one call."""
    run()
    start = time.perf_counter()
    run()
    once = time.perf_counter() - start
    calls = max(1, min(200, int(budget_seconds / 5 / max(once, 1e-7))))
    batches = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        batches.append((time.perf_counter() - start) / calls * 1e6)
    return round(min(batches), 2)


def _fastest(times: dict[str, float]) -> dict[str, Any]:
    choice = min(times, key=lambda name: times[name])
    reason = "fastest of " + ", ".join(f"{name} {value:.0f} µs" for name, value in sorted(times.items(), key=lambda item: item[1]))
    return {"choice": choice, "reason": reason, "microseconds": times}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
