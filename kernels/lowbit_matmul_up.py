"""y = (codes·scales)·Wᵀ + h·upᵀ + bias with 4-bit weights and 8- or 4-bit activations (W4A8, W4A4) on the integer unit.

Products of a fragment are summed as integers, the scales of token and output group are applied to that sum, and the
up-projection and the bias are added before the only write. Where the weight's scales are whole numbers times one float an output
(`TiledWeight.two_levels`), these are multiplied in registers instead, bytes stay bytes, and the sum is integer over the whole of the
input's group, or row (QServe, arXiv:2405.04532, §4.1 and §5.2.2): one more candidate. Hopper has no 4-bit matrix instruction: 4-bit
activations are read as bytes in −7…7 and multiplied like 8-bit ones.
Knows tensors; not modules or records of weights.
Legend: M tokens, N = O outputs, K = I inputs, G groups, R rank, L lanes.
"""
# Inside @triton.jit functions the language's values have types of their own, which pyright does not know.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compress.activation_grid import group_columns
from . import checks, reference
from .candidates import OLDER
from .launch import (
    TRITON_DTYPES,
    can_time,
    h_strides,
    in_order,
    kernel_dtype,
    row_bucket,
    runs_triton,
    segment_table,
    segments_or_whole,
    start,
)
from .layout import SLOTS, Segments, TiledWeight
from .parts import add_bias, add_low_rank, fragment_codes, fragment_levels, group_zeros
from .tuning import Blocks, tuned

BLOCK_R = 32
CANDIDATES = tuple(
    Blocks(n, m, warps, stages)
    for n, m, warps, stages in (
        (128, 128, 8, 3),
        (64, 64, 4, 4),
        (128, 64, 8, 3),
        (64, 128, 8, 3),
        (64, 16, 4, 4),
        (128, 16, 4, 4),
        (64, 32, 4, 4),
    )
)
LEVELS = "levels"
HOPPERS = (Blocks(128, 256, 8, 3, 1, LEVELS, 1),)
"""Spills on cards before sm_90, whose matrix instruction takes no operand from shared memory."""
MOST_INPUTS = (1 << 31) // 127**2 - 1
"""Up to so many a whole row's sum of bytes' products fits 32 bits."""
TWO_LEVELS = tuple(
    Blocks(n, m, warps, stages, 1, LEVELS, slots)
    for n, m, warps, stages, slots in (
        (128, 128, 8, 3, 2),
        (128, 64, 8, 3, 2),
        (64, 128, 4, 3, 2),
        (64, 64, 4, 3, 4),
        (64, 32, 4, 3, 4),
        (64, 16, 4, 3, 4),
        (128, 16, 4, 3, 4),
    )
)


