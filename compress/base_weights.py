"""The four base formats of a weight matrix (dense, uniform, NormalFloat, ggml) without mask, smoothing, low-rank term and delta: `weights`.

Every record is [O, I] (out, in) whatever the module's own layout. Knows bits and bytes; not how codes were chosen, nor where files lie.
Legend: O out, I in, G groups, B blocks of a row, K small codes of a block.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from . import normal_float
from .ggml_types import GGML_TYPES, GgmlName, GgmlType
from .packing import pack_codes, unpack_codes


@dataclass(frozen=True)
class DenseWeight:
    """A floating-point matrix [O, I]."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.weight.to(dtype)

    def stored_bits(self) -> int:
        """A pruned weight is counted by what lies on disk, zeros included."""
        return bits_of(self.weight)


@dataclass(frozen=True)
class UniformWeight:
    """(code − zero)·scale on a grid of 2^bits levels.

    codes int32 [O, ⌈I·bits/32⌉]; scales float [O, G]; zeros: None (symmetric: 2^(bits−1)), int32 [O, ⌈G·bits/32⌉]
    packed like codes, or float [O, G]; group_index int32 [I] names each column's group, None means contiguous groups.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    in_features: int
    group_index: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.in_features

    @property
    def groups(self) -> int:
        return self.scales.shape[1]

    @property
    def symmetric(self) -> bool:
        return self.zeros is None

    @property
    def float_zeros(self) -> bool:
        return self.zeros is not None and self.zeros.is_floating_point()

    def codes_OI(self) -> Tensor:
        """uint8 [O, I]."""
        return unpack_codes(self.codes, self.bits, self.in_features)

    def zeros_OG(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.zeros is None:
            return torch.full_like(self.scales, 1 << (self.bits - 1), dtype=dtype)
        if self.zeros.is_floating_point():
            return self.zeros.to(dtype)
        return unpack_codes(self.zeros, self.bits, self.groups).to(dtype)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Computed in float32 and then rounded to `dtype`."""
        levels, scales, zeros = self.codes_OI().float(), self.scales.float(), self.zeros_OG()
        if self.group_index is not None:
            columns = self.group_index.long()
            return ((levels - zeros[:, columns]) * scales[:, columns]).to(dtype)
        rows = levels.shape[0]
        grouped = levels.view(rows, self.groups, -1)
        return grouped.sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1)).view(rows, -1).to(dtype)

    def stored_bits(self) -> int:
        return bits_of(self.codes, self.scales, self.zeros, self.group_index)

    @classmethod
    def from_codes(
        cls,
        codes_OI: Tensor,
        scales_OG: Tensor,
        zeros_OG: Tensor | None,
        bits: int,
        group_size: int,
        group_index_I: Tensor | None = None,
    ) -> Self:
        """Pack unpacked integer codes; integer-typed zeros are packed, floating ones kept."""
        zeros = zeros_OG
        if zeros is not None and not zeros.is_floating_point():
            zeros = pack_codes(zeros, bits)
        index = None if group_index_I is None else group_index_I.to(torch.int32)
        return cls(pack_codes(codes_OI, bits), scales_OG, zeros, bits, group_size, codes_OI.shape[1], index)


@dataclass(frozen=True)
class NormalFloatWeight:
    """code book[code]·absmax of its block (arXiv:2305.14314); blocks of `block_size` run along a row.

    codes int32 [O, ⌈I·bits/32⌉]; absmax float32 [O, G], or, double-quantized in blocks of 256 over the flattened
    absmax: absmax_codes uint8 [O, G], absmax_scales float32 [⌈O·G/256⌉], absmax_offset float32 [1].
    """

    codes: Tensor
    bits: int
    block_size: int
    in_features: int
    absmax: Tensor | None = None
    absmax_codes: Tensor | None = None
    absmax_scales: Tensor | None = None
    absmax_offset: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.in_features

    @property
    def groups(self) -> int:
        return self.in_features // self.block_size

    def codes_OI(self) -> Tensor:
        return unpack_codes(self.codes, self.bits, self.in_features)

    def absmax_OG(self) -> Tensor:
        if self.absmax is not None:
            return self.absmax.float()
        assert self.absmax_codes is not None and self.absmax_scales is not None and self.absmax_offset is not None
        return normal_float.dequantize_absmax(self.absmax_codes, self.absmax_scales, self.absmax_offset)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        book = normal_float.code_book(self.bits).to(self.codes.device)
        values = book[self.codes_OI().int()].view(self.shape[0], self.groups, self.block_size)
        return values.mul_(self.absmax_OG().unsqueeze(-1)).view(self.shape).to(dtype)

    def stored_bits(self) -> int:
        return bits_of(self.codes, self.absmax, self.absmax_codes, self.absmax_scales, self.absmax_offset)


