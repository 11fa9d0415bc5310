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
    if codes_OI.numel() and (int(codes_OI.min()) < 0 or int(codes_OI.max()) >= 1 << bits):
        raise ValueError(f"codes lie in {int(codes_OI.min())}…{int(codes_OI.max())}; {bits} bits hold 0…{(1 << bits) - 1}")
    words = packed_words(count, bits)
    padded = torch.zeros(rows, -(-count // 32) * 32, dtype=torch.int64, device=codes_OI.device)
    padded[:, :count] = codes_OI
    chunks = padded.view(rows, -1, 32)  # 32 values fill exactly `bits` words
    out = torch.zeros(rows, chunks.shape[1], bits, dtype=torch.int64, device=codes_OI.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        out[:, :, word] |= chunks[:, :, i] << shift
        if shift + bits > 32:
            out[:, :, word + 1] |= chunks[:, :, i] >> (32 - shift)
    out &= 0xFFFFFFFF
    out -= (out >> 31) << 32  # the same 32 bits, as a signed number
    return out.view(rows, -1)[:, :words].to(torch.int32).contiguous()


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
