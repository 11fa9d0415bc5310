"""Codes in the order the Triton kernels read them: repacked once, when a weight is bound.

A row is cut into tiles of SLOTS·LANES inputs. The 16-bit field `lane` of a tile holds the codes of inputs lane, lane + LANES,
lane + 2·LANES, … (low bits first): one contiguous load gives SLOTS fragments of LANES consecutive inputs each, a shift and a
mask of a 32-bit word yield two neighbours where a matrix instruction wants them, and a fragment never leaves its group, so
that its scale is one number per row. At 3 bits five codes share a field (3.2 bits), at 5 three (5.3), at 6 two (8).
Knows codes and scales; not masks, low-rank terms or devices.
Legend: O out, I in, G groups, T tiles, L lanes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..compress import normal_float
from ..compress.integer_scales import exact_levels, reach
from ..compress.weights import Base, NormalFloatWeight, UniformWeight
from . import torch_int4

SLOTS = {2: 8, 3: 5, 4: 4, 5: 3, 6: 2, 8: 2}
LANES = (64, 32, 16)
# A segment (row, rows, rank, ranks): outputs [row, row + rows) read h[:, rank : rank + ranks].
Segments = Sequence[tuple[int, int, int, int]]


@dataclass(frozen=True)
class TiledWeight:
    """codes int32 [O, T, L/2], two fields a word; scales floating [G, O]; zeros floating [G, O], or None: 2^(bits−1) for a uniform
    grid; book float32 [2^bits] or None. Weight = (code − zero)·scale, or book[code]·scale. Inputs past `in_features` are padding."""

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
        return self.codes.shape[2] * 2

    @property
    def tiles(self) -> int:
        return self.codes.shape[1]

    @property
    def tile_size(self) -> int:
        """Inputs of one tile."""
        return SLOTS[self.bits] * self.lanes

    @cached_property
    def integer_zeros(self) -> bool:
        return self.zeros is None or bool((self.zeros == self.zeros.round()).all())

    @cached_property
    def exact_zeros(self) -> bool:
        """Whether code − zero is exact in 8 bits of mantissa."""
        if self.zeros is None or not self.integer_zeros:
            return self.zeros is None
        return bool(((self.zeros >= 0) & (self.zeros <= 1 << self.bits)).all())

    @cached_property
    def two_levels(self) -> tuple[Tensor, Tensor] | None:
        """(k int8 [G, O], c float32 [O]) where the scales are exactly c·k and (code − zero)·k lies within a signed byte; None elsewhere."""
        if self.book is not None or self.bits > 4 or not self.integer_zeros:
            return None
        zeros_OG = torch.full_like(self.scales, 1 << (self.bits - 1)).t() if self.zeros is None else self.zeros.t()
        levels = exact_levels(self.scales.t(), reach(self.codes_OI(), zeros_OG, self.group_size))
        return None if levels is None else (levels[0].t().contiguous(), levels[1])

    @cached_property
    def int4_refusal(self) -> str:
        """Why torch's own operator cannot carry it, or nothing."""
        if self.book is not None or self.bits != 4:
            return "no uniform grid of 4 bits"
        some = torch.arange(0, self.shape[0], max(1, self.shape[0] // 1024), device=self.device)  # of more, the widened matrices take gigabytes
        rows = self.rows(some)
        return torch_int4.refusal(self.shape, rows.codes_OI(), rows.scales, rows.zeros, self.group_size)

    @cached_property
    def int4(self) -> tuple[Tensor, Tensor]:
        """Once more, as torch's own operator reads it: made when that one is measured, kept where it is chosen."""
        return torch_int4.pack(self.codes_OI(), self.scales, self.zeros)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def codes_OI(self) -> Tensor:
        """uint8 [O, I]: the plain order again."""
        fields = torch.stack((self.codes & 0xFFFF, (self.codes >> 16) & 0xFFFF), dim=-1).flatten(2)
        slots = [(fields >> (self.bits * s)) & ((1 << self.bits) - 1) for s in range(SLOTS[self.bits])]
        return torch.stack(slots, dim=2).flatten(1)[:, : self.in_features].to(torch.uint8)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[O, I], computed in float32 (or in float64, if `dtype` is) and rounded once."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        group = torch.arange(self.in_features, device=self.device) // self.group_size
        scales = self.scales.to(compute).t()[:, group]
        if self.book is not None:
            return (self.book.to(compute)[self.codes_OI().int()] * scales).to(dtype)
        zeros = float(1 << (self.bits - 1)) if self.zeros is None else self.zeros.to(compute).t()[:, group]
        return ((self.codes_OI().to(compute) - zeros) * scales).to(dtype)

    def rows(self, ids: Tensor) -> "TiledWeight":
        """The weight of those outputs, ids int64 [N]."""
        zeros = None if self.zeros is None else self.zeros[:, ids]
        return replace(self, codes=self.codes[ids], scales=self.scales[:, ids], zeros=zeros)

    def tensors(self) -> list[Tensor]:
        made = (*self.__dict__.get("int4", ()), *(self.__dict__.get("two_levels") or ()))
        return [t for t in (self.codes, self.scales, self.zeros, self.book, *made) if t is not None]

    def resident_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def to(self, device: torch.device | str) -> "TiledWeight":
        moved = {k: None if (t := getattr(self, k)) is None else t.to(device) for k in ("codes", "scales", "zeros", "book")}
        return replace(self, **moved)


def lanes_for(in_features: int, group_size: int, bits: int) -> int:
    """The widest fragment that stays inside a group and pads a row by at most an eighth.

    ValueError when a group holds no whole number of 16 inputs, unless one group spans the row."""
    whole = [n for n in LANES if group_size % n == 0 or group_size >= in_features]
    if not whole:
        raise ValueError(f"group_size {group_size} is not a multiple of 16, which the kernels need; choose 16, 32, 64, 128 or -1")
    for lanes in whole:
        if -in_features % (lanes * SLOTS[bits]) <= in_features // 8:
            return lanes
    return whole[-1]


def tile_codes(codes_OI: Tensor, bits: int, lanes: int) -> Tensor:
    """int32 [O, T, L/2] from codes [O, I]; padding is code 0."""
    slots = SLOTS[bits]
    padded = torch.nn.functional.pad(codes_OI.int(), (0, -codes_OI.shape[1] % (slots * lanes)))
    by_slot = padded.view(codes_OI.shape[0], -1, slots, lanes)
    fields = torch.zeros_like(by_slot[:, :, 0])
    for slot in range(slots):
        fields |= by_slot[:, :, slot] << (bits * slot)
    return (fields[:, :, 0::2] | (fields[:, :, 1::2] << 16)).contiguous()


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
