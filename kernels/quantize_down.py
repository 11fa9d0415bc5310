"""codes, scales, h = quantize(x / smooth), x·downᵀ with one read of x.

Each program reads some groups of some tokens once; the down-projection's partial sums are stored separately and added, in order,
by whoever reads h, so two runs agree to the bit. With one scale a token a program reads whole rows, and again, from a cache, what
it then rounds. Knows tensors only.
Legend: M tokens, K = I inputs, G groups, R rank, S partial sums, Q inputs of a group.
"""
# Inside @triton.jit functions the language's values have types of their own, which pyright does not know.
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compress.activation_grid import group_columns
from . import checks, reference
from .launch import TRITON_DTYPES, in_order, kernel_dtype, row_bucket, runs_triton, start
from .tuning import Blocks, tuned

GROUP_SIZES = (32, 64, 128)
CODE_BITS = (4, 8)
# n: nothing; m: tokens of a program; splits: programs that share a token's groups
CANDIDATES = tuple(
    Blocks(0, m, warps, 2, splits)
    for m, warps, splits in ((16, 4, 4), (16, 4, 1), (16, 4, 8), (32, 4, 1), (32, 4, 4), (64, 8, 1), (64, 8, 4))
)
WHOLE_ROWS = tuple(Blocks(0, m, warps, 2) for m, warps in ((16, 4), (16, 8), (32, 8)))
ROW_STEP = 128


@triton.jit
def _round(value):
    """Halves away from zero."""
    return tl.where(value >= 0, tl.floor(value + 0.5), tl.ceil(value - 0.5))


@triton.jit
def _quantize_down_kernel(
    x_ptr, smooth_ptr, down_ptr, codes_ptr, scales_ptr, h_ptr, M, K, R, stride_xm, stride_xk, stride_dr, stride_dk, groups, groups_per_split,
    GROUP: tl.constexpr, TOP: tl.constexpr, HAS_SMOOTH: tl.constexpr, HAS_DOWN: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    m, split = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1)
    m64, r = m.to(tl.int64), tl.arange(0, BLOCK_R)
    acc_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for g in range(split * groups_per_split, tl.minimum((split + 1) * groups_per_split, groups)):
        k = g * GROUP + tl.arange(0, GROUP)
        mask = (m < M)[:, None] & (k < K)[None, :]
        x_MQ = tl.load(x_ptr + m64[:, None] * stride_xm + k[None, :] * stride_xk, mask=mask, other=0.0)
        if HAS_DOWN:
            down_QR = tl.load(
                down_ptr + r[None, :] * stride_dr + k[:, None] * stride_dk, mask=(r < R)[None, :] & (k < K)[:, None], other=0.0
            )
            acc_MR = tl.dot(x_MQ, down_QR.to(DTYPE), acc_MR, input_precision="ieee")
        value = x_MQ.to(tl.float32)
        if HAS_SMOOTH:
            value = tl.div_rn(value, tl.load(smooth_ptr + k, mask=k < K, other=1.0).to(tl.float32)[None, :])
        absmax = tl.max(tl.abs(value), axis=1)
        top = tl.full(absmax.shape, TOP, tl.float32)
        inverse = tl.where(absmax > 0, tl.div_rn(top, tl.where(absmax > 0, absmax, 1.0)), 0.0)
        rounded = tl.minimum(tl.maximum(_round(value * inverse[:, None]), -TOP), TOP)
        tl.store(codes_ptr + m64[:, None] * K + k[None, :], rounded.to(tl.int8), mask=mask)
        tl.store(scales_ptr + m64 * groups + g, tl.div_rn(absmax, top), mask=m < M)
    if HAS_DOWN:
        pointers = h_ptr + (split.to(tl.int64) * M + m64[:, None]) * R + r[None, :]
        tl.store(pointers, acc_MR, mask=(m < M)[:, None] & (r < R)[None, :])


