"""Codes in the order the Triton kernels read them: repacked once, when a weight is bound.

A row is cut into tiles of SLOTS·LANES inputs. Byte (or, at 3 bits, triple of bytes) `lane` of a tile holds the codes of inputs
lane, lane + LANES, lane + 2·LANES, …: one contiguous load gives SLOTS fragments of LANES consecutive inputs each, no
shuffle is needed, and a fragment never leaves its group, so its scale is one number per row.
Knows codes and scales; not masks, low-rank terms or devices.
Legend: O out, I in, G groups, T tiles, P byte planes, L lanes.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..compress import normal_float
from ..compress.weights import Base, NormalFloatWeight, UniformWeight

SLOTS = {2: 4, 3: 8, 4: 2, 8: 1}
PLANES = {2: 1, 3: 3, 4: 1, 8: 1}


@dataclass(frozen=True)
class TiledWeight:
    """codes uint8 [O, T, P, L]; scales floating [G, O]; zeros floating [G, O], or None: 2^(bits−1) for a uniform grid; book
    float32 [2^bits] or None. Weight = (code − zero)·scale, or book[code]·scale. Inputs past `in_features` are padding."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    book: Tensor | None
    bits: int
    group_size: int
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.in_features

    @property
    def lanes(self) -> int:
        return self.codes.shape[3]

    @property
    def tile(self) -> int:
        return SLOTS[self.bits] * self.lanes

    @property
    def tiles(self) -> int:
        return self.codes.shape[1]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @cached_property
    def integer_zeros(self) -> bool:
        return self.zeros is None or bool((self.zeros == self.zeros.round()).all())

    def codes_OI(self) -> Tensor:
        """uint8 [O, I]: the plain order again."""
        mask = (1 << self.bits) - 1
        words = sum(self.codes[:, :, p].int() << (8 * p) for p in range(PLANES[self.bits]))
        assert isinstance(words, Tensor)
        slots = [(words >> (self.bits * s)) & mask for s in range(SLOTS[self.bits])]
        return torch.stack(slots, dim=2).flatten(1)[:, : self.in_features].to(torch.uint8)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[O, I], computed in float32 and rounded once."""
        group = torch.arange(self.in_features, device=self.device) // self.group_size
        scales = self.scales.float().t()[:, group]
        if self.book is not None:
            return (self.book[self.codes_OI().int()] * scales).to(dtype)
        zeros = float(1 << (self.bits - 1)) if self.zeros is None else self.zeros.float().t()[:, group]
        return ((self.codes_OI().float() - zeros) * scales).to(dtype)

    def resident_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.zeros, self.book) if t is not None)

    def to(self, device: torch.device | str) -> "TiledWeight":
        moved = {k: None if (t := getattr(self, k)) is None else t.to(device) for k in ("codes", "scales", "zeros", "book")}
        return replace(self, **moved)


def lanes_for(in_features: int, group_size: int, bits: int) -> int:
    """The widest fragment (64, 32 or 16 inputs) that stays inside a group and pads a row by at most an eighth.

    ValueError when a group holds no whole number of 16 inputs, unless one group spans the row."""
    whole = [n for n in (64, 32, 16) if group_size % n == 0 or group_size >= in_features]
    if not whole:
        raise ValueError(
            f"group_size {group_size} is not a multiple of 16, which the kernels need; choose 16, 32, 64, 128 or one group a row"
        )
    for lanes in whole:
        tile = lanes * SLOTS[bits]
        if -in_features % tile <= in_features // 8:
            return lanes
    return whole[-1]


def tile_codes(codes_OI: Tensor, bits: int, lanes: int) -> Tensor:
    """uint8 [O, T, P, L] from codes [O, I]; padding is code 0."""
    slots, planes = SLOTS[bits], PLANES[bits]
    padded = torch.nn.functional.pad(codes_OI.int(), (0, -codes_OI.shape[1] % (slots * lanes)))
    by_slot = padded.view(codes_OI.shape[0], -1, slots, lanes)
    words = torch.zeros_like(by_slot[:, :, 0])
    for slot in range(slots):
        words |= by_slot[:, :, slot] << (bits * slot)
    return torch.stack([(words >> (8 * p)) & 255 for p in range(planes)], dim=2).to(torch.uint8).contiguous()


def tile(base: Base, lanes: int | None = None) -> TiledWeight:
    """Repack a uniform or NormalFloat record (contiguous groups). ValueError names what the kernels cannot read."""
    if isinstance(base, UniformWeight):
        if base.group_index is not None:
            raise ValueError("group_index is set: the kernels read contiguous groups; reorder the columns first")
        group_size, book = base.in_features // base.groups, None
        scales = base.scales.t().contiguous()
        zeros = None if base.zeros is None else base.zeros_OG().t().contiguous().to(scales.dtype)
    elif isinstance(base, NormalFloatWeight):
        group_size, book = base.block_size, normal_float.code_book(base.bits).to(base.codes.device)
        scales, zeros = base.absmax_OG().t().contiguous(), None
    else:
        raise ValueError(f"base is a {type(base).__name__}: the kernels read UniformWeight and NormalFloatWeight")
    chosen = lanes_for(base.in_features, group_size, base.bits) if lanes is None else lanes
    codes = tile_codes(base.codes_OI(), base.bits, chosen)
    return TiledWeight(codes, scales, zeros, book, base.bits, group_size, base.in_features)
