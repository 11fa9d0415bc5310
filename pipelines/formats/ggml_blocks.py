"""Packs records into the bytes of ggml's blocks, as in a GGUF file, and unpacks them, bit for bit.

A block's parts follow one another as its row of `_PARTS` says. Knows records and bytes; not files, names or models.
Layout: ggml-common.h of ggml; `gguf.quants` reads the same. Legend: O out, I in, N blocks (all rows), C columns of a block, K small codes.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...compress.ggml_types import GGML_TYPES, GgmlName
from ...compress.weights import GgmlWeight

_Plane = tuple[int, int, int]
"""(first bit of a code, how many, the run): byte r of a run of R bytes holds these bits of the codes r, R + r, 2R + r, …"""
_PARTS: Mapping[str, tuple[str | _Plane, ...]] = {
    "q4_0": ("d", (0, 4, 16)),
    "q4_1": ("d", "m", (0, 4, 16)),
    "q5_0": ("d", (4, 1, 1), (0, 4, 16)),
    "q5_1": ("d", "m", (4, 1, 1), (0, 4, 16)),
    "q8_0": ("d", (0, 8, 32)),
    "q2_k": ("small", (0, 2, 32), "d", "m"),
    "q3_k": ((2, 1, 32), (0, 2, 32), "small", "d"),
    "q4_k": ("d", "m", "small", (0, 4, 32)),
    "q5_k": ("d", "m", "small", (4, 1, 32), (0, 4, 32)),
    "q6_k": ((0, 4, 64), (4, 2, 32), "small", "d"),
}


def bytes_per_row(type: GgmlName, in_features: int) -> int:
    """ValueError where the row is no whole number of blocks."""
    layout = GGML_TYPES[type]
    if in_features % layout.columns:
        raise ValueError(f"in_features {in_features} is not a multiple of the {layout.columns} columns of a block of {type}")
    return in_features // layout.columns * layout.block_bits // 8


def pack(record: GgmlWeight) -> Tensor:
    """uint8 [O, bytes of a row]: the blocks as a GGUF file of the record's type has them."""
    name, layout = record.type, GGML_TYPES[record.type]
    codes_NC = record.codes_OI().view(-1, layout.columns)
    parts: list[Tensor] = []
    for part in _PARTS[name]:
        if part == "d":
            parts.append(_half_bytes(record.super_scales))
        elif part == "m":  # the legacy types add what the k-quants take off
            assert record.super_minima is not None
            parts.append(_half_bytes(record.super_minima if layout.scale_bits else -record.super_minima))
        elif part == "small":
            s_OG, t_OG = record.small_codes_OG()
            both = s_OG if t_OG is None else torch.cat((s_OG.view(-1, layout.groups), t_OG.view(-1, layout.groups)), 1)
            small_NK = (both + layout.scale_zero).to(torch.uint8).view(-1, layout.small_codes)
            parts.append(_SMALL[name][0](small_NK))
        else:
            assert not isinstance(part, str)
            first, bits, run = part
            plane_NC = codes_NC ^ 128 if name == "q8_0" else codes_NC >> first & (1 << bits) - 1
            parts.append(_gather(plane_NC, bits, run))
    return torch.cat(parts, 1).view(record.shape[0], -1)