@triton.jit
def _quantize_rows_kernel(
    x_ptr, smooth_ptr, down_ptr, codes_ptr, scales_ptr, h_ptr, M, K, R, stride_xm, stride_xk, stride_dr, stride_dk,
    TOP: tl.constexpr, HAS_SMOOTH: tl.constexpr, HAS_DOWN: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m64, r = m.to(tl.int64), tl.arange(0, BLOCK_R)
    acc_MR, absmax = tl.zeros((BLOCK_M, BLOCK_R), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, K, STEP):
        k = first + tl.arange(0, STEP)
        mask = (m < M)[:, None] & (k < K)[None, :]
        x_MQ = tl.load(x_ptr + m64[:, None] * stride_xm + k[None, :] * stride_xk, mask=mask, other=0.0)
        if HAS_DOWN:
            down_QR = tl.load(
                down_ptr + r[None, :] * stride_dr + k[:, None] * stride_dk, mask=(r < R)[None, :] & (k < K)[:, None], other=0.0
            )
            acc_MR = tl.dot(x_MQ, down_QR.to(DTYPE), acc_MR, input_precision="ieee")
        value = x_MQ.to(tl.float32)
        if HAS_SMOOTH:
            value = tl.div_rn(value, tl.load(smooth_ptr + k, mask=k < K, other=1.0).to(tl.float32)[None, :])
        absmax = tl.maximum(absmax, tl.max(tl.abs(value), axis=1))
    top = tl.full(absmax.shape, TOP, tl.float32)
    inverse = tl.where(absmax > 0, tl.div_rn(top, tl.where(absmax > 0, absmax, 1.0)), 0.0)
    for first in range(0, K, STEP):
        k = first + tl.arange(0, STEP)
        mask = (m < M)[:, None] & (k < K)[None, :]
        value = tl.load(x_ptr + m64[:, None] * stride_xm + k[None, :] * stride_xk, mask=mask, other=0.0).to(tl.float32)
        if HAS_SMOOTH:
            value = tl.div_rn(value, tl.load(smooth_ptr + k, mask=k < K, other=1.0).to(tl.float32)[None, :])
        rounded = tl.minimum(tl.maximum(_round(value * inverse[:, None]), -TOP), TOP)
        tl.store(codes_ptr + m64[:, None] * K + k[None, :], rounded.to(tl.int8), mask=mask)
    tl.store(scales_ptr + m64, tl.div_rn(absmax, top), mask=m < M)
    if HAS_DOWN:
        tl.store(h_ptr + m64[:, None] * R + r[None, :], acc_MR, mask=(m < M)[:, None] & (r < R)[None, :])


def quantize_down(
    x: Tensor, smooth: Tensor | None = None, lora_down: Tensor | None = None, *, bits: int = 8, group_size: int = 64
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes int8 [M, I], scales float32 [M, ⌈I/group_size⌉], h float32 [S, M, R] or None).

    x [M, I] float32, bfloat16 or float16, any strides; smooth [I] divides x before it is rounded (None: nothing is divided);
    lora_down [R, I] sees the raw x, R a multiple of 8 up to 256; h is the sum over its first dimension. 4-bit codes lie in −7…7,
    a byte each; group_size −1 is one scale a token. ValueError or TypeError names the argument that does not fit.
    """
    checks.matrix("x", x)
    inputs = x.shape[1]
    checks.vector("smooth", smooth, inputs)
    if bits not in CODE_BITS:
        raise ValueError(f"bits is {bits}; activations are rounded to one of {CODE_BITS} bits")
    if group_size not in (*GROUP_SIZES, -1):
        raise ValueError(f"group_size is {group_size}; the kernel takes one of {GROUP_SIZES}, or -1 for one scale a token")
    if lora_down is not None:
        checks.matrix("lora_down", lora_down, inputs)
        checks.rank("lora_down", lora_down.shape[0])
    checks.same_device(x.device, {"smooth": smooth, "lora_down": lora_down})
    if not runs_triton(x.device):
        codes, scales, h = reference.quantize_down(x, smooth, lora_down, bits, group_size)
        return codes, scales, None if h is None else h.unsqueeze(0)
    (smooth,) = in_order(smooth)
    return _launch(x.to(kernel_dtype(x.dtype)), smooth, lora_down, (1 << (bits - 1)) - 1, group_size)


def _launch(x: Tensor, smooth: Tensor | None, down: Tensor | None, top: int, group_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    (rows, inputs), ranks = x.shape, 0 if down is None else down.shape[0]
    groups = triton.cdiv(inputs, group_columns(group_size, inputs))
    codes = torch.empty(rows, inputs, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, groups, dtype=torch.float32, device=x.device)

    def run(blocks: Blocks) -> Tensor | None:
        per_split = triton.cdiv(groups, blocks.splits)
        splits = triton.cdiv(groups, per_split)
        h = None if down is None else torch.empty(splits, rows, ranks, dtype=torch.float32, device=x.device)
        given = x, smooth, down, codes, scales, h, rows, inputs, ranks, *x.stride(), *((0, 0) if down is None else down.stride())
        options = {"TOP": top, "HAS_SMOOTH": smooth is not None, "HAS_DOWN": down is not None, "DTYPE": TRITON_DTYPES[x.dtype], "BLOCK_M": blocks.m}
        options |= {"BLOCK_R": max(16, triton.next_power_of_2(ranks)), "num_warps": blocks.warps, "num_stages": blocks.stages}
        if group_size == -1:
            start(_quantize_rows_kernel, (triton.cdiv(rows, blocks.m),), *given, STEP=ROW_STEP, **options)
        else:
            start(_quantize_down_kernel, (triton.cdiv(rows, blocks.m), splits), *given, groups, per_split, GROUP=group_size, **options)
        return h

    key = f"quantize_down {inputs} group {group_size} top {top} rows {row_bucket(rows)} rank {ranks} smooth {smooth is not None} {x.dtype}"
    return codes, scales, run(tuned(key, x.device, WHOLE_ROWS if group_size == -1 else CANDIDATES, run))
