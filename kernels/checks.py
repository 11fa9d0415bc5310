"""Argument checks of the kernel launchers: an error names the argument, its value and what was expected.

Legend: M tokens, O out, I in, R rank.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

RANK_LIMIT = 256
FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def matrix(name: str, value: Tensor, columns: int | None = None, dtypes: tuple[torch.dtype, ...] = FLOATING) -> None:
    if value.dim() != 2:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; expected a matrix [rows, {columns if columns is not None else 'columns'}]"
        )
    if columns is not None and value.shape[1] != columns:
        raise ValueError(f"{name} has {value.shape[1]} columns; expected {columns}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} is {value.dtype}; expected {' or '.join(map(str, dtypes))}")


def vector(name: str, value: Tensor | None, size: int) -> None:
    if value is not None and tuple(value.shape) != (size,):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected ({size},)")


def same_device(device: torch.device, tensors: Mapping[str, Tensor | None]) -> None:
    for name, value in tensors.items():
        if value is not None and value.device != device:
            raise ValueError(f"{name} is on {value.device}; expected {device}, where x is")


def rank(name: str, value: int) -> None:
    if value % 8 or not 8 <= value <= RANK_LIMIT:
        raise ValueError(f"{name} has rank {value}; expected a multiple of 8 up to {RANK_LIMIT}")


def low_rank(h: Tensor | None, up: Tensor | None, down: Tensor | None, rows: int, out: int, inputs: int) -> None:
    """h [M, R] or [S, M, R] with up [O, R], or up with down [R, I]; none of them, or up with exactly one other."""
    if up is None:
        given = "h" if h is not None else "lora_down" if down is not None else None
        if given:
            raise ValueError(f"{given} is given without lora_up; expected both or neither")
        return
    if (h is None) == (down is None):
        raise ValueError(f"lora_up needs h or lora_down, one of them; {'both are' if h is not None else 'neither is'} given")
    matrix("lora_up", up)
    rank("lora_up", up.shape[1])
    if up.shape[0] != out:
        raise ValueError(f"lora_up has {up.shape[0]} rows; expected {out}, the weight's outputs")
    if down is not None:
        matrix("lora_down", down, inputs)
        rank("lora_down", down.shape[0])
    if h is not None and (h.dim() not in (2, 3) or h.shape[-2] != rows):
        raise ValueError(f"h has shape {tuple(h.shape)}; expected ({rows}, R) or partial sums (S, {rows}, R)")


def ranks_of_segments(name: str, segments: Sequence[tuple[int, int, int, int]], available: int) -> None:
    needed = max((rank + ranks for _, _, rank, ranks in segments), default=0)
    if needed > available:
        raise ValueError(f"{name} has {available} ranks; lora_up and the segments need {needed}")