@triton.jit
def _lowbit_kernel(
    x_ptr, x_scales_ptr, codes_ptr, scales_ptr, zeros_ptr, up_ptr, h_ptr, segments_ptr, bias_ptr, y_ptr, M, N, K, x_groups, x_group_size,
    tiles, group_size, segment_count, partials, stride_un, stride_hs, stride_hm, stride_hr, stride_ym,
    BITS: tl.constexpr, SLOTS: tl.constexpr, LANES: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LOW_RANK: tl.constexpr,
    DTYPE: tl.constexpr, UP_DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    first_n, first_m = tl.program_id(1) * BLOCK_N, tl.program_id(0) * BLOCK_M
    n, m = first_n + tl.arange(0, BLOCK_N), first_m + tl.arange(0, BLOCK_M)
    lane, pair = tl.arange(0, LANES), tl.arange(0, LANES // 2)
    row_mask, n64, m64 = n < N, n.to(tl.int64), m.to(tl.int64)
    acc_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(tiles * SLOTS):  # a fragment a step: all slots of a tile at once do not fit in the registers
        t, slot = step // SLOTS, step % SLOTS
        words = tl.load(codes_ptr + (n64[:, None] * tiles + t) * (LANES // 2) + pair[None, :], mask=row_mask[:, None], other=0)
        start = (t * SLOTS + slot) * LANES
        inside = tl.minimum(start, K - 1)
        k = start + lane
        x_LM = tl.load(x_ptr + m64[None, :] * K + k[:, None], mask=(m < M)[None, :] & (k < K)[:, None], other=0)
        offset = (inside // group_size) * N
        scale = tl.load(scales_ptr + offset + n, mask=row_mask, other=0.0).to(tl.float32)
        zero = group_zeros(zeros_ptr, offset, n, row_mask, BITS, HAS_ZEROS).to(tl.int32)
        x_scale = tl.load(x_scales_ptr + m64 * x_groups + inside // x_group_size, mask=m < M, other=0.0)
        weight = (fragment_codes(words, slot, BITS, BLOCK_N, LANES) - zero[:, None]).to(tl.int8)
        if LANES >= 32:
            sums = tl.dot(weight, x_LM, out_dtype=tl.int32).to(tl.float32)
        else:  # too short for the integer instruction; in float16 with float32 sums as exact: 16 products of 2^15 at most
            sums = tl.dot(weight.to(tl.float16), x_LM.to(tl.float16))
        acc_NM += sums * (scale[:, None] * x_scale[None, :])
    acc_NM = add_low_rank(
        acc_NM, up_ptr, h_ptr, segments_ptr, n, m, N, M, segment_count, partials, stride_un, stride_hs, stride_hm, stride_hr,
        BLOCK_R, UP_DTYPE, first_n, BLOCK_N, HAS_LOW_RANK,
    )  # fmt: skip
    acc_NM = add_bias(acc_NM, bias_ptr, n, N, HAS_BIAS)
    tl.store(y_ptr + m64[:, None] * stride_ym + n[None, :], tl.trans(acc_NM).to(DTYPE), mask=(m < M)[:, None] & row_mask[None, :])


@triton.jit
def _levels_kernel(
    x_ptr, x_scales_ptr, codes_ptr, levels_ptr, channel_ptr, zeros_ptr, up_ptr, h_ptr, segments_ptr, bias_ptr, y_ptr, M, N, K, x_groups,
    x_group_size, tiles, group_size, segment_count, partials, stride_un, stride_hs, stride_hm, stride_hr, stride_ym,
    BITS: tl.constexpr, SLOTS: tl.constexpr, LANES: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LOW_RANK: tl.constexpr,
    WHOLE: tl.constexpr, DTYPE: tl.constexpr, UP_DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """WHOLE: one scale a token, the sum stays integer to its end. Else STEP fragments lie in one group of the input, whose scale is applied
    to their sum."""
    first_n, first_m = tl.program_id(1) * BLOCK_N, tl.program_id(0) * BLOCK_M
    n, m = first_n + tl.arange(0, BLOCK_N), first_m + tl.arange(0, BLOCK_M)
    lane, pair = tl.arange(0, LANES), tl.arange(0, LANES // 2)
    row_mask, n64, m64 = n < N, n.to(tl.int64), m.to(tl.int64)
    sums_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    acc_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    STEPS: tl.constexpr = SLOTS // STEP
    for step in range(tiles * STEPS):
        t = step // STEPS
        words = tl.load(codes_ptr + (n64[:, None] * tiles + t) * (LANES // 2) + pair[None, :], mask=row_mask[:, None], other=0)
        if not WHOLE:
            sums_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
        for i in tl.static_range(STEP):
            slot = (step % STEPS) * STEP + i
            start = (t * SLOTS + slot) * LANES
            k = start + lane
            x_LM = tl.load(x_ptr + m64[None, :] * K + k[:, None], mask=(m < M)[None, :] & (k < K)[:, None], other=0)
            offset = (tl.minimum(start, K - 1) // group_size) * N
            level = tl.load(levels_ptr + offset + n, mask=row_mask, other=0).to(tl.int32)
            zero = group_zeros(zeros_ptr, offset, n, row_mask, BITS, HAS_ZEROS).to(tl.int32)
            weight = fragment_levels(words, slot, level, zero, BITS, BLOCK_N, LANES)
            if LANES >= 32:
                sums_NM = tl.dot(weight, x_LM, sums_NM, out_dtype=tl.int32)
            else:  # as above: 16 products of 2^14 at most
                sums_NM += tl.dot(weight.to(tl.float16), x_LM.to(tl.float16)).to(tl.int32)
        if not WHOLE:
            group = tl.minimum((t * SLOTS + (step % STEPS) * STEP) * LANES, K - 1) // x_group_size
            acc_NM += sums_NM.to(tl.float32) * tl.load(x_scales_ptr + m64 * x_groups + group, mask=m < M, other=0.0)[None, :]
    if WHOLE:
        acc_NM = sums_NM.to(tl.float32) * tl.load(x_scales_ptr + m64, mask=m < M, other=0.0)[None, :]
    acc_NM *= tl.load(channel_ptr + n, mask=row_mask, other=0.0)[:, None]
    acc_NM = add_low_rank(
        acc_NM, up_ptr, h_ptr, segments_ptr, n, m, N, M, segment_count, partials, stride_un, stride_hs, stride_hm, stride_hr,
        BLOCK_R, UP_DTYPE, first_n, BLOCK_N, HAS_LOW_RANK,
    )  # fmt: skip
    acc_NM = add_bias(acc_NM, bias_ptr, n, N, HAS_BIAS)
    tl.store(y_ptr + m64[:, None] * stride_ym + n[None, :], tl.trans(acc_NM).to(DTYPE), mask=(m < M)[:, None] & row_mask[None, :])


def lowbit_matmul_up(
    codes: Tensor,
    scales: Tensor,
    weight: TiledWeight,
    h: Tensor | None = None,
    lora_up: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int = 64,
    segments: Segments | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """y [M, O] in `dtype`.

    codes int8 [M, I] and scales float32 [M, ⌈I/group_size⌉] as `quantize_down` makes them (group_size −1: one scale a token); weight on a uniform grid of at most
    4 bits with integer zeros; h [M, R] or partial sums [S, M, R]; lora_up [O, R]; bias [O]; segments as in
    `weight_only_matmul_up`. ValueError or TypeError names the argument that does not fit.
    """
    group_size = group_columns(group_size, weight.in_features)
    check_weight(weight, group_size)
    checks.matrix("codes", codes, weight.in_features, (torch.int8,))
    checks.matrix("scales", scales, -(-weight.in_features // group_size), (torch.float32,))
    if scales.shape[0] != codes.shape[0]:
        raise ValueError(f"scales has {scales.shape[0]} rows; expected {codes.shape[0]}, one for each row of codes")
    if dtype not in checks.FLOATING:
        raise TypeError(f"dtype is {dtype}; expected one of {checks.FLOATING}")
    checks.low_rank(h, lora_up, None, codes.shape[0], weight.shape[0], weight.in_features)
    checks.vector("bias", bias, weight.shape[0])
    checks.same_device(codes.device, {"scales": scales, "weight": weight.codes, "h": h, "lora_up": lora_up, "bias": bias})
    parts = segments_or_whole(segments, weight.shape[0], 0 if lora_up is None else lora_up.shape[1])
    checks.ranks_of_segments("h", parts, 0 if h is None else h.shape[-1])
    if not runs_triton(codes.device):
        return reference.lowbit_matmul_up(codes, scales, weight, h, lora_up, bias, group_size=group_size, segments=parts, dtype=dtype)
    lora_up, bias = in_order(lora_up, bias)
    return _launch(codes.contiguous(), scales.contiguous(), weight, h, lora_up, bias, group_size, parts, kernel_dtype(dtype)).to(dtype)


def check_weight(weight: TiledWeight, group_size: int) -> None:
    """ValueError says why a weight cannot be multiplied as integers."""
    if weight.book is not None:
        raise ValueError("weight has a code book; integer products need a uniform grid")
    if weight.bits > 4:
        raise ValueError(f"weight has {weight.bits} bits; code − zero fits a signed byte up to 4")
    if not weight.integer_zeros:
        raise ValueError("weight has floating zero points; integer products need integers")
    if group_size % weight.lanes and group_size < weight.in_features:
        raise ValueError(f"group_size is {group_size}; expected a multiple of the weight's fragments of {weight.lanes} inputs")


def _launch(
    codes: Tensor, scales: Tensor, weight: TiledWeight, h: Tensor | None, up: Tensor | None, bias: Tensor | None, group_size: int,
    segments: tuple[tuple[int, int, int, int], ...], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    (rows, inputs), out = codes.shape, weight.shape[0]
    key = f"lowbit {out}x{inputs} {weight.bits} bits zeros {weight.zeros is not None} group {weight.group_size} of x {group_size} rows {row_bucket(rows)}"
    key += f" rank {0 if h is None else h.shape[-1]} {dtype}{'' if weight.two_levels is None else ' two levels'}"

    def run(blocks: Blocks) -> Tensor:
        return launch(codes, scales, weight, h, up, bias, group_size, segments, dtype, blocks)

    capability = torch.cuda.get_device_capability(codes.device) if can_time(codes.device) else OLDER
    return run(tuned(key, codes.device, candidates_for(weight, row_bucket(rows), scales.shape[1] == 1, capability), run))


def launch(
    codes: Tensor, scales: Tensor, weight: TiledWeight, h: Tensor | None, up: Tensor | None, bias: Tensor | None, group_size: int,
    segments: tuple[tuple[int, int, int, int], ...], dtype: torch.dtype, blocks: Blocks,
) -> Tensor:  # fmt: skip
    """y [M, O] by one candidate, arguments checked."""
    rows, (out, inputs) = len(codes), weight.shape
    y = torch.empty(rows, out, dtype=dtype, device=codes.device)
    tables: tuple[Tensor, ...] = (weight.scales,)
    options = {
        "BITS": weight.bits, "SLOTS": SLOTS[weight.bits], "LANES": weight.lanes, "HAS_ZEROS": weight.zeros is not None, "HAS_BIAS": bias is not None,
        "HAS_LOW_RANK": up is not None, "DTYPE": TRITON_DTYPES[dtype], "UP_DTYPE": TRITON_DTYPES[dtype], "BLOCK_N": blocks.n, "BLOCK_M": blocks.m,
        "BLOCK_R": BLOCK_R, "num_warps": blocks.warps, "num_stages": blocks.stages,
    }  # fmt: skip
    if blocks.way == LEVELS:
        assert weight.two_levels is not None
        tables, whole = weight.two_levels, scales.shape[1] == 1
        fragments = SLOTS[weight.bits] if whole else group_size // weight.lanes
        options |= {"WHOLE": whole, "STEP": math.gcd(SLOTS[weight.bits], blocks.slots, fragments)}
    start(
        _levels_kernel if blocks.way == LEVELS else _lowbit_kernel, (triton.cdiv(rows, blocks.m), triton.cdiv(out, blocks.n)),
        codes, scales, weight.codes, *tables, weight.zeros, up, h, segment_table(segments, codes.device), bias, y, rows, out, inputs,
        scales.shape[1], group_size, weight.tiles, weight.group_size, len(segments), *_strides(up, h), y.stride(0), **options,
    )  # fmt: skip
    return y


def _strides(up: Tensor | None, h: Tensor | None) -> tuple[int, ...]:
    partials, *strides = h_strides(h)
    return partials, 0 if up is None else up.stride(0), *strides


def candidates_for(weight: TiledWeight, bucket: int, whole: bool, capability: tuple[int, int]) -> tuple[Blocks, ...]:
    """The default first. With two levels of scales both kernels compute the same product; what they are for is an input of one scale a token."""
    if weight.two_levels is None or weight.in_features > MOST_INPUTS:
        return by_rows(CANDIDATES, bucket)
    both = by_rows(CANDIDATES, bucket), by_rows(two_level_candidates(capability), bucket)
    return (*both[1], *both[0]) if whole else (*both[0], *both[1])


def two_level_candidates(capability: tuple[int, int]) -> tuple[Blocks, ...]:
    return (*TWO_LEVELS, *HOPPERS) if capability >= (9, 0) else TWO_LEVELS


def by_rows(candidates: tuple[Blocks, ...], bucket: int) -> tuple[Blocks, ...]:
    """First the narrowest tile that holds so many rows, of at most 128."""
    default = min((blocks for blocks in candidates if blocks.m >= min(bucket, 128)), key=lambda blocks: blocks.m)
    return (default, *(blocks for blocks in candidates if blocks != default))
