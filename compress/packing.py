"""Codes and masks as bits: a little-endian bit stream per row, the layout GPTQ and compressed-tensors use along the input.

Knows integers and bits only; what a code means is `grids`' and `normal_float`'s business.
Legend: O rows, I values in a row, W 32-bit words in a row.
"""

import torch
from torch import Tensor

BITS = (2, 3, 4, 5, 6, 8)


def packed_words(count: int, bits: int) -> int:
    """Number of int32 words that hold `count` values of `bits` bits."""
    return -(-count * bits // 32)


def pack_codes(codes_OI: Tensor, bits: int) -> Tensor:
    """int32 [O, ⌈I·bits/32⌉]; value i of a row occupies bits [i·bits, (i+1)·bits) of the row's stream, low bits first."""
    _check_bits(bits)
    rows, count = codes_OI.shape
    if codes_OI.numel():
        least, most = (int(code) for code in torch.stack(codes_OI.aminmax()).tolist())
        if least < 0 or most >= 1 << bits:
            raise ValueError(f"codes lie in {least}…{most}; {bits} bits hold 0…{(1 << bits) - 1}")
    values = torch.nn.functional.pad(codes_OI.to(torch.uint8), (0, -count % 32))  # 32 values fill exactly `bits` words
    if bits in (2, 4, 8):
        per = 8 // bits
        stream, *others = values.view(rows, -1, per).unbind(-1)
        for place, value in enumerate(others, 1):
            stream = stream | (value << (bits * place))
    else:  # eight values fill exactly `bits` bytes, and none reaches over more than two of them
        parts: list[Tensor | None] = [None] * bits
        for place, value in enumerate(values.view(rows, -1, 8).unbind(-1)):
            byte, shift = divmod(place * bits, 8)
            low = value << shift  # what is shifted out at the top is the next byte's
            parts[byte] = low if (begun := parts[byte]) is None else begun | low
            if shift + bits > 8:
                parts[byte + 1] = value >> (8 - shift)
        stream = torch.stack([part for part in parts if part is not None], -1).view(rows, -1)
    return stream.contiguous().view(torch.int32)[:, : packed_words(count, bits)].contiguous()


def unpack_codes(packed_OW: Tensor, bits: int, count: int) -> Tensor:
    """uint8 [O, count], the inverse of `pack_codes`."""
    _check_bits(bits)
    rows = packed_OW.shape[0]
    if packed_OW.shape[1] != packed_words(count, bits):
        raise ValueError(f"{packed_OW.shape[1]} words cannot hold exactly {count} values of {bits} bits")
    stream = packed_OW.contiguous().view(torch.uint8)
    if bits == 8:
        return stream[:, :count].contiguous()
    if bits == 4:
        return torch.stack((stream & 15, stream >> 4), dim=-1).view(rows, -1)[:, :count].contiguous()
    if bits == 2:
        parts = (stream & 3, (stream >> 2) & 3, (stream >> 4) & 3, stream >> 6)
        return torch.stack(parts, dim=-1).view(rows, -1)[:, :count].contiguous()
    # any other width: eight values fill exactly `bits` bytes, and none reaches over more than two of them
    whole = torch.nn.functional.pad(stream, (0, -stream.shape[1] % bits)).view(rows, -1, bits)
    mask, parts = (1 << bits) - 1, []
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        value = whole[..., byte] >> shift
        if shift + bits > 8:
            value = value | (whole[..., byte + 1] << (8 - shift))  # uint8: what is shifted out at the top is the next value's
        parts.append(value & mask)
    return torch.stack(parts, dim=-1).view(rows, -1)[:, :count].contiguous()


def pack_mask(mask_OI: Tensor) -> Tensor:
    """uint8 [O, ⌈I/8⌉] from bool [O, I]; bit i%8 of byte i//8 is value i."""
    rows, count = mask_OI.shape
    padded = torch.nn.functional.pad(mask_OI.to(torch.uint8), (0, -count % 8)).view(rows, -1, 8)
    weights = (1 << torch.arange(8, device=mask_OI.device)).to(torch.uint8)
    return (padded * weights).sum(-1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, count: int) -> Tensor:
    """bool [O, count], the inverse of `pack_mask`."""
    bits = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.view(packed.shape[0], -1)[:, :count].bool()


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"{bits} bits cannot be packed; choose one of {BITS}")