def unpack(blocks: Tensor, type: GgmlName, shape: tuple[int, int]) -> GgmlWeight:
    """The record of uint8 [O, bytes of a row] (any shape of as many bytes). ValueError where the bytes are not those of the shape."""
    layout, (rows, columns) = GGML_TYPES[type], shape
    wanted = rows * bytes_per_row(type, columns)
    if blocks.dtype != torch.uint8 or blocks.numel() != wanted:
        raise ValueError(f"{type} of {rows} × {columns} takes {wanted} bytes, got {blocks.numel()} of {blocks.dtype}")
    rest_NB = blocks.reshape(-1, layout.block_bits // 8)
    codes_NC = torch.zeros(len(rest_NB), layout.columns, dtype=torch.uint8, device=blocks.device)
    d_N, m_N, small_NK = rest_NB, None, None
    for part in _PARTS[type]:
        size = _size(part, type)
        here_NB, rest_NB = rest_NB[:, :size].contiguous(), rest_NB[:, size:]
        if part == "d":
            d_N = here_NB.view(torch.float16)
        elif part == "m":
            m_N = here_NB.view(torch.float16) if layout.scale_bits else -here_NB.view(torch.float16)
        elif part == "small":
            small_NK = _SMALL[type][1](here_NB)
        else:
            assert not isinstance(part, str)
            first, bits, run = part
            plane_NC = _scatter(here_NB, bits, run)
            codes_NC |= plane_NC ^ 128 if type == "q8_0" else plane_NC << first
    minima = None if m_N is None else m_N.reshape(rows, -1)
    small = None if small_NK is None else small_NK.view(rows, -1, layout.small_codes)
    return GgmlWeight.from_codes(codes_NC.view(rows, columns), d_N.reshape(rows, -1), minima, small, type)


def _size(part: str | _Plane, type: str) -> int:
    """Bytes of a part of a block."""
    layout = GGML_TYPES[type]
    if isinstance(part, str):
        return layout.small_codes * layout.scale_bits // 8 if part == "small" else 2
    return layout.columns * part[1] // 8


def _half_bytes(values: Tensor) -> Tensor:
    return values.half().reshape(-1, 1).contiguous().view(torch.uint8)


def _gather(values_NC: Tensor, bits: int, run: int) -> Tensor:
    """Codes of `bits` bits into bytes, the lowest bits first."""
    return _or(values_NC.view(len(values_NC), -1, 8 // bits, run), bits).flatten(1)


def _scatter(bytes_NB: Tensor, bits: int, run: int) -> Tensor:
    """The inverse of `_gather`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=bytes_NB.device).view(-1, 1)
    return (bytes_NB.view(len(bytes_NB), -1, 1, run) >> shifts & (1 << bits) - 1).flatten(1)


def _or(fields: Tensor, bits: int) -> Tensor:
    """Over the second dimension from the last, field j shifted up by j·bits."""
    out, *others = fields.unbind(-2)
    for place, field in enumerate(others, 1):
        out = out | field << bits * place
    return out


def _nibbles(small_NK: Tensor) -> Tensor:
    """Q2_K: a scale below, its minimum above."""
    return _or(small_NK.view(len(small_NK), 2, 16), 4)


def _from_nibbles(bytes_NB: Tensor) -> Tensor:
    return torch.cat((bytes_NB & 15, bytes_NB >> 4), 1)


def _low_and_high(small_NK: Tensor) -> Tensor:
    """Q3_K: the low halves of 16 codes of 6 bits in 8 bytes, their upper two bits in 4."""
    low, high = small_NK & 15, small_NK >> 4
    return torch.cat((_or(low.view(-1, 2, 8), 4), _or(high.view(-1, 4, 4), 2)), 1)


def _from_low_and_high(bytes_NB: Tensor) -> Tensor:
    low, high = bytes_NB[:, :8], bytes_NB[:, 8:].contiguous()
    return torch.cat((low & 15, low >> 4), 1) | _scatter(high, 2, 4) << 4


def _six_bits(small_NK: Tensor) -> Tensor:
    """Q4_K, Q5_K: scales and minima of the first four groups in the low 6 bits of 8 bytes, the upper two of the last four above them."""
    first_s, last_s, first_t, last_t = small_NK.split(4, 1)
    return torch.cat((first_s | last_s >> 4 << 6, first_t | last_t >> 4 << 6, last_s & 15 | (last_t & 15) << 4), 1)


def _from_six_bits(bytes_NB: Tensor) -> Tensor:
    s, t, low = bytes_NB.split(4, 1)
    return torch.cat((s & 63, low & 15 | s >> 6 << 4, t & 63, low >> 4 | t >> 6 << 4), 1)


def _signed(small_NK: Tensor) -> Tensor:
    """Q6_K: codes around 128 and int8, its own inverse."""
    return small_NK ^ 128


_SMALL: Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "q2_k": (_nibbles, _from_nibbles),
    "q3_k": (_low_and_high, _from_low_and_high),
    "q4_k": (_six_bits, _from_six_bits),
    "q5_k": (_six_bits, _from_six_bits),
    "q6_k": (_signed, _signed),
}
"""How small codes become bytes, and back."""
