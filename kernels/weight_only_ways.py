"""The ways of `weight_only_matmul_up`, each a launcher of its kernels, and the chooser between them.

A way is a function of checked arguments and block sizes, and a row of WAYS. Sums run in a fixed order in each. Knows tensors; not modules.
Legend: M tokens, N = O outputs, K = I inputs, R rank, S splits.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from . import torch_int4
from .candidates import APART, GEMV, INT4, OLDER, SCRATCH, SPLIT, TILE, candidates_for
from .gemv_kernels import gemv_finish_kernel, gemv_kernel, gemv_share_kernel, project_kernel
from .launch import TRITON_DTYPES, can_time, h_strides, row_bucket, segment_table, shift_for, start
from .layout import SLOTS, TiledWeight
from .tuning import Blocks, measured, tuned
from .weight_only_kernels import dequantize_kernel, finish_kernel, partial_kernel, sums_kernel, tile_kernel

BLOCK_R = 32
FINISH_M = 64  # most tokens of a program that adds splits
DOWN_ROWS, DOWN_STEP, DOWN_SPLITS = 4, 128, 16  # of the down-projection without the matrix unit: rows, pairs of inputs, splits alone
SCRATCH_BYTES = 256 << 20
ENOUGH = {GEMV: 256, SPLIT: 512, TILE: 256}
"""Programs of a way from which on its inputs are not split further, whatever the candidate allows: partial sums cost bytes."""
INT4_BURDEN = 1.05
"""torch's operator needs the codes a second time: it is taken where it is faster by more than the 5 % that a choice may lose."""


@dataclass(frozen=True)
class Operands:
    """x·Wᵀ + h·upᵀ + bias: x [M, I] of the kernels' dtype, h [M, R], partial sums [S, M, R], or None with down [R, I]; all checked."""

    x: Tensor
    weight: TiledWeight
    h: Tensor | None
    up: Tensor | None
    bias: Tensor | None
    down: Tensor | None
    segments: tuple[tuple[int, int, int, int], ...]

    @property
    def ranks(self) -> int:
        return 0 if self.up is None else self.down.shape[0] if self.down is not None else self.h.shape[-1] if self.h is not None else 0

    def empty(self) -> Tensor:
        return torch.empty(self.x.shape[0], self.weight.shape[0], dtype=self.x.dtype, device=self.x.device)

    def grid_options(self) -> dict[str, Any]:
        """What kernels must know of the grid when they are compiled."""
        weight = self.weight
        zeros, book = weight.zeros is not None, weight.book is not None
        return {"BITS": weight.bits, "SLOTS": SLOTS[weight.bits], "LANES": weight.lanes, "HAS_ZEROS": zeros, "HAS_BOOK": book}


def multiply(operands: Operands) -> Tensor:
    """y [M, O] by the way chosen for the device, the weight's shape and grid, the rows' bucket and the rank."""
    blocks = choose(operands)
    return WAYS[blocks.way](operands, blocks)


def choose(operands: Operands) -> Blocks:
    x, weight = operands.x, operands.weight
    device, bucket = x.device, row_bucket(x.shape[0], 1)
    kind = "book" if weight.book is not None else "symmetric" if weight.zeros is None else "zeros" if weight.exact_zeros else "free zeros"
    given = "" if operands.up is None else " of h" if operands.down is None else " of x"
    key = f"weight-only {weight.shape[0]}x{weight.shape[1]} {weight.bits} bits {kind} group {weight.group_size} rows {bucket}"
    key += f" rank {operands.ranks}{given} {x.dtype}"
    if (settled := measured(key, device)) is not None:
        return settled
    capability = torch.cuda.get_device_capability(device) if can_time(device) else OLDER
    candidates = candidates_for(bucket, capability, operands.up is not None, carries_int4(x, weight))
    packed_before = "int4" in weight.__dict__
    blocks = tuned(
        key, device, candidates, lambda blocks: WAYS[blocks.way](operands, blocks), lambda blocks: INT4_BURDEN if blocks.way == INT4 else 1.0
    )
    if blocks.way != INT4 and not packed_before:
        weight.__dict__.pop("int4", None)  # what was packed to be measured
    return blocks


def carries_int4(x: Tensor, weight: TiledWeight) -> bool:
    """Whether torch's operator is a candidate."""
    return (
        x.dtype == torch.bfloat16 and x.device.type == "cuda" and not torch_int4.availability(x.device) and weight.int4_refusal == ""
    )  # fmt: skip


