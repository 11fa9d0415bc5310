"""y = x·Wᵀ + h·upᵀ + bias with W on a 2-, 3-, 4- or 8-bit uniform grid or a NormalFloat code book, x in 16 (or 32) bits.

How it multiplies is chosen by the rows of x (`weight_only_ways`); here are the arguments' checks and the gradient.
Knows tensors; not modules or records of weights.
Legend: M tokens, O out, I in, R rank, S partial sums.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from . import checks, reference
from .launch import TRITON_DTYPES, in_order, kernel_dtype, row_bucket, runs_triton, segments_or_whole, start
from .layout import SLOTS, Segments, TiledWeight
from .tuning import Blocks, tuned
from .weight_only_kernels import gradient_kernel
from .weight_only_ways import Operands, multiply

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
    operands = Operands(x.to(kernel_dtype(x.dtype)), weight, h, up, bias, down, segments)
    return multiply(operands).to(x.dtype)


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

    key = f"gradient {out}x{inputs} {weight.bits} bits zeros {weight.zeros is not None} book {weight.book is not None}"
    run(tuned(f"{key} group {weight.group_size} rows {row_bucket(rows)} {grad.dtype}", grad.device, GRADIENT, run))
    return result.to(given)
