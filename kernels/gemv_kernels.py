"""One to eight tokens without the matrix unit: codes are read 16 bytes a thread and multiplied in float32, sums are a fixed tree.

A program has some outputs and a share of the inputs. Where there is one share, it adds the low-rank term and the bias and writes y, and
`project_kernel` has made h ahead; else the down-projection's rows are more rows of the first kernel, and `gemv_finish_kernel` adds the
shares in order. Accumulators are a tuple with one [N, P] a token: of three dimensions Triton makes them move through shared memory at
every step. Works in Triton's interpreter.
Legend: M tokens, N = O outputs, K = I inputs, P words (two fields each) of a tile's row, R rank, S splits.
"""
# Inside @triton.jit functions the language's values have types of their own, which pyright does not know.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from .parts import field_levels, group_zeros


@triton.jit
def _pairs(ptr, word, mask, K, DTYPE: tl.constexpr):
    """(float32 of the inputs 2·word, of those behind them) of a row at `ptr`, 0 where masked: in 16 bits both are one word of 32, and a row
    is padded to whole ones. Masks are of words, since Triton loads wide only what is masked in runs that it can prove."""
    if tl.float32 == DTYPE:
        even = tl.load(ptr + 2 * word, mask=mask & (2 * word < K), other=0.0)
        return even, tl.load(ptr + 2 * word + 1, mask=mask & (2 * word + 1 < K), other=0.0)
    words = tl.load(ptr + word, mask=mask, other=0)
    if tl.bfloat16 == DTYPE:
        return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
    low, high = (words & 0xFFFF).to(tl.int16), ((words >> 16) & 0xFFFF).to(tl.int16)
    return low.to(tl.float16, bitcast=True).to(tl.float32), high.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _project(
    x_ptr, down_ptr, out_ptr, first_r, first_word, end_word, M, K, words, R, stride_x, stride_d, stride_om,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out[m, r] = down[r]·x[m] over the words [first_word, end_word). Strides of x and down are in words of theirs in 16 bits."""
    r = first_r + tl.arange(0, BLOCK_D)
    acc = (tl.zeros((BLOCK_D, STEP), tl.float32),) * ROWS
    for first in range(first_word, end_word, STEP):
        word = first + tl.arange(0, STEP)
        inside = (word < words) & (word < end_word)
        low, high = _pairs(down_ptr + r[:, None] * stride_d, word[None, :], (r < R)[:, None] & inside[None, :], K, DTYPE)
        new = ()
        for m in tl.static_range(ROWS):
            x_low, x_high = _pairs(x_ptr + m * stride_x, word, inside & (tl.full((1,), m, tl.int32) < M), K, DTYPE)
            new += (acc[m] + low * x_low[None, :] + high * x_high[None, :],)
        acc = new
    for m in tl.static_range(ROWS):
        tl.store(out_ptr + m * stride_om + r, tl.sum(acc[m], axis=1), mask=(r < R) & (tl.full((1,), m, tl.int32) < M))


@triton.jit
def project_kernel(
    x_ptr, down_ptr, h_ptr, M, K, words, R, stride_x, stride_d, steps_per_split,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """h float32 [S, M, R]: partial sums of x·downᵀ."""
    split = tl.program_id(1)
    _project(
        x_ptr, down_ptr, h_ptr + split * M * R, tl.program_id(0) * BLOCK_D, split * steps_per_split * STEP, (split + 1) * steps_per_split * STEP,
        M, K, words, R, stride_x, stride_d, R, DTYPE, ROWS, BLOCK_D, STEP,
    )  # fmt: skip


@triton.jit
def _finish(
    acc, up_ptr, h_ptr, segments_ptr, bias_ptr, y_ptr, n, first_n, M, N, segment_count, partials, stride_un, stride_hs, stride_hm, stride_hr,
    stride_ym, HAS_LOW_RANK: tl.constexpr, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y = acc + h·upᵀ + bias, acc a tuple of [N]; segments and h's partial sums as in parts.add_low_rank."""
    if HAS_LOW_RANK:
        for index in range(segment_count):
            row = tl.load(segments_ptr + index * 4)
            end = row + tl.load(segments_ptr + index * 4 + 1)
            rank = tl.load(segments_ptr + index * 4 + 2)
            ranks = tl.load(segments_ptr + index * 4 + 3)
            if (first_n < end) & (first_n + BLOCK_N > row):
                for start in range(0, ranks, BLOCK_R):
                    r = start + tl.arange(0, BLOCK_R)
                    up_mask = ((n >= row) & (n < end))[:, None] & (r < ranks)[None, :]
                    up_NR = tl.load(up_ptr + n.to(tl.int64)[:, None] * stride_un + r[None, :], mask=up_mask, other=0.0).to(tl.float32)
                    new = ()
                    for m in tl.static_range(ROWS):
                        h_R = tl.zeros((BLOCK_R,), tl.float32)
                        for part in range(partials):
                            places = h_ptr + part * stride_hs + m * stride_hm + (rank + r) * stride_hr
                            h_R += tl.load(places, mask=(r < ranks) & (tl.full((1,), m, tl.int32) < M), other=0.0).to(tl.float32)
                        new += (acc[m] + tl.sum(up_NR * h_R[None, :], axis=1),)
                    acc = new
    for m in tl.static_range(ROWS):
        y_N = acc[m]
        if HAS_BIAS:
            y_N += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + m * stride_ym + n, y_N.to(DTYPE), mask=(n < N) & (tl.full((1,), m, tl.int32) < M))


