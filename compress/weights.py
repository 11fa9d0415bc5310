"""Stored weights: frozen records of what is on disk, the common language of every folder.

Every record is [O, I] (out, in) whatever the module's own layout. Knows bits and bytes; not how codes were chosen,
nor where files lie. Effective weight of a record: W = (base ⊙ mask) / smooth + up · down + delta.
Legend: O out, I in, R rank, G groups, N stored values.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .base_weights import DenseWeight, GgmlWeight, NormalFloatWeight, UniformWeight, bits_of
from .packing import pack_mask, unpack_mask
from .ranges import Group

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
        return sum(f.stored_bits() if isinstance(f, UniformWeight) else bits_of(f) for f in own)


@dataclass(frozen=True)
class SparseDelta:
    """A few weights moved away from the base: values float [N] at flat positions int32 [N] of the [O, I] matrix."""

    index: Tensor
    values: Tensor

    def add_to_(self, weight_OI: Tensor) -> Tensor:
        weight_OI.view(-1).index_add_(0, self.index.long(), self.values.to(weight_OI))
        return weight_OI

    def stored_bits(self) -> int:
        return bits_of(self.index, self.values)


@dataclass(frozen=True)
class ActivationGrid:
    """Dynamic, symmetric quantization of the input, per token per group (W4A8, W4A4), −1: one scale a token; simulated outside the kernels."""

    bits: Literal[4, 8]
    group_size: Group = 64

    def __post_init__(self) -> None:
        if self.bits not in ACTIVATION_BITS or (self.group_size < 1 and self.group_size != -1):  # of a record as well, which comes from disk
            raise ValueError(
                f"activations of {self.bits} bits in groups of {self.group_size}; choose one of {ACTIVATION_BITS} bits and groups of at "
                "least 1, or -1 for one scale a token"
            )

    def divide(self, in_features: int) -> None:
        """ValueError when the groups do not divide a row."""
        if self.group_size != -1 and in_features % self.group_size:
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
        return sum(p.stored_bits() for p in parts if p is not None) + bits_of(self.mask, self.smooth)

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