def splits_of(tiles: int, blocks: Blocks, programs: int) -> tuple[int, int]:
    """(splits, tiles of each) for a grid of so many programs without any."""
    per_split = triton.cdiv(tiles, min(blocks.splits, triton.cdiv(ENOUGH[blocks.way], programs)))
    return triton.cdiv(tiles, per_split), per_split


def gemv(operands: Operands, blocks: Blocks) -> Tensor:
    """Up to 8 rows, each multiplied in float32. `stages` is how many tiles of codes are on their way at once, for one row or two."""
    x, weight, y = as_words(operands.x), operands.weight, operands.empty()
    (rows, inputs), out = operands.x.shape, weight.shape[0]
    options = operands.grid_options() | {"GROUP": weight.group_size, "DTYPE": TRITON_DTYPES[operands.x.dtype], "ROWS": triton.next_power_of_2(rows)}
    options |= {"BLOCK_N": blocks.n, "UNROLL": max(1, min(blocks.stages, 2 * blocks.stages // options["ROWS"])), "num_warps": blocks.warps, "num_stages": 1}
    tables = weight.codes, weight.scales, weight.zeros, weight.book
    splits, per_split = splits_of(weight.tiles, blocks, triton.cdiv(out, blocks.n))
    source, table = operands.h, segment_table(operands.segments, x.device)
    if splits == 1:
        source = project(operands, x) if operands.down is not None else source
        partials, *strides = h_strides(source)
        start(
            gemv_kernel, (triton.cdiv(out, blocks.n),),
            x, *tables, operands.up, source, table, operands.bias, y, rows, out, inputs, triton.cdiv(inputs, 2), x.stride(0), weight.tiles,
            len(operands.segments), partials, 0 if operands.up is None else operands.up.stride(0), *strides, y.stride(0), HAS_LOW_RANK=operands.up is not None,
            HAS_BIAS=operands.bias is not None, BLOCK_R=BLOCK_R, **options,
        )  # fmt: skip
        return y
    down = None if operands.down is None else as_words(operands.down.to(operands.x.dtype))
    ranks, blocks_n = 0 if down is None else down.shape[0], triton.cdiv(out, blocks.n)
    work = torch.empty(splits, rows, out + ranks, dtype=torch.float32, device=x.device)
    start(
        gemv_share_kernel, (blocks_n + triton.cdiv(ranks, DOWN_ROWS), splits),
        x, *tables, down, work, rows, out, inputs, triton.cdiv(inputs, 2), ranks, x.stride(0), 0 if down is None else down.stride(0), weight.tiles,
        per_split, blocks_n,
        HAS_DOWN=down is not None, BLOCK_D=DOWN_ROWS, STEP=DOWN_STEP, **options,
    )  # fmt: skip
    source = source if down is None else work[:, :, out:]
    partials, *strides = h_strides(source)
    start(
        gemv_finish_kernel, (triton.cdiv(out, 64),),
        work, operands.up, source, table, operands.bias, y, rows, out, ranks, splits, len(operands.segments), partials,
        0 if operands.up is None else operands.up.stride(0), *strides, y.stride(0), HAS_LOW_RANK=operands.up is not None,
        HAS_BIAS=operands.bias is not None, DTYPE=options["DTYPE"], ROWS=options["ROWS"], BLOCK_N=64, BLOCK_R=BLOCK_R, num_warps=2, num_stages=1,
    )  # fmt: skip
    return y


def as_words(value: Tensor) -> Tensor:
    """Contiguous rows as int32 words of two 16-bit numbers (an odd row gets a zero more); float32 rows as they are."""
    if value.dtype == torch.float32:
        return value.contiguous()
    return (torch.nn.functional.pad(value, (0, 1)) if value.shape[1] % 2 else value.contiguous()).view(torch.int32)


def project(operands: Operands, x: Tensor) -> Tensor:
    """h float32 [S, M, R] of x as words."""
    assert operands.down is not None
    down, (rows, inputs) = as_words(operands.down.to(operands.x.dtype)), operands.x.shape
    steps = triton.cdiv(inputs, 2 * DOWN_STEP)
    per_split = triton.cdiv(steps, min(DOWN_SPLITS, steps))
    splits = triton.cdiv(steps, per_split)
    h = torch.empty(splits, rows, down.shape[0], dtype=torch.float32, device=x.device)
    start(
        project_kernel, (triton.cdiv(down.shape[0], DOWN_ROWS), splits),
        x, down, h, rows, inputs, triton.cdiv(inputs, 2), down.shape[0], x.stride(0), down.stride(0), per_split, DTYPE=TRITON_DTYPES[operands.x.dtype],
        ROWS=triton.next_power_of_2(rows), BLOCK_D=DOWN_ROWS, STEP=DOWN_STEP, num_warps=4, num_stages=1,
    )  # fmt: skip
    return h


def split(operands: Operands, blocks: Blocks) -> Tensor:
    """Up to 64 rows, padded to 16: inputs split over programs, down's rows appended to the weight's, one finishing pass."""
    x, weight, down, y = operands.x, operands.weight, operands.down, operands.empty()
    (rows, inputs), out = x.shape, weight.shape[0]
    ranks, block_m = 0 if down is None else down.shape[0], max(16, triton.next_power_of_2(rows))
    blocks_n = triton.cdiv(out, blocks.n)
    splits, per_split = splits_of(weight.tiles, blocks, blocks_n)
    work = torch.empty(splits, out + ranks, block_m, dtype=torch.float32, device=x.device)
    sums = None
    if weight.book is None and x.dtype != torch.float32 and not weight.exact_zeros:
        fragments = weight.tiles * SLOTS[weight.bits]
        sums = torch.empty(fragments, block_m, dtype=torch.float32, device=x.device)
        start(
            sums_kernel, (fragments,), x, sums, rows, inputs, x.stride(0), x.stride(1), LANES=weight.lanes, BLOCK_M=block_m, num_warps=1,
            num_stages=1,
        )  # fmt: skip
    start(
        partial_kernel, (blocks_n + triton.cdiv(ranks, 16), splits),
        x, weight.codes, weight.scales, weight.zeros, weight.book, sums, down, work, rows, out, inputs, ranks, x.stride(0), x.stride(1),
        *((0, 0) if down is None else down.stride()), weight.tiles, per_split, weight.group_size, blocks_n, **operands.grid_options(),
        SHIFT=shift_for(x.dtype, weight.bits), HAS_SUMS=sums is not None, HAS_DOWN=down is not None, DTYPE=TRITON_DTYPES[x.dtype],
        BLOCK_N=blocks.n, BLOCK_M=block_m, BLOCK_D=16, STEP=128, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    _finish(operands, work, operands.h if down is None else work[:, out:].transpose(1, 2), y)
    return y


def tile(operands: Operands, blocks: Blocks) -> Tensor:
    """Any rows: a weight is dequantized in registers once for `blocks.m` of them; the inputs are split where tiles would be too few."""
    x, weight, y = operands.x, operands.weight, operands.empty()
    (rows, inputs), out = x.shape, weight.shape[0]
    h = operands.h if operands.down is None else x @ operands.down.to(x.dtype).t()
    partials, *strides = h_strides(h)
    splits, per_split = splits_of(weight.tiles, blocks, triton.cdiv(rows, blocks.m) * triton.cdiv(out, blocks.n))
    work = None if splits == 1 else torch.empty(splits, out, rows, dtype=torch.float32, device=x.device)
    start(
        tile_kernel, (triton.cdiv(rows, blocks.m), triton.cdiv(out, blocks.n), splits),
        x, weight.codes, weight.scales, weight.zeros, weight.book, operands.up, h, segment_table(operands.segments, x.device), operands.bias, y,
        work, rows, out, inputs, x.stride(0), x.stride(1), weight.tiles, per_split, weight.group_size, len(operands.segments), partials,
        0 if operands.up is None else operands.up.stride(0), *strides, y.stride(0), *((0, 0) if work is None else work.stride()[:2]),
        **operands.grid_options(), HAS_BIAS=operands.bias is not None, HAS_LOW_RANK=operands.up is not None, SPLIT=work is not None,
        DTYPE=TRITON_DTYPES[x.dtype], UP_DTYPE=TRITON_DTYPES[x.dtype], BLOCK_N=blocks.n, BLOCK_M=blocks.m, BLOCK_R=BLOCK_R,
        STEP=math.gcd(blocks.slots, SLOTS[weight.bits]), num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    if work is not None:
        _finish(operands, work, h, y)
    return y


def _finish(operands: Operands, work: Tensor, h: Tensor | None, y: Tensor) -> None:
    """y from work [S, ≥ N, ≥ M], whose last dimension is contiguous."""
    (rows, out), up = y.shape, operands.up
    partials, *strides = h_strides(h)
    block_m = min(FINISH_M, max(16, triton.next_power_of_2(rows)))
    start(
        finish_kernel, (triton.cdiv(out, 64), triton.cdiv(rows, block_m)),
        work, up, h, segment_table(operands.segments, y.device), operands.bias, y, rows, out, work.shape[0], len(operands.segments), partials,
        work.stride(0), work.stride(1), 0 if up is None else up.stride(0), *strides, y.stride(0), HAS_LOW_RANK=up is not None,
        HAS_BIAS=operands.bias is not None, DTYPE=TRITON_DTYPES[y.dtype], UP_DTYPE=TRITON_DTYPES[y.dtype], BLOCK_N=64, BLOCK_M=block_m,
        BLOCK_R=BLOCK_R, num_warps=4, num_stages=3,
    )  # fmt: skip


def scratch(operands: Operands, blocks: Blocks) -> Tensor:
    """Any rows, no low-rank term: the weight dequantized as a whole, then torch's matmul; large weights some outputs at a time.

    The scratch is new memory of the caching allocator, and that is what all layers share: it is free again when the product is queued. One
    buffer kept here would be freed under a recorded graph when a larger layer comes."""
    x, weight, y = operands.x, operands.weight, operands.empty()
    out, inputs = weight.shape
    most = max(128, SCRATCH_BYTES // (inputs * x.element_size()) // 128 * 128)
    for first in range(0, out, most):
        dense = dequantize(weight, x.dtype, first, min(out, first + most), blocks)
        torch.mm(x, dense.t(), out=y[:, first : first + most])
    return y if operands.bias is None else y.add_(operands.bias.to(y.dtype))


def dequantize(weight: TiledWeight, dtype: torch.dtype, first: int, end: int, blocks: Blocks) -> Tensor:
    """[end − first, I] in `dtype`: those outputs, bit for bit what `weight.dense(dtype)` has."""
    inputs, size = weight.in_features, 1 if dtype == torch.float32 else 2
    dense = torch.empty(end - first, inputs + inputs % size, dtype=dtype, device=weight.device)
    places = dense if size == 1 else dense.view(torch.int32)
    scales, zeros = (None if t is None else t[:, first:] for t in (weight.scales, weight.zeros))
    start(
        dequantize_kernel, (triton.cdiv(end - first, blocks.n), weight.tiles),
        weight.codes[first:end], scales, zeros, weight.book, places, end - first, inputs, weight.shape[0], places.stride(0), weight.tiles,
        weight.group_size, BITS=weight.bits, SLOTS=SLOTS[weight.bits], LANES=weight.lanes, HAS_ZEROS=zeros is not None,
        HAS_BOOK=weight.book is not None, DTYPE=TRITON_DTYPES[dtype], BLOCK_N=blocks.n, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return dense[:, :inputs]


def own_int4(operands: Operands, blocks: Blocks) -> Tensor:
    """torch's operator on the same grid, no low-rank term; it keeps the codes a second time."""
    y = torch_int4.multiply(operands.x.contiguous(), *operands.weight.int4, operands.weight.group_size)
    return y if operands.bias is None else y.add_(operands.bias.to(y.dtype))


def apart(operands: Operands, blocks: Blocks) -> Tensor:
    """The base by the way chosen for it alone, then the low-rank term by `addmm` onto it."""
    x, up = operands.x, operands.up
    assert up is not None
    y = multiply(replace(operands, h=None, up=None, down=None, segments=()))
    if operands.down is not None:
        h = x @ operands.down.to(x.dtype).t()
    else:
        assert operands.h is not None
        h = (operands.h.sum(0) if operands.h.dim() == 3 else operands.h).to(x.dtype)
    for row, rows, rank, ranks in operands.segments:
        y[:, row : row + rows].addmm_(h[:, rank : rank + ranks], up[row : row + rows, :ranks].to(x.dtype).t())
    return y


WAYS: Mapping[str, Callable[[Operands, Blocks], Tensor]] = {
    GEMV: gemv, SPLIT: split, TILE: tile, SCRATCH: scratch, INT4: own_int4, APART: apart,
}  # fmt: skip