@triton.jit
def _multiply(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, book_ptr, n, first, last, M, N, K, words_x, stride_x, tiles, GROUP: tl.constexpr, BITS: tl.constexpr,
    SLOTS: tl.constexpr, LANES: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BOOK: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """A tuple of float32 [N], one a token: W·x over the tiles [first, last)."""
    pair, n64, row_mask = tl.arange(0, LANES // 2), n.to(tl.int64), n < N
    TILE: tl.constexpr = SLOTS * LANES // 2
    EXACT: tl.constexpr = tl.float32 == DTYPE
    acc = (tl.zeros((BLOCK_N, LANES // 2), tl.float32),) * ROWS
    for step in range(first, last, UNROLL):
        fetched = ()  # all words of a step are on their way before the first is used
        for u in tl.static_range(UNROLL):
            places = codes_ptr + (n64[:, None] * tiles + step + u) * (LANES // 2) + pair[None, :]
            fetched += (tl.load(places, mask=row_mask[:, None] & ((step + u) * (LANES // 2) + pair < last * (LANES // 2))[None, :], other=0),)
        for u in tl.static_range(UNROLL):
            scales, zeros = (), ()
            for slot in tl.static_range(SLOTS):
                offset = (tl.minimum(((step + u) * SLOTS + slot) * LANES, K - 1) // GROUP) * N
                scales += (tl.load(scales_ptr + offset + n, mask=row_mask, other=0.0).to(tl.float32),)
                zeros += (group_zeros(zeros_ptr, offset, n, row_mask, BITS, HAS_ZEROS),)
            for slot in tl.static_range(SLOTS):
                low = field_levels(fetched[u], scales[slot], zeros[slot], book_ptr, BITS * slot, BITS, HAS_BOOK, EXACT)
                high = field_levels(fetched[u], scales[slot], zeros[slot], book_ptr, BITS * slot + 16, BITS, HAS_BOOK, EXACT)
                word = (step + u) * TILE + slot * (LANES // 2) + pair
                inside = (word < words_x) & (word < last * TILE)
                new = ()
                for m in tl.static_range(ROWS):
                    x_low, x_high = _pairs(x_ptr + m * stride_x, word, inside & (tl.full((1,), m, tl.int32) < M), K, DTYPE)
                    new += (acc[m] + low * x_low[None, :] + high * x_high[None, :],)
                acc = new
    sums = ()
    for m in tl.static_range(ROWS):
        sums += (tl.sum(acc[m], axis=1),)
    return sums


@triton.jit
def gemv_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, book_ptr, up_ptr, h_ptr, segments_ptr, bias_ptr, y_ptr, M, N, K, words_x, stride_x, tiles,
    segment_count, partials, stride_un, stride_hs, stride_hm, stride_hr, stride_ym, GROUP: tl.constexpr, BITS: tl.constexpr, SLOTS: tl.constexpr,
    LANES: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BOOK: tl.constexpr, HAS_LOW_RANK: tl.constexpr, HAS_BIAS: tl.constexpr,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """y [M, N]: some outputs a program."""
    first_n = tl.program_id(0) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    sums = _multiply(
        x_ptr, codes_ptr, scales_ptr, zeros_ptr, book_ptr, n, 0, tiles, M, N, K, words_x, stride_x, tiles, GROUP, BITS, SLOTS, LANES, HAS_ZEROS,
        HAS_BOOK, DTYPE, ROWS, BLOCK_N, UNROLL,
    )  # fmt: skip
    _finish(
        sums, up_ptr, h_ptr, segments_ptr, bias_ptr, y_ptr, n, first_n, M, N, segment_count, partials, stride_un, stride_hs, stride_hm,
        stride_hr, stride_ym, HAS_LOW_RANK, HAS_BIAS, DTYPE, ROWS, BLOCK_N, BLOCK_R,
    )  # fmt: skip


@triton.jit
def gemv_share_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, book_ptr, down_ptr, work_ptr, M, N, K, words_x, R, stride_x, stride_d, tiles, tiles_per_split,
    blocks_n,
    GROUP: tl.constexpr, BITS: tl.constexpr, SLOTS: tl.constexpr, LANES: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BOOK: tl.constexpr,
    HAS_DOWN: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """work float32 [S, M, N + R]: this split's share of W·x and, from column N on, of down·x."""
    block, split = tl.program_id(0), tl.program_id(1)
    first, last = split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tiles)
    share_ptr = work_ptr + split.to(tl.int64) * M * (N + R)
    if block < blocks_n:
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        sums = _multiply(
            x_ptr, codes_ptr, scales_ptr, zeros_ptr, book_ptr, n, first, last, M, N, K, words_x, stride_x, tiles, GROUP, BITS, SLOTS, LANES,
            HAS_ZEROS, HAS_BOOK, DTYPE, ROWS, BLOCK_N, UNROLL,
        )  # fmt: skip
        for m in tl.static_range(ROWS):
            tl.store(share_ptr + m * (N + R) + n, sums[m], mask=(n < N) & (tl.full((1,), m, tl.int32) < M))
    else:
        if HAS_DOWN:
            _project(
                x_ptr, down_ptr, share_ptr + N, (block - blocks_n) * BLOCK_D, first * (SLOTS * LANES // 2), last * (SLOTS * LANES // 2), M, K,
                words_x, R, stride_x, stride_d, N + R, DTYPE, ROWS, BLOCK_D, STEP,
            )  # fmt: skip


@triton.jit
def gemv_finish_kernel(
    work_ptr, up_ptr, h_ptr, segments_ptr, bias_ptr, y_ptr, M, N, R, splits, segment_count, partials, stride_un, stride_hs, stride_hm,
    stride_hr, stride_ym, HAS_LOW_RANK: tl.constexpr, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y from the shares of `gemv_kernel`, in order."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = (tl.zeros((BLOCK_N,), tl.float32),) * ROWS
    for _ in range(splits):
        new = ()
        for m in tl.static_range(ROWS):
            new += (acc[m] + tl.load(work_ptr + m * (N + R) + n, mask=(n < N) & (tl.full((1,), m, tl.int32) < M), other=0.0),)
        acc = new
        work_ptr += M * (N + R)
    _finish(
        acc, up_ptr, h_ptr, segments_ptr, bias_ptr, y_ptr, n, tl.program_id(0) * BLOCK_N, M, N, segment_count, partials, stride_un, stride_hs,
        stride_hm, stride_hr, stride_ym, HAS_LOW_RANK, HAS_BIAS, DTYPE, ROWS, BLOCK_N, BLOCK_R,
    )  # fmt: skip
