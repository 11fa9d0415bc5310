"""The Triton kernels of `weight_only_matmul_up` on the matrix unit: split and finish for few tokens, tiles for more, the weight dequantized as
a whole for many, and the gradient of x. Those without the matrix unit are `gemv_kernels`.

Legend: M tokens, N = O outputs, K = I inputs, R rank, S splits, T tiles, L lanes.
"""
# Inside @triton.jit functions the language's values have types of their own, which pyright does not know.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false

import triton
import triton.language as tl

from .parts import add_bias, add_low_rank, field_levels, fragment_codes, fragment_shifted, group_zeros


@triton.jit
def sums_kernel(x_ptr, sums_ptr, M, K, stride_xm, stride_xk, LANES: tl.constexpr, BLOCK_M: tl.constexpr):
    """sums float32 [fragments, BLOCK_M]: of a token's inputs in each fragment, for grids whose zeros are no integers."""
    fragment = tl.program_id(0)
    m, k = tl.arange(0, BLOCK_M), fragment * LANES + tl.arange(0, LANES)
    x_LM = tl.load(x_ptr + m[None, :] * stride_xm + k[:, None] * stride_xk, mask=(m < M)[None, :] & (k < K)[:, None], other=0.0)
    tl.store(sums_ptr + fragment * BLOCK_M + m, tl.sum(x_LM.to(tl.float32), axis=0))


