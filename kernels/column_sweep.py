"""GPTQ's columns of one block in one kernel: round each onto its grid, and carry its error to those behind it in the block.

The card's form of the operator `bitmend::feed_back_block_`, whose slow twin is a loop of torch operators in compress/feedback; `use_on_cards`
puts it in that one's place. Sums run in another order than the loop's, so that a code in ten thousand may differ. Knows tensors only.
Legend: O out, I in, S columns of a block, G groups.
"""
# Inside @triton.jit functions the language's values have types of their own, which pyright does not know.
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import start as launch

OUTPUTS, WARPS = 32, 4
"""Of one program: its block of weights stays in registers, 128 columns in a quarter of what four warps have."""


@triton.jit
def _nearest(value):
    """Halves to even. What is added leaves a float32 no room for a fraction; larger numbers have none."""
    return tl.where(tl.abs(value) < 4194304.0, (value + 12582912.0) - 12582912.0, value)


@triton.jit
def _toward(value, end, share):
    """As torch's lerp."""
    return tl.where(share < 0.5, value + share * (end - value), end - (end - value) * (1.0 - share))


@triton.jit
def _feed_back_block_kernel(
    weight_ptr, levels_ptr, error_ptr, loss_ptr, unit_ptr, diagonal_ptr, scale_ptr, zero_ptr, group_ptr, keep_ptr, origin_ptr, outputs, start,
    count, stride_ui, stride_uj, top, pull, HAS_MASK: tl.constexpr, FLOAT_ZEROS: tl.constexpr, PULLED: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    o, s = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_S)
    there_O, there_S = o < outputs, s < count
    places_S = (start + s).to(tl.int64)
    rest_SO = tl.load(
        weight_ptr + places_S[:, None] * outputs + o[None, :], mask=there_S[:, None] & there_O[None, :], other=0.0
    )  # of columns whose turn is over, nothing is read
    loss_O = tl.load(loss_ptr + o, mask=there_O, other=0.0)
    for i in range(count):
        place = (start + i).to(tl.int64)
        w = tl.sum(tl.where((s == i)[:, None], rest_SO, 0.0), axis=0)
        grid = tl.load(group_ptr + place) * outputs + o
        scale = tl.load(scale_ptr + grid, mask=there_O, other=1.0)
        zero = tl.load(zero_ptr + grid, mask=there_O, other=0.0)
        origin = w
        if PULLED:
            origin = tl.load(origin_ptr + place * outputs + o, mask=there_O, other=0.0)
            w = _toward(w, origin, pull)
        if FLOAT_ZEROS:
            level = tl.minimum(tl.maximum(_nearest(tl.div_rn(w, scale) + zero), 0.0), top) - zero
        else:
            low, high = -zero, top - zero
            if HAS_MASK:
                keep = tl.load(keep_ptr + place * outputs + o, mask=there_O, other=0).to(tl.float32)
                low, high = low * keep, high * keep
            level = tl.minimum(tl.maximum(_nearest(tl.div_rn(w, scale)), low), high)
        if PULLED:
            w = _toward(w, origin, pull)
        error = w - level * scale
        tl.store(weight_ptr + place * outputs + o, w, mask=there_O)
        tl.store(levels_ptr + place * outputs + o, level, mask=there_O)
        tl.store(error_ptr + i * outputs + o, error, mask=there_O)
        lost = tl.div_rn(error, tl.load(diagonal_ptr + place) + tl.zeros((BLOCK_O,), tl.float32))
        loss_O += lost * lost
        unit_S = tl.load(unit_ptr + place * stride_ui + places_S * stride_uj, mask=there_S & (s > i), other=0.0)
        rest_SO -= unit_S[:, None] * error[None, :]
    tl.store(loss_ptr + o, loss_O, mask=there_O)


def feed_back_block_(
    weight_IO: Tensor, levels_IO: Tensor, error_SO: Tensor, loss_O: Tensor, unit_II: Tensor, diagonal_I: Tensor, scale_GO: Tensor,
    zero_GO: Tensor, group_I: Tensor, keep_IO: Tensor | None, origin_IO: Tensor | None, start: int, stop: int, top: int, float_zeros: bool,
    pull: float,
) -> None:  # fmt: skip
    """What compress/feedback.feed_back_block_ does, for float32 and contiguous tensors, unit_II with any strides.
    TypeError or ValueError names the tensor that is neither."""
    rows = {"weight": weight_IO, "levels": levels_IO, "error": error_SO, "loss": loss_O, "diagonal": diagonal_I, "scale": scale_GO, "zero": zero_GO}
    for name, tensor in (rows | {"unit": unit_II} | ({} if origin_IO is None else {"origin": origin_IO})).items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} is {tensor.dtype}; expected torch.float32")
        if name != "unit" and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()} for shape {tuple(tensor.shape)}; expected contiguous memory")
    if keep_IO is not None and not keep_IO.is_contiguous():
        raise ValueError(f"keep has strides {keep_IO.stride()} for shape {tuple(keep_IO.shape)}; expected contiguous memory")
    outputs = weight_IO.shape[1]
    launch(
        _feed_back_block_kernel, (triton.cdiv(outputs, OUTPUTS),),
        weight_IO, levels_IO, error_SO, loss_O, unit_II, diagonal_I, scale_GO, zero_GO, group_I,
        None if keep_IO is None else keep_IO.view(torch.uint8), origin_IO if pull else None, outputs, start, stop - start, *unit_II.stride(),
        float(top), pull, HAS_MASK=keep_IO is not None, FLOAT_ZEROS=float_zeros, PULLED=pull != 0.0,
        BLOCK_S=triton.next_power_of_2(stop - start), BLOCK_O=OUTPUTS, num_warps=WARPS, num_stages=1,
    )  # fmt: skip


@cache
def use_on_cards() -> torch.library.Library:
    """From here on the operator runs as this kernel on CUDA tensors."""
    library = torch.library.Library("bitmend", "IMPL")
    library.impl("feed_back_block_", feed_back_block_, "CUDA")
    return library
