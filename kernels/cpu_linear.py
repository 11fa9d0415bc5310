"""Binds a prepared weight to the CPU: torch's packed int4 operator with the low-rank term in float32 beside it.

Knows prepared weights and measured choices; not modules.
Legend: M tokens, O out, I in.
"""

import torch
from torch import Tensor

from ..compress.weights import UniformWeight
from . import cpu
from .operators import FrozenProduct, LowRankSegments, Operator, rounded, tensor_bytes
from .prepare import Prepared

NAME = "cpu-int4"


class PackedOperator:
    """y = int4(Q(x / smooth)[columns]) + up·(down·x) + bias; the product by the operator measured fastest for the rows of the call."""

    def __init__(self, prepared: Prepared, weight: cpu.Int4Weight, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        self.columns, self.activations, self.bias = prepared.columns, prepared.activations, prepared.bias
        self.smooth = prepared.smooth
        self.low_rank = LowRankSegments(prepared) if prepared.down is not None else None
        self._by_bucket: dict[int, str] = {}

    def __call__(self, x_MI: Tensor) -> Tensor:
        inner = x_MI if self.smooth is None else x_MI / self.smooth.to(x_MI.dtype)
        if self.activations is not None:
            inner = rounded(inner, self.activations)
        if self.columns is not None:
            inner = inner[:, self.columns]
        product = self._product(x_MI.shape[0])
        if torch.is_grad_enabled() and inner.requires_grad:
            y = FrozenProduct.apply(inner, lambda x: product(x, self.weight), self.weight.dense)
        else:
            y = product(inner, self.weight)
        if self.low_rank is None and self.bias is None:
            return y.to(x_MI.dtype)
        y = y.float()
        if self.low_rank is not None:
            y = self.low_rank.add_(y, x_MI.float())
        return (y if self.bias is None else y + self.bias).to(x_MI.dtype)

    def _product(self, rows: int):
        size = cpu.bucket(rows)
        if size not in self._by_bucket:
            self._by_bucket[size] = cpu.packed_operator(self.weight, rows, self.dtype)["choice"]
        return cpu.PACKED_OPERATORS[self._by_bucket[size]]

    def resident_bytes(self) -> int:
        low_rank = 0 if self.low_rank is None else self.low_rank.resident_bytes()
        return self.weight.resident_bytes() + low_rank + tensor_bytes(self.columns, self.smooth, self.bias)


def operator_for(prepared: Prepared, place: torch.device, dtype: torch.dtype, forced: bool) -> tuple[Operator, str]:
    """(operator, reason). ValueError says why the packed operator cannot hold the weight, or that it loses too much to a dense one."""
    if not isinstance(prepared.base, UniformWeight):
        raise ValueError(f"torch ships no packed operator for a {type(prepared.base).__name__} on the CPU")
    weight = cpu.pack_int4(prepared.base)
    measured = cpu.resident_form(weight, dtype)
    if measured["choice"] != "int4" and not forced:
        raise ValueError(measured["reason"])
    return PackedOperator(prepared, weight, dtype), measured["reason"]


def dense_dtype(shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.dtype, str]:
    """(dtype to keep a dense matrix in, why)."""
    measured = cpu.dense_form(*shape, dtype)
    return (torch.bfloat16 if measured["choice"] == "bfloat16" else torch.float32), measured["reason"]


def availability() -> str:
    """Whether this torch has the packed operator for the CPU, in words."""
    try:
        cpu.pack_int4(UniformWeight.from_codes(torch.zeros(64, 64, dtype=torch.int64), torch.ones(64, 1), None, 4, 64))
    except (RuntimeError, ValueError, AttributeError) as error:
        return f"missing: {error}"
    return f"torch's int4 operator, {torch.backends.cpu.get_cpu_capability()}"
