"""The benchmark's variants: synthetic weights of real sizes, every operator that multiplies with one, and the check each has to pass.

Knows records and operators; not how time is measured.
Legend: M rows of activations, O out, I in, R rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compress.integer_scales import with_integer_scales
from ..compress.weights import ActivationGrid, LowRank, StoredWeight, UniformWeight
from .layout import tile
from .linear import bind, bind_group
from .operators import ReferenceOperator

CHECKED_ROWS = 16
# One variant of an operator: x [M, I] → y [M, O], and the bytes it keeps.
Variant = tuple[Callable[[Tensor], Tensor], int]


@dataclass(frozen=True)
class Layer:
    """A linear of a model of this size; `group_size` inputs share a scale."""

    model: str
    out: int
    inputs: int
    group_size: int = 64


DEMO = (Layer("demo", 576, 576), Layer("demo", 192, 576), Layer("demo", 1536, 576), Layer("demo", 576, 1536))


def synthetic(layer: Layer, bits: int, rank: int, activation_bits: int | None, place: torch.device, two_levels: bool = False) -> StoredWeight:
    """Random codes, scales and factors of a size that real layers have; the same on every machine. `two_levels`: scales are whole numbers times
    one float an output, and an input has one scale a token."""
    base, random = _base(layer, bits), torch.Generator().manual_seed(layer.out * 31 + layer.inputs + 1)
    low_rank = None
    if rank:
        up = torch.randn(layer.out, rank, generator=random) / rank**0.5 / 4
        low_rank = LowRank(up.bfloat16(), (torch.randn(rank, layer.inputs, generator=random) / layer.inputs**0.5).bfloat16())
    activations = None if activation_bits is None else ActivationGrid(cast(Literal[4, 8], activation_bits), -1 if two_levels else 64)
    stored = StoredWeight(base, low_rank=low_rank, activations=activations).to(place)
    return replace(stored, base=with_integer_scales(cast(UniformWeight, stored.base))) if two_levels else stored


@lru_cache(maxsize=1)
def _base(layer: Layer, bits: int) -> UniformWeight:
    """The same for each of a layer's ranks, which follow each other in a benchmark: large ones take seconds to draw."""
    random = torch.Generator().manual_seed(layer.out * 31 + layer.inputs)
    groups = layer.inputs // layer.group_size
    codes = torch.randint(0, 1 << bits, (layer.out, layer.inputs), generator=random)
    zeros = torch.randint(1, 1 << bits, (layer.out, groups), generator=random)
    scales = (torch.rand(layer.out, groups, generator=random) + 0.5) / (1 << (bits - 1)) / layer.inputs**0.5
    return UniformWeight.from_codes(codes, scales.half(), zeros, bits, layer.group_size)


def variants(stored: StoredWeight, place: torch.device) -> dict[str, Variant]:
    """Every way to multiply with a weight that the table compares, each with weights of its own in memory."""
    plain = replace(stored, low_rank=None)
    dense, packed = stored.dense(torch.bfloat16), bind(plain, device=place, dtype=torch.bfloat16)
    base = plain.base
    result: dict[str, Variant] = {}
    if stored.activations is None:
        result["torch bfloat16"] = (lambda x: F.linear(x, dense)), size_of(dense)
        if place.type == "cpu":
            wide = dense.float()
            result["torch float32"] = (lambda x: F.linear(x.float(), wide).to(x.dtype)), size_of(wide)
    assert isinstance(base, UniformWeight)
    if stored.activations is None and stored.low_rank is None:
        tiled = tile(base)
        form = torch.float32 if place.type == "cpu" else torch.bfloat16
        result["dequantize then matmul"] = (lambda x: _multiply_dense(x, tiled.dense(form))), tiled.resident_bytes()
    if stored.low_rank is None:
        return result | {f"{packed.backend} without rank": (packed, packed.resident_bytes())}
    up, down = stored.low_rank.factors(torch.bfloat16)
    fused = bind(stored, device=place, dtype=torch.bfloat16)
    if stored.activations is None:
        base_only = plain.dense(torch.bfloat16)
        kept = size_of(base_only) + size_of(up) + size_of(down)
        result["torch bfloat16, unfused rank"] = (lambda x: F.linear(x, base_only) + _multiply_dense(_multiply_dense(x, down), up)), kept
    kept = packed.resident_bytes() + size_of(up) + size_of(down)
    result["unfused rank"] = (lambda x: packed(x) + _multiply_dense(_multiply_dense(x, down), up)), kept
    return result | {f"{fused.backend} fused": (fused, fused.resident_bytes())}


def _multiply_dense(x: Tensor, weight: Tensor) -> Tensor:
    """In x's type on a card; on a CPU in float32, which is never much slower there and often a hundred times faster."""
    return F.linear(x.float(), weight.float()).to(x.dtype) if x.device.type == "cpu" else F.linear(x, weight.to(x.dtype))


def check(stored: StoredWeight, call: Callable[[Tensor], Tensor], x: Tensor, slack: float) -> tuple[float, float]:
    """(relative error against the definition in float32, what is allowed): slack × torch's own error in bfloat16. All of x is
    multiplied, since its rows decide which code runs, and the first few are compared.

    Rounding to bfloat16 and then to a grid may move a code by one, so a rounded input is allowed half a step of 8 bits more."""
    seen = x[:CHECKED_ROWS]
    truth = ReferenceOperator(stored, None)(seen.float())
    eager = F.linear(seen, stored.dense(torch.bfloat16)) if stored.activations is None else truth.to(torch.bfloat16)
    extra = 0.0 if stored.activations is None else 0.5 / 127
    with torch.inference_mode():
        return _relative(call(x)[:CHECKED_ROWS], truth), slack * _relative(eager, truth) + extra


def site(weights: list[StoredWeight], variant: str, dtype: torch.dtype, place: torch.device) -> tuple[Callable[[Tensor], Any], int, int]:
    """(call, bytes kept, width of its input) of linears that read one x: `variant` "fused", or dense matrices of `dtype`."""
    width = weights[0].shape[1]
    if variant == "fused":
        group = bind_group([(weight, None) for weight in weights], device=place)
        return group, group.resident_bytes(), width
    matrices = [weight.dense(dtype) for weight in weights]
    return lambda x: [F.linear(x, matrix) for matrix in matrices], sum(size_of(m) for m in matrices), width


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _relative(value: Tensor, truth: Tensor) -> float:
    return ((value.float() - truth.float()).norm() / truth.float().norm()).item()
