"""y = x·Wᵀ + h·upᵀ + bias with W on a 2-, 3-, 4- or 8-bit uniform grid or a NormalFloat code book, x in 16 (or 32) bits.

Few tokens: the inputs are split over programs, which write partial sums side by side; a second kernel adds them in a fixed
order, with the up-projection and the bias, and writes y once. The down-projection rides along as more rows of the weight.
Many tokens: one kernel, weights dequantized in registers, low-rank term and bias on the accumulator before the only write.
Knows tensors; not modules or records of weights.
Legend: M tokens, N = O outputs, K = I inputs, R rank, S splits.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from . import checks, reference
from .launch import (
    TRITON_DTYPES,
    h_strides,
    in_order,
    kernel_dtype,
    row_bucket,
    runs_triton,
    segment_table,
    segments_or_whole,
    shift_for,
    start,
)
from .layout import SLOTS, Segments, TiledWeight
from .tuning import Blocks, tuned
from .weight_only_kernels import finish_kernel, gradient_kernel, large_kernel, partial_kernel

SMALL_ROWS = 64  # up to here the inputs are split
BLOCK_R = 32
SMALL = tuple(Blocks(n, 0, warps, 3, splits) for splits in (4, 1, 2, 8, 16) for n, warps in ((64, 4), (128, 4)))
LARGE = tuple(
    Blocks(n, m, warps, stages)
    for n, m, warps, stages in (
        (128, 128, 8, 3),
        (64, 64, 4, 4),
        (128, 64, 4, 3),
        (64, 128, 4, 3),
        (128, 256, 8, 3),
        (64, 16, 4, 4),
        (128, 16, 4, 4),
    )
)
GRADIENT = tuple(Blocks(n, m, warps) for n, m, warps in ((64, 64, 4), (32, 128, 4), (64, 128, 8), (128, 64, 8)))


def weight_only_matmul_up(
    x: Tensor,
    weight: TiledWeight,
    h: Tensor | None = None,
    lora_up: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    lora_down: Tensor | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """y [M, O] in x's dtype = x·Wᵀ + h·upᵀ + bias, differentiable in x, h, lora_up, lora_down and bias.

    x [M, I] float32, bfloat16 or float16, any strides; h [M, R], or float32 partial sums [S, M, R], or None with
    lora_down [R, I]; lora_up [O, R]; R a multiple of 8 up to 256; bias [O]. `segments` slices h by outputs (see launch.Segments);
    lora_up's row then holds its own segment's ranks from column 0. On a CPU without the interpreter: the reference.
    ValueError or TypeError names the argument that does not fit.
    """
    checks.matrix("x", x, weight.in_features)
    checks.same_device(x.device, {"weight": weight.codes, "h": h, "lora_up": lora_up, "lora_down": lora_down, "bias": bias})
    checks.low_rank(h, lora_up, lora_down, x.shape[0], weight.shape[0], weight.in_features)
    checks.vector("bias", bias, weight.shape[0])
    parts = segments_or_whole(segments, weight.shape[0], 0 if lora_up is None else lora_up.shape[1])
    if h is not None:
        checks.ranks_of_segments("h", parts, h.shape[-1])
    elif lora_down is not None:
        checks.ranks_of_segments("lora_down", parts, lora_down.shape[0])
    return WeightOnlyMatmulUp.apply(x, weight, h, lora_up, bias, lora_down, parts)


class WeightOnlyMatmulUp(torch.autograd.Function):
    """The kernel forward; backward dequantizes on the fly and treats the low-rank term as what it is, two small products."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: TiledWeight,
        h: Tensor | None,
        up: Tensor | None,
        bias: Tensor | None,
        down: Tensor | None,
        segments: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, h, up, down)
        ctx.weight, ctx.segments, ctx.bias_dtype = weight, segments, None if bias is None else bias.dtype
        return forward(x, weight, h, up, bias, down, segments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, h, up, down = ctx.saved_tensors
        grad_MO, needs = grads[0], ctx.needs_input_grad
        grad_x = grad_base(grad_MO, ctx.weight) if needs[0] else None
        grad_h = grad_up = grad_down = None
        if up is not None:
            grad = grad_MO.float()
            h_MR = x.float() @ down.float().t() if h is None else (h.float().sum(0) if h.dim() == 3 else h.float())
            total_h, total_up = torch.zeros_like(h_MR), torch.zeros_like(up, dtype=torch.float32)
            for row, rows, rank, ranks in ctx.segments:
                part = grad[:, row : row + rows]
                total_h[:, rank : rank + ranks] += part @ up[row : row + rows, :ranks].float()
                total_up[row : row + rows, :ranks] = part.t() @ h_MR[:, rank : rank + ranks]
            grad_up = total_up.to(up.dtype)
            if h is not None:
                grad_h = total_h.to(h.dtype).expand_as(h)
            else:
                grad_down = (total_h.t() @ x.float()).to(down.dtype)
                grad_x = None if grad_x is None else (grad_x.float() + total_h @ down.float()).to(x.dtype)
        grad_bias = None if ctx.bias_dtype is None else grad_MO.float().sum(0).to(ctx.bias_dtype)
        return grad_x, None, grad_h, grad_up, grad_bias, grad_down, None


def forward(
    x: Tensor,
    weight: TiledWeight,
    h: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    down: Tensor | None,
    segments: tuple[tuple[int, int, int, int], ...],
) -> Tensor:
    """The launch itself, arguments checked, nothing recorded for a gradient."""
    if not runs_triton(x.device):
        return reference.weight_only_matmul_up(x, weight, h, up, bias, down_RI=down, segments=segments)
    up, bias = in_order(up, bias)
    compute = kernel_dtype(x.dtype)
    given, x = x.dtype, x.to(compute)
    if x.shape[0] <= SMALL_ROWS:
        y = _few_rows(x, weight, h, up, bias, down, segments)
    else:
        if down is not None:
            h = x @ down.to(x.dtype).t()
        y = _many_rows(x, weight, h, up, bias, segments)
    return y.to(given)


def grad_base(grad: Tensor, weight: TiledWeight) -> Tensor:
    """grad [M, O] · W → [M, I] in grad's dtype."""
    if not runs_triton(grad.device):
        return (grad.float() @ weight.dense()).to(grad.dtype)
    given, grad = grad.dtype, grad.to(kernel_dtype(grad.dtype))
    (rows, out), inputs = grad.shape, weight.in_features
    result = torch.empty(rows, inputs, dtype=grad.dtype, device=grad.device)
    slots = SLOTS[weight.bits]

    def run(blocks: Blocks) -> None:
        start(
            gradient_kernel, (triton.cdiv(rows, blocks.m), triton.cdiv(inputs, weight.lanes)),
            grad, weight.codes, weight.scales, weight.zeros, weight.book, result, rows, out, inputs, grad.stride(0), grad.stride(1),
            weight.tiles, weight.group_size, BITS=weight.bits, SLOTS=slots, LANES=weight.lanes, HAS_ZEROS=weight.zeros is not None,
            HAS_BOOK=weight.book is not None, DTYPE=TRITON_DTYPES[grad.dtype], BLOCK_N=blocks.n, BLOCK_M=blocks.m,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip

    run(tuned(_key("gradient", weight, rows, grad.dtype, 0), grad.device, GRADIENT, run))
    return result.to(given)


def _few_rows(
    x: Tensor, weight: TiledWeight, h: Tensor | None, up: Tensor | None, bias: Tensor | None, down: Tensor | None, segments: Any
) -> Tensor:
    (rows, inputs), out = x.shape, weight.shape[0]
    ranks = 0 if down is None else down.shape[0]
    block_m = max(16, triton.next_power_of_2(rows))
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    stride_dr, stride_dk = (0, 0) if down is None else (down.stride(0), down.stride(1))

    def run(blocks: Blocks) -> None:
        per_split = triton.cdiv(weight.tiles, blocks.splits)
        splits = triton.cdiv(weight.tiles, per_split)
        work = torch.empty(splits, out + ranks, block_m, dtype=torch.float32, device=x.device)
        blocks_n = triton.cdiv(out, blocks.n)
        start(
            partial_kernel, (blocks_n + triton.cdiv(ranks, blocks.n), splits),
            x, weight.codes, weight.scales, weight.zeros, weight.book, down, work, rows, out, inputs, ranks, x.stride(0), x.stride(1),
            stride_dr, stride_dk, weight.tiles, per_split, weight.group_size, blocks_n, BITS=weight.bits, SLOTS=SLOTS[weight.bits],
            LANES=weight.lanes, SHIFT=shift_for(x.dtype, weight.bits), HAS_ZEROS=weight.zeros is not None, HAS_BOOK=weight.book is not None,
            HAS_DOWN=down is not None, DTYPE=TRITON_DTYPES[x.dtype], BLOCK_N=blocks.n, BLOCK_M=block_m, num_warps=blocks.warps,
            num_stages=blocks.stages,
        )  # fmt: skip
        source = h if ranks == 0 else work[:, out:].transpose(1, 2)
        partials, stride_hs, stride_hm, stride_hr = h_strides(source)
        start(
            finish_kernel, (triton.cdiv(out, 64),),
            work, up, source, segment_table(segments, x.device), bias, y, rows, out, ranks, splits, len(segments), partials,
            0 if up is None else up.stride(0), stride_hs, stride_hm, stride_hr, y.stride(0), HAS_LOW_RANK=up is not None,
            HAS_BIAS=bias is not None, DTYPE=TRITON_DTYPES[x.dtype], UP_DTYPE=TRITON_DTYPES[x.dtype], BLOCK_N=64, BLOCK_M=block_m,
            BLOCK_R=BLOCK_R,
        )  # fmt: skip

    run(tuned(_key("few rows", weight, rows, x.dtype, ranks), x.device, SMALL, run))
    return y


def _many_rows(x: Tensor, weight: TiledWeight, h: Tensor | None, up: Tensor | None, bias: Tensor | None, segments: Any) -> Tensor:
    (rows, inputs), out = x.shape, weight.shape[0]
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    partials, stride_hs, stride_hm, stride_hr = h_strides(h)
    table = segment_table(segments, x.device)

    def run(blocks: Blocks) -> None:
        start(
            large_kernel, (triton.cdiv(rows, blocks.m), triton.cdiv(out, blocks.n)),
            x, weight.codes, weight.scales, weight.zeros, weight.book, up, h, table, bias, y, rows, out, inputs, x.stride(0), x.stride(1),
            weight.tiles, weight.group_size, len(segments), partials, 0 if up is None else up.stride(0), stride_hs, stride_hm, stride_hr,
            y.stride(0), BITS=weight.bits, SLOTS=SLOTS[weight.bits], LANES=weight.lanes, HAS_ZEROS=weight.zeros is not None,
            HAS_BOOK=weight.book is not None, HAS_BIAS=bias is not None, HAS_LOW_RANK=up is not None,
            DTYPE=TRITON_DTYPES[x.dtype], UP_DTYPE=TRITON_DTYPES[x.dtype], BLOCK_N=blocks.n, BLOCK_M=blocks.m, BLOCK_R=BLOCK_R,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip

    run(tuned(_key("many rows", weight, rows, x.dtype, 0 if h is None else h.shape[-1]), x.device, LARGE, run))
    return y


def _key(name: str, weight: TiledWeight, rows: int, dtype: torch.dtype, ranks: int) -> str:
    out, inputs = weight.shape
    kind = "book" if weight.book is not None else "symmetric" if weight.zeros is None else "zeros"
    return f"weight-only {name} {out}x{inputs} {weight.bits} bits {kind} group {weight.group_size} rows {row_bucket(rows)} rank {ranks} {dtype}"
