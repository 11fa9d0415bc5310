"""Stored weights: frozen records of what is on disk, the common language of every folder.

Every record is [O, I] (out, in) whatever the module's own layout. Knows bits and bytes; not how codes were found,
nor where files lie. Effective weight of a record: W = (base ⊙ mask) / smooth + up · down + delta.
Legend: O out, I in, R rank, G groups, N stored values.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from . import normal_float
from .ggml_types import GGML_TYPES, GgmlName, GgmlType
from .packing import pack_codes, pack_mask, unpack_codes, unpack_mask
from .ranges import Width


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
        return _bits(self.weight)


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
        return _bits(self.codes, self.scales, self.zeros, self.group_index)

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
        return _bits(self.codes, self.absmax, self.absmax_codes, self.absmax_scales, self.absmax_offset)


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
        return _bits(self.codes, self.super_scales, self.super_minima, self.small_codes)

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


Base = DenseWeight | UniformWeight | NormalFloatWeight | GgmlWeight
Factor = Tensor | UniformWeight
ACTIVATION_BITS = (4, 8)


@dataclass(frozen=True)
class LowRank:
    """up [O, R] · down [R, I]; each factor a floating tensor or itself on a uniform grid (CALDERA).

    `shared` names the linear that stores this very `down` (GlowQ); it costs nothing here then.
    """

    up: Factor
    down: Factor
    shared: str | None = None

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        up, down = (f.dense(dtype) if isinstance(f, UniformWeight) else f.to(dtype) for f in (self.up, self.down))
        return up, down

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        up, down = self.factors()
        return (up @ down).to(dtype)

    def stored_bits(self) -> int:
        own = (self.up, self.down) if self.shared is None else (self.up,)
        return sum(f.stored_bits() if isinstance(f, UniformWeight) else _bits(f) for f in own)


@dataclass(frozen=True)
class SparseDelta:
    """A few weights moved away from the base: values float [N] at flat positions int32 [N] of the [O, I] matrix."""

    index: Tensor
    values: Tensor

    def add_to_(self, weight_OI: Tensor) -> Tensor:
        weight_OI.view(-1).index_add_(0, self.index.long(), self.values.to(weight_OI))
        return weight_OI

    def stored_bits(self) -> int:
        return _bits(self.index, self.values)


@dataclass(frozen=True)
class ActivationGrid:
    """Dynamic, symmetric quantization of the input, per token per group (W4A8, W4A4); simulated outside the kernels."""

    bits: Literal[4, 8]
    group_size: Width = 64

    def __post_init__(self) -> None:
        if self.bits not in ACTIVATION_BITS or self.group_size < 1:  # of a record as well, which comes from disk
            raise ValueError(
                f"activations of {self.bits} bits in groups of {self.group_size}; choose one of {ACTIVATION_BITS} bits and groups of at least 1"
            )

    def divide(self, in_features: int) -> None:
        """ValueError when the groups do not divide a row."""
        if in_features % self.group_size:
            raise ValueError(
                f"in_features {in_features} is not a multiple of activations.group_size {self.group_size}; choose one that divides it"
            )


@dataclass(frozen=True)
class StoredWeight:
    """Everything stored for one linear except its bias.

    mask uint8 [O, ⌈I/8⌉], bit set where a weight is kept, bounds the base only; smooth float [I] divides the input of the
    base (the low-rank term sees the raw input); activations say how the (smoothed) input of the base is rounded.
    """

    base: Base
    mask: Tensor | None = None
    low_rank: LowRank | None = None
    smooth: Tensor | None = None
    delta: SparseDelta | None = None
    activations: ActivationGrid | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    def mask_OI(self) -> Tensor | None:
        return None if self.mask is None else unpack_mask(self.mask, self.shape[1])

    def with_mask(self, mask_OI: Tensor | None) -> "StoredWeight":
        return replace(self, mask=None if mask_OI is None else pack_mask(mask_OI))

    def base_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What multiplies the smoothed input: base ⊙ mask."""
        weight, mask = self.base.dense(), self.mask_OI()
        return (weight if mask is None else weight.where(mask, 0)).to(dtype)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The effective weight [O, I], computed in float32: what a plain linear needs to do the same (activations apart)."""
        weight = self.base_dense()
        if self.smooth is not None:
            weight = weight / self.smooth.float()
        if self.low_rank is not None:
            weight = weight + self.low_rank.dense()
        if self.delta is not None:
            weight = self.delta.add_to_(weight.clone())
        return weight.to(dtype)

    def stored_bits(self) -> int:
        parts = (self.base, self.low_rank, self.delta)
        return sum(p.stored_bits() for p in parts if p is not None) + _bits(self.mask, self.smooth)

    def bits_per_weight(self) -> float:
        return self.stored_bits() / (self.shape[0] * self.shape[1])

    def sparsity(self) -> float:
        """Share of base weights that the mask removes; 0 without a mask."""
        mask = self.mask_OI()
        return 0.0 if mask is None else 1.0 - mask.float().mean().item()

    def to(self, device: torch.device | str) -> "StoredWeight":
        tensors = {name: tensor.to(device) for name, tensor in to_tensors(self).items()}
        return from_tensors(describe(self), tensors)


RECORDS: Mapping[str, type] = {
    "dense": DenseWeight,
    "uniform": UniformWeight,
    "normal_float": NormalFloatWeight,
    "ggml": GgmlWeight,
    "low_rank": LowRank,
    "delta": SparseDelta,
    "activations": ActivationGrid,
    "stored": StoredWeight,
}
_KINDS = {record: kind for kind, record in RECORDS.items()}


def to_tensors(record: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of a record under a dotted name (`base.codes`, `low_rank.up`, `low_rank.down.scales`, …)."""
    out: dict[str, Tensor] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            out[prefix + field.name] = value
        elif type(value) in _KINDS:
            out |= to_tensors(value, f"{prefix}{field.name}.")
    return out


def describe(record: Any) -> dict[str, object]:
    """JSON description of a record without its tensors; `from_tensors` needs both."""
    out: dict[str, object] = {"kind": _KINDS[type(record)]}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            out[field.name] = "tensor"
        elif type(value) in _KINDS:
            out[field.name] = describe(value)
        elif value is not None:
            out[field.name] = value
    return out


def from_tensors(description: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str = "") -> Any:
    """The inverse of `to_tensors` and `describe`. KeyError names a missing tensor, ValueError an unknown kind."""
    if description.get("kind") not in RECORDS:
        raise ValueError(f"unknown weight record {description.get('kind')!r}; known are {sorted(RECORDS)}")
    record = RECORDS[description["kind"]]
    known = {field.name for field in fields(record)}
    values: dict[str, Any] = {"zeros": None} if record is UniformWeight else {}  # `describe` leaves out what is None
    for name, value in description.items():
        if name == "kind":
            continue
        if name not in known:
            raise ValueError(f"{record.__name__} has no field {name!r}; this artifact is of another version")
        if value == "tensor":
            values[name] = tensors[prefix + name]
        elif isinstance(value, Mapping):
            values[name] = from_tensors(value, tensors, f"{prefix}{name}.")
        else:
            values[name] = value
    return record(**values)


def _bits(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() * 8 for t in tensors if t is not None)
