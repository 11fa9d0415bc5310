"""Shared set-up of the kernel launchers: where Triton runs, which dtype, which segments.

Legend: M tokens, O out, R rank.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .layout import Segments

TRITON_DTYPES: Mapping[torch.dtype, tl.dtype] = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


_recorded: list["Launch"] | None = None


class Launch(NamedTuple):
    """One kernel as it would be started: what a compiler needs to know of it, tensors without memory among it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """kernel[grid](…): compile-time arguments by name, with num_warps and num_stages."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, options))
    else:
        kernel[grid](*arguments, **options)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """What launchers would start is listed instead; they may then be given tensors on "meta"."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def runs_triton(device: torch.device) -> bool:
    return device.type == "cuda" or (device.type == "cpu" and INTERPRETED) or (device.type == "meta" and _recorded is not None)


def can_time(device: torch.device) -> bool:
    """Whether kernels run on a card, and not in the interpreter, whose times mean nothing."""
    return device.type == "cuda" and not INTERPRETED


def kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """The interpreter's bfloat16 dot returns garbage (Triton 3.9), so there bfloat16 is computed in float32."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def shift_for(dtype: torch.dtype, bits: int) -> int:
    """The number under whose mantissa a code is written (see parts.fragment_shifted); 0 where the dtype has no room."""
    if dtype == torch.bfloat16 and bits < 8:
        return 128
    return 1024 if dtype == torch.float16 else 0


def segments_or_whole(segments: Segments | None, out: int, ranks: int) -> tuple[tuple[int, int, int, int], ...]:
    """ValueError when segments reach past the outputs, overlap, or read ranks that `lora_up` does not hold."""
    if segments is None:
        return ((0, out, 0, ranks),) if ranks else ()
    end = 0
    for row, rows, rank, count in segments:
        if row < end or row + rows > out:
            raise ValueError(f"segments: rows [{row}, {row + rows}) overlap an earlier segment or pass the weight's {out} outputs")
        if rank < 0 or count > ranks:
            raise ValueError(f"segments: ranks [{rank}, {rank + count}) do not fit lora_up's {ranks} columns")
        end = row + rows
    return tuple((row, rows, rank, count) for row, rows, rank, count in segments if count)


@cache
def segment_table(segments: tuple[tuple[int, int, int, int], ...], device: torch.device) -> Tensor:
    """int32 [S, 4] on the device; one row of zeros stands for none."""
    return torch.tensor(segments or ((0, 0, 0, 0),), dtype=torch.int32, device=device)


def h_strides(h: Tensor | None) -> tuple[int, int, int, int]:
    """(partial sums, stride of a partial sum, of a token, of a rank) of h [M, R] or [S, M, R]."""
    if h is None:
        return 0, 0, 0, 0
    if h.dim() == 3:
        return h.shape[0], h.stride(0), h.stride(1), h.stride(2)
    return 1, 0, h.stride(0), h.stride(1)


def in_order(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same values with the last dimension contiguous, which the kernels take for granted of `lora_up` and of vectors."""
    return tuple(t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tensors)


def row_bucket(rows: int, least: int = 16) -> int:
    """Tuned configurations are shared by calls of up to this many rows: a power of two from `least` to 4096."""
    return min(4096, max(least, 1 << (rows - 1).bit_length()))