@dataclass(frozen=True)
class GgmlWeight:
    """A block type of ggml, bits as many as in a GGUF file: d·s·(code − zero) − m·t, see `ggml_types`.

    codes int32 [O, I·bits/32]; super_scales (d) and super_minima (m, with minima) float16 [O, B]; small_codes int32 [O, B·words], packed,
    of every super-block the s of its groups and behind them the t, absent in the legacy types, whose s and t are 1.
    """

    codes: Tensor
    super_scales: Tensor
    type: GgmlName
    in_features: int
    super_minima: Tensor | None = None
    small_codes: Tensor | None = None

    @property
    def layout(self) -> GgmlType:
        return GGML_TYPES[self.type]

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.in_features

    @property
    def bits(self) -> int:
        return self.layout.bits

    @property
    def group_size(self) -> int:
        return self.layout.group_size

    @property
    def groups(self) -> int:
        return self.in_features // self.layout.group_size

    @property
    def symmetric(self) -> bool:
        return not self.layout.minima

    def codes_OI(self) -> Tensor:
        """uint8 [O, I]."""
        return unpack_codes(self.codes, self.bits, self.in_features)

    def small_codes_OG(self) -> tuple[Tensor, Tensor | None]:
        """(s, t) float32 [O, G], whole numbers, s signed where there are no minima; t None there."""
        rows, layout = self.shape[0], self.layout
        one = torch.ones(rows, self.groups, device=self.codes.device)
        if self.small_codes is None:
            return one, one if layout.minima else None
        small = unpack_codes(self.small_codes, layout.scale_bits, self.super_scales.shape[1] * layout.small_codes)
        small_OBK = small.float().view(rows, -1, layout.small_codes) - layout.scale_zero
        parts = [part.reshape(rows, -1) for part in small_OBK.split(layout.groups, -1)]
        return parts[0], parts[1] if layout.minima else None

    def spread(self, supers_OB: Tensor) -> Tensor:
        """A number per super-block → one per group, [O, G]."""
        return supers_OB.repeat_interleave(self.layout.groups, dim=1)

    def scales_OG(self) -> Tensor:
        """d·s float32 [O, G]; may be negative or 0."""
        return self.spread(self.super_scales.float()) * self.small_codes_OG()[0]

    def minima_OG(self) -> Tensor | None:
        """m·t float32 [O, G]; None where 0 is on the grid."""
        minima = self.small_codes_OG()[1]
        return None if minima is None or self.super_minima is None else self.spread(self.super_minima.float()) * minima

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """In float32 as `gguf.quants.dequantize` computes it, bit for bit, and then rounded to `dtype`."""
        return self.values(self.codes_OI().float()).to(dtype)

    def uniform(self) -> "UniformWeight":
        """The same values, but for the rounding of float32, on a uniform grid with float32 scales and zero points: what a program that knows
        no super-blocks can read. A group of scale 0 is flat: code 0 of a grid as wide as its minimum."""
        scales, minima, codes = self.scales_OG(), self.minima_OG(), self.codes
        if minima is None:
            return UniformWeight(codes, scales, None, self.bits, self.group_size, self.in_features)
        flat = scales == 0
        if bool(flat.any()):
            columns = flat.repeat_interleave(self.group_size, dim=1)
            codes = pack_codes(self.codes_OI().where(~columns, 0), self.bits)
        zeros, scales = (minima / scales).where(~flat, 1.0), scales.where(~flat, minima)
        return UniformWeight(codes, scales, zeros, self.bits, self.group_size, self.in_features)

    def values(self, codes_OI: Tensor) -> Tensor:
        """What float32 codes [O, I] stand for."""
        minima = self.minima_OG()
        grouped = (codes_OI.view(self.shape[0], self.groups, -1) - self.layout.zero).mul_(self.scales_OG().unsqueeze(-1))
        return (grouped if minima is None else grouped.sub_(minima.unsqueeze(-1))).view(self.shape)

    def stored_bits(self) -> int:
        return bits_of(self.codes, self.super_scales, self.super_minima, self.small_codes)

    @classmethod
    def from_codes(
        cls, codes_OI: Tensor, super_scales_OB: Tensor, super_minima_OB: Tensor | None, small_OBK: Tensor | None, type: GgmlName
    ) -> Self:
        """Pack unpacked codes; `small` as stored, unsigned: each super-block's s, then its t. ValueError where a shape is not the type's."""
        layout, (rows, columns) = GGML_TYPES[type], codes_OI.shape
        blocks, small = columns // layout.columns, None
        shapes = {"super_scales": super_scales_OB, "super_minima": super_minima_OB, "small codes": small_OBK}
        wanted: dict[str, tuple[int, ...] | None] = {
            "super_scales": (rows, blocks),
            "super_minima": (rows, blocks) if layout.minima else None,
            "small codes": (rows, blocks, layout.small_codes) if layout.small_codes else None,
        }
        held = {name: None if value is None else tuple(value.shape) for name, value in shapes.items()}
        if columns % layout.columns or held != wanted:
            raise ValueError(f"{type} of {rows} × {columns}: needs {wanted} and columns in multiples of {layout.columns}, got {held}")
        if small_OBK is not None:
            small = pack_codes(small_OBK.reshape(rows, -1), layout.scale_bits)
        minima = None if super_minima_OB is None else super_minima_OB.half()
        return cls(pack_codes(codes_OI, layout.bits), super_scales_OB.half(), type, columns, minima, small)


def bits_of(*tensors: Tensor | None) -> int:
    """What the tensors that are there take, in bits."""
    return sum(t.numel() * t.element_size() * 8 for t in tensors if t is not None)