@triton.jit
def partial_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, book_ptr, sums_ptr, down_ptr, work_ptr, M, N, K, R, stride_xm, stride_xk, stride_dr, stride_dk,
    tiles, tiles_per_split, group_size, blocks_n,
    BITS: tl.constexpr, SLOTS: tl.constexpr, LANES: tl.constexpr, SHIFT: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BOOK: tl.constexpr,
    HAS_SUMS: tl.constexpr, HAS_DOWN: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """work float32 [S, N + R, BLOCK_M]: this split's share of W·xᵀ, or, for the last blocks, of down·xᵀ.

    Fragments past K meet x = 0; they are not skipped, since a branch would keep the loads from being pipelined. Codes minus zeros of an
    integer grid are exact in 16 bits; with HAS_SUMS the zeros meet the sums of x instead. A block of down has fewer rows and wider steps
    than one of codes, whose input takes a quarter of the bytes: it would else be the last to end."""
    block, split = tl.program_id(0), tl.program_id(1)
    m, lane, pair = tl.arange(0, BLOCK_M), tl.arange(0, LANES), tl.arange(0, LANES // 2)
    first, last = split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tiles)
    base = work_ptr + split.to(tl.int64) * (N + R) * BLOCK_M
    if block < blocks_n:
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        row_mask, n64 = n < N, n.to(tl.int64)
        acc_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for t in range(first, last):
            words = tl.load(codes_ptr + (n64[:, None] * tiles + t) * (LANES // 2) + pair[None, :], mask=row_mask[:, None], other=0)
            for slot in tl.static_range(SLOTS):
                start = (t * SLOTS + slot) * LANES
                k = start + lane
                x_LM = tl.load(x_ptr + m[None, :] * stride_xm + k[:, None] * stride_xk, mask=(m < M)[None, :] & (k < K)[:, None], other=0.0)
                offset = (tl.minimum(start, K - 1) // group_size) * N
                scale = tl.load(scales_ptr + offset + n, mask=row_mask, other=0.0).to(tl.float32)
                if HAS_BOOK:
                    levels = tl.load(book_ptr + fragment_codes(words, slot, BITS, BLOCK_N, LANES)).to(DTYPE)
                    acc_NM += tl.dot(levels, x_LM, input_precision="ieee") * scale[:, None]
                else:
                    zero = group_zeros(zeros_ptr, offset, n, row_mask, BITS, HAS_ZEROS)
                    if tl.float32 == DTYPE:  # nothing to gain from a shift, and no digits to lose to it
                        levels = fragment_codes(words, slot, BITS, BLOCK_N, LANES).to(tl.float32) - zero[:, None]
                        acc_NM += tl.dot(levels, x_LM, input_precision="ieee") * scale[:, None]
                    elif HAS_SUMS:
                        levels = fragment_shifted(words, slot, BITS, DTYPE, SHIFT, BLOCK_N, LANES)
                        sums = tl.load(sums_ptr + (t * SLOTS + slot) * BLOCK_M + m)
                        acc_NM += (tl.dot(levels, x_LM) - sums[None, :] * (zero + SHIFT)[:, None]) * scale[:, None]
                    else:
                        levels = fragment_shifted(words, slot, BITS, DTYPE, SHIFT, BLOCK_N, LANES) - (zero + SHIFT).to(DTYPE)[:, None]
                        acc_NM += tl.dot(levels, x_LM) * scale[:, None]
        tl.store(base + n64[:, None] * BLOCK_M + m[None, :], acc_NM, mask=row_mask[:, None] & (m < M)[None, :])
    else:
        if HAS_DOWN:
            r = (block - blocks_n) * BLOCK_D + tl.arange(0, BLOCK_D)
            acc_RM = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
            end = tl.minimum(last * SLOTS * LANES, K)
            for start in range(first * SLOTS * LANES, end, STEP):
                k = start + tl.arange(0, STEP)
                mask = (m < M)[None, :] & (k < end)[:, None]
                x_KM = tl.load(x_ptr + m[None, :] * stride_xm + k[:, None] * stride_xk, mask=mask, other=0.0)
                mask = (r < R)[:, None] & (k < end)[None, :]
                down = tl.load(down_ptr + r[:, None] * stride_dr + k[None, :] * stride_dk, mask=mask, other=0.0)
                acc_RM += tl.dot(down.to(DTYPE), x_KM, input_precision="ieee")
            tl.store(base + (N + r)[:, None] * BLOCK_M + m[None, :], acc_RM, mask=(r < R)[:, None] & (m < M)[None, :])


@triton.jit
def finish_kernel(
    work_ptr, up_ptr, h_ptr, segments_ptr, bias_ptr, y_ptr, M, N, splits, segment_count, partials, stride_ws, stride_wn,
    stride_un, stride_hs, stride_hm, stride_hr, stride_ym,
    HAS_LOW_RANK: tl.constexpr, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr, UP_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The splits in order, the low-rank term, the bias, one write."""
    first_n = tl.program_id(0) * BLOCK_N
    n, m = first_n + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for _ in range(splits):
        acc_NM += tl.load(work_ptr + n[:, None] * stride_wn + m[None, :], mask=(n < N)[:, None] & (m < M)[None, :], other=0.0)
        work_ptr += stride_ws
    acc_NM = add_low_rank(
        acc_NM, up_ptr, h_ptr, segments_ptr, n, m, N, M, segment_count, partials, stride_un, stride_hs, stride_hm, stride_hr,
        BLOCK_R, UP_DTYPE, first_n, BLOCK_N, HAS_LOW_RANK,
    )  # fmt: skip
    acc_NM = add_bias(acc_NM, bias_ptr, n, N, HAS_BIAS)
    tl.store(y_ptr + m[None, :] * stride_ym + n[:, None], acc_NM.to(DTYPE), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def tile_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, book_ptr, up_ptr, h_ptr, segments_ptr, bias_ptr, y_ptr, work_ptr, M, N, K,
    stride_xm, stride_xk, tiles, tiles_per_split, group_size, segment_count, partials, stride_un, stride_hs, stride_hm, stride_hr, stride_ym,
    stride_ws, stride_wn, BITS: tl.constexpr, SLOTS: tl.constexpr, LANES: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BOOK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LOW_RANK: tl.constexpr, SPLIT: tl.constexpr, DTYPE: tl.constexpr, UP_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One tile of y: weights dequantized to x's dtype, low-rank term and bias before the only write. SPLIT: work float32 [S, N, M] instead,
    this split's share of W·xᵀ. A step multiplies STEP slots of a tile of codes: with fewer the codes are read again, from a cache, and
    what lies in shared memory of x is less."""
    first_n, first_m, split = tl.program_id(1) * BLOCK_N, tl.program_id(0) * BLOCK_M, tl.program_id(2)
    n, m = first_n + tl.arange(0, BLOCK_N), first_m + tl.arange(0, BLOCK_M)
    lane, pair = tl.arange(0, LANES), tl.arange(0, LANES // 2)
    row_mask, n64, m64 = n < N, n.to(tl.int64), m.to(tl.int64)
    acc_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    STEPS: tl.constexpr = SLOTS // STEP
    for step in range(split * tiles_per_split * STEPS, tl.minimum((split + 1) * tiles_per_split, tiles) * STEPS):
        t = step // STEPS
        words = tl.load(codes_ptr + (n64[:, None] * tiles + t) * (LANES // 2) + pair[None, :], mask=row_mask[:, None], other=0)
        for i in tl.static_range(STEP):
            slot = (step % STEPS) * STEP + i
            start = (t * SLOTS + slot) * LANES
            k = start + lane
            x_LM = tl.load(x_ptr + m64[None, :] * stride_xm + k[:, None] * stride_xk, mask=(m < M)[None, :] & (k < K)[:, None], other=0.0)
            offset = (tl.minimum(start, K - 1) // group_size) * N
            scale = tl.load(scales_ptr + offset + n, mask=row_mask, other=0.0).to(tl.float32)
            codes = fragment_codes(words, slot, BITS, BLOCK_N, LANES)
            if HAS_BOOK:
                weight = tl.load(book_ptr + codes) * scale[:, None]
            else:
                zero = group_zeros(zeros_ptr, offset, n, row_mask, BITS, HAS_ZEROS)
                weight = (codes.to(tl.float32) - zero[:, None]) * scale[:, None]
            acc_NM = tl.dot(weight.to(DTYPE), x_LM, acc_NM, input_precision="ieee")
    if SPLIT:
        base = work_ptr + split.to(tl.int64) * stride_ws
        tl.store(base + n64[:, None] * stride_wn + m[None, :], acc_NM, mask=row_mask[:, None] & (m < M)[None, :])
    else:
        acc_NM = add_low_rank(
            acc_NM, up_ptr, h_ptr, segments_ptr, n, m, N, M, segment_count, partials, stride_un, stride_hs, stride_hm, stride_hr,
            BLOCK_R, UP_DTYPE, first_n, BLOCK_N, HAS_LOW_RANK,
        )  # fmt: skip
        acc_NM = add_bias(acc_NM, bias_ptr, n, N, HAS_BIAS)
        tl.store(y_ptr + m64[:, None] * stride_ym + n[None, :], tl.trans(acc_NM).to(DTYPE), mask=(m < M)[:, None] & row_mask[None, :])


@triton.jit
def dequantize_kernel(
    codes_ptr, scales_ptr, zeros_ptr, book_ptr, out_ptr, N, K, stride_g, stride_out, tiles, group_size,
    BITS: tl.constexpr, SLOTS: tl.constexpr, LANES: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BOOK: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [N, K] in DTYPE, one tile of some rows a program: a thread's words of codes become as many words of two numbers each, so that
    nothing moves between threads. In 16 bits `out` and its stride are in such words; K is even there."""
    EXACT: tl.constexpr = True
    t = tl.program_id(1)
    n, pair = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, LANES // 2)
    n64, row_mask = n.to(tl.int64), n < N
    words = tl.load(codes_ptr + (n64[:, None] * tiles + t) * (LANES // 2) + pair[None, :], mask=row_mask[:, None], other=0)
    for slot in tl.static_range(SLOTS):
        start = (t * SLOTS + slot) * LANES
        offset = (tl.minimum(start, K - 1) // group_size) * stride_g
        scale = tl.load(scales_ptr + offset + n, mask=row_mask, other=0.0).to(tl.float32)
        zero = group_zeros(zeros_ptr, offset, n, row_mask, BITS, HAS_ZEROS)
        low = field_levels(words, scale, zero, book_ptr, BITS * slot, BITS, HAS_BOOK, EXACT)
        high = field_levels(words, scale, zero, book_ptr, BITS * slot + 16, BITS, HAS_BOOK, EXACT)
        k = start + 2 * pair
        mask = row_mask[:, None] & (k < K)[None, :]
        if tl.float32 == DTYPE:
            places = out_ptr + n64[:, None] * stride_out + k[None, :]
            tl.store(places, low, mask=mask)
            tl.store(places + 1, high, mask=row_mask[:, None] & (k + 1 < K)[None, :])
        else:
            both = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            both |= high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16
            tl.store(out_ptr + n64[:, None] * stride_out + (start // 2 + pair)[None, :], both, mask=mask)


@triton.jit
def gradient_kernel(
    grad_ptr, codes_ptr, scales_ptr, zeros_ptr, book_ptr, out_ptr, M, N, K, stride_gm, stride_gn, tiles, group_size,
    BITS: tl.constexpr, SLOTS: tl.constexpr, LANES: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BOOK: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out [M, K] = grad [M, N] · W: one fragment of inputs a program, outputs in order, so the sum is deterministic."""
    fragment = tl.program_id(1)
    t, slot = fragment // SLOTS, fragment % SLOTS
    start = fragment * LANES
    m64 = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    k, pair = start + tl.arange(0, LANES), tl.arange(0, LANES // 2)
    acc_ML = tl.zeros((BLOCK_M, LANES), tl.float32)
    for first_n in range(0, N, BLOCK_N):
        n = first_n + tl.arange(0, BLOCK_N)
        row_mask, n64 = n < N, n.to(tl.int64)
        words = tl.load(codes_ptr + (n64[:, None] * tiles + t) * (LANES // 2) + pair[None, :], mask=row_mask[:, None], other=0)
        offset = (tl.minimum(start, K - 1) // group_size) * N
        scale = tl.load(scales_ptr + offset + n, mask=row_mask, other=0.0).to(tl.float32)
        codes = fragment_codes(words, slot, BITS, BLOCK_N, LANES)
        if HAS_BOOK:
            weight = tl.load(book_ptr + codes) * scale[:, None]
        else:
            zero = group_zeros(zeros_ptr, offset, n, row_mask, BITS, HAS_ZEROS)
            weight = (codes.to(tl.float32) - zero[:, None]) * scale[:, None]
        grad = tl.load(
            grad_ptr + m64[:, None] * stride_gm + n64[None, :] * stride_gn, mask=(m64 < M)[:, None] & row_mask[None, :], other=0.0
        )
        acc_ML = tl.dot(grad, weight.to(DTYPE), acc_ML, input_precision="ieee")
    tl.store(out_ptr + m64[:, None] * K + k[None, :], acc_ML.to(DTYPE), mask=(m64 < M)[:, None] & (k < K)[None, :])
