"""Pieces that the Triton kernels share: fragments of weights from packed words, and the low-rank term on an accumulator.

Accumulators are [N outputs, M tokens]: the weight, made in registers, is then the left operand, which Hopper's matrix
instruction can take from there. Works in Triton's interpreter (float16 and float32).
Legend: N outputs, M tokens, K inputs, L lanes, R rank.
"""
# Inside @triton.jit functions the language's values have types of their own, which pyright does not know.
# pyright: reportOperatorIssue=false, reportAssignmentType=false

import triton
import triton.language as tl


@triton.jit
def fragment_codes(words, slot, BITS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """int32 [ROWS, LANES] from words [ROWS, LANES/2]."""
    low = (words >> (BITS * slot)) & ((1 << BITS) - 1)
    high = (words >> (BITS * slot + 16)) & ((1 << BITS) - 1)
    return tl.join(low, high).reshape(ROWS, LANES)


@triton.jit
def fragment_levels(words, slot, level, zero, BITS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """int8 [ROWS, LANES]: (code − zero)·level, level and zero int32 [ROWS], the two codes of a word by one multiplication and one addition.
    2048 keeps the low half positive, so that it borrows nothing from the high one, and is gone when eight bits of it are kept."""
    pairs = (words >> (BITS * slot)) & (((1 << BITS) - 1) * 0x00010001)
    pairs = pairs * level[:, None] + (2048 - zero * level * 0x00010001)[:, None]
    return tl.join(pairs.to(tl.int8), (pairs >> 16).to(tl.int8)).reshape(ROWS, LANES)


@triton.jit
def fragment_shifted(
    words, slot: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, SHIFT: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """DTYPE [ROWS, LANES] holding code + SHIFT. 128 (bfloat16) and 1024 (float16) cost no conversion: the code is the
    mantissa of a number whose exponent is or-ed in, two at a time. SHIFT 0 converts."""
    if SHIFT == 0:
        return fragment_codes(words, slot, BITS, ROWS, LANES).to(tl.float32).to(DTYPE)
    MASK: tl.constexpr = ((1 << BITS) - 1) * 0x00010001
    EXPONENT: tl.constexpr = 0x43004300 if SHIFT == 128 else 0x64006400
    pairs = ((words >> (BITS * slot)) & MASK) | EXPONENT
    low, high = (pairs & 0xFFFF).to(tl.int16), (pairs >> 16).to(tl.int16)
    return tl.join(low, high).reshape(ROWS, LANES).to(DTYPE, bitcast=True)


@triton.jit
def _field(words, AT: tl.constexpr, BITS: tl.constexpr):
    """float32 of the codes at bit AT of words, plus 2^7 (2^15 for 8 bits): a code shifted into the mantissa of a number whose exponent
    is or-ed in needs no conversion."""
    PLACE: tl.constexpr = 8 if BITS == 8 else 16
    EXPONENT: tl.constexpr = 0x47000000 if BITS == 8 else 0x43000000
    moved = words >> (AT - PLACE) if AT >= PLACE else words << (PLACE - AT)
    return ((moved & (((1 << BITS) - 1) << PLACE)) | EXPONENT).to(tl.float32, bitcast=True)


@triton.jit
def field_levels(words, scale, zero, book_ptr, AT: tl.constexpr, BITS: tl.constexpr, HAS_BOOK: tl.constexpr, EXACT: tl.constexpr):
    """float32 [N, P]: weights of one field. EXACT, for x of 32 bits, converts and subtracts; else the subtraction rides on the scale."""
    if HAS_BOOK:
        return tl.load(book_ptr + ((words >> AT) & ((1 << BITS) - 1))) * scale[:, None]
    if EXACT:
        return (((words >> AT) & ((1 << BITS) - 1)).to(tl.float32) - zero[:, None]) * scale[:, None]
    OFFSET: tl.constexpr = 32768.0 if BITS == 8 else 128.0
    return _field(words, AT, BITS) * scale[:, None] - ((zero + OFFSET) * scale)[:, None]


@triton.jit
def group_zeros(zeros_ptr, offset, rows, mask, BITS: tl.constexpr, HAS_ZEROS: tl.constexpr):
    """float32 [rows]: stored zero points, or the middle of a symmetric grid."""
    if HAS_ZEROS:
        return tl.load(zeros_ptr + offset + rows, mask=mask, other=0.0).to(tl.float32)
    return tl.full(rows.shape, 1 << (BITS - 1), tl.float32)


@triton.jit
def add_low_rank(
    acc_NM, up_ptr, h_ptr, segments_ptr, n, m, N, M, segment_count, partials, stride_un, stride_hs, stride_hm, stride_hr,
    BLOCK_R: tl.constexpr, DTYPE: tl.constexpr, first_n, BLOCK_N: tl.constexpr, HAS_LOW_RANK: tl.constexpr,
):  # fmt: skip
    """acc + up·hᵀ; acc itself without a low-rank term, where a loop of no rounds would not do: what is not there cannot be compiled.
    h's partial sums are added in order. A row of `segments` (row, rows, rank, ranks) gives its outputs their own slice of h;
    up [N, ≥ ranks] holds each output's own ranks from column 0."""
    if HAS_LOW_RANK:
        for index in range(segment_count):
            row = tl.load(segments_ptr + index * 4)
            end = row + tl.load(segments_ptr + index * 4 + 1)
            rank = tl.load(segments_ptr + index * 4 + 2)
            ranks = tl.load(segments_ptr + index * 4 + 3)
            if (first_n < end) & (first_n + BLOCK_N > row):
                for start in range(0, ranks, BLOCK_R):
                    r = start + tl.arange(0, BLOCK_R)
                    h_RM = tl.zeros((BLOCK_R, acc_NM.shape[1]), tl.float32)
                    h_mask = (r < ranks)[:, None] & (m < M)[None, :]
                    for part in range(partials):
                        pointers = h_ptr + part * stride_hs + (rank + r)[:, None] * stride_hr + m[None, :] * stride_hm
                        h_RM += tl.load(pointers, mask=h_mask, other=0.0).to(tl.float32)
                    up_mask = ((n >= row) & (n < end))[:, None] & (r < ranks)[None, :]
                    up_NR = tl.load(up_ptr + n[:, None] * stride_un + r[None, :], mask=up_mask, other=0.0)
                    acc_NM += tl.dot(up_NR.to(DTYPE), h_RM.to(DTYPE), input_precision="ieee")
    return acc_NM


@triton.jit
def add_bias(acc_NM, bias_ptr, n, N, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        acc_NM += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    return acc_NM
