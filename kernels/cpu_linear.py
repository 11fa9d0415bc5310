"""Binds a prepared weight to the CPU: a packed form plus the low-rank term in float32.

Knows prepared weights and measured choices; not modules.
Legend: M tokens, O out, I in.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..compress.weights import ActivationGrid, DenseWeight, UniformWeight
from . import cpu
from .cpu_int4 import pack_int4
from .cpu_wide import HalfWeight, pack_bytes
from .operators import DenseOperator, FrozenProduct, LowRankSegments, Operator, present, rounded
from .prepare import Prepared

NAMES = ("cpu-int4", "cpu-int8")


@dataclass
class PackedOperator:
    """y = packed(Q(x / smooth)[columns]) + up·(down·x) + bias; the product by the way measured fastest for the rows of the call."""

    weight: cpu.PackedWeight
    dtype: torch.dtype
    columns: Tensor | None = None
    smooth: Tensor | None = None
    activations: ActivationGrid | None = None
    low_rank: LowRankSegments | None = None
    bias: Tensor | None = None
    _by_rows: dict[int, cpu.Product] = field(default_factory=dict)

    def __call__(self, x_MI: Tensor) -> Tensor:
        """Few operations around the product, since a token passes four of these in every block."""
        inner = x_MI if self.smooth is None else x_MI / self.smooth.to(x_MI.dtype)
        if self.activations is not None:
            inner = rounded(inner, self.activations)
        if self.columns is not None:
            inner = inner[:, self.columns]
        product = self._by_rows.get(x_MI.shape[0]) or self._product(x_MI.shape[0])
        trains = inner.requires_grad and torch.is_grad_enabled()
        y = FrozenProduct.apply(inner, product, self.weight.dense) if trains else product(inner)
        if self.low_rank is not None:
            y = self.low_rank.add_(y.float(), x_MI.float())
        if self.bias is not None:
            y = y.float() + self.bias
        return y.to(x_MI.dtype)

    def _product(self, rows: int) -> cpu.Product:
        """The way measured fastest for the bucket that so many rows fall into."""
        choice = cpu.product_for(self.weight, rows, self.dtype)["choice"]
        self._by_rows[rows] = self.weight.products(cpu.half_pays, cpu.bucket(rows))[choice]
        return self._by_rows[rows]

    def rows(self, ids: Tensor) -> Tensor:
        return self.weight.rows(ids)

    def tensors(self) -> list[Tensor]:
        return present(*self.weight.tensors(), self.columns, self.smooth, self.bias, *(self.low_rank.tensors() if self.low_rank else ()))


def operator_for(prepared: Prepared, place: torch.device, dtype: torch.dtype, wanted: str) -> tuple[Operator, str, str]:
    """(operator, backend, reason). `wanted`: one of NAMES, or "auto". ValueError says why the weight cannot be packed, or that packing
    loses too much to a dense one."""
    if not isinstance(prepared.base, UniformWeight):
        raise ValueError(f"torch ships no packed operator for a {type(prepared.base).__name__} on the CPU")
    as_bytes = wanted == "cpu-int8" or (wanted == "auto" and prepared.base.bits > 4)
    weight = pack_bytes(prepared.base) if as_bytes else pack_int4(prepared.base)
    measured = cpu.resident_form(weight, dtype) if wanted == "auto" else {"choice": "packed", "reason": "requested"}
    if measured["choice"] != "packed":
        raise ValueError(measured["reason"])
    low_rank = LowRankSegments(prepared) if prepared.down is not None else None
    operator = PackedOperator(weight, dtype, prepared.columns, prepared.smooth, prepared.activations, low_rank, prepared.bias)
    return operator, NAMES[as_bytes], measured["reason"]


def dense_operator(prepared: Prepared, dtype: torch.dtype) -> tuple[Operator, str]:
    """(operator, why in this form): a matrix in 16 bits, or in float32 where that is much faster. A matrix stored in 16 bits keeps its
    type; one that was computed takes the model's, or float16 (three bits more than bfloat16) where nothing in it is out of range."""
    dense = DenseOperator(prepared, torch.float32)
    stored = prepared.base.weight.dtype if isinstance(prepared.base, DenseWeight) and prepared.down is None else torch.float32
    halves = [form for form in (stored, dtype) if form.itemsize == 2]
    in_range = float(dense.weight.abs().max()) < torch.finfo(torch.float16).max if dense.weight.numel() else True
    half = halves[0] if halves else torch.float16 if in_range else torch.bfloat16
    measured = cpu.dense_form(*prepared.shape, half, dtype)
    if measured["choice"] == "float32":
        return dense, measured["reason"]
    kept = HalfWeight(dense.weight.to(half))
    return PackedOperator(kept, dtype, None, dense.smooth, dense.activations, dense.low_rank, dense.bias), measured["reason"]


def availability() -> str:
    """Whether this torch has the packed operator for the CPU, in words."""
    try:
        pack_int4(UniformWeight.from_codes(torch.zeros(64, 64, dtype=torch.int64), torch.ones(64, 1), None, 4, 64))
    except (RuntimeError, ValueError, AttributeError) as error:
        return f"missing: {error}"
    return f"torch's int4 operator, {torch.backends.cpu.get_cpu_capability()}"
