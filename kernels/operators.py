"""What a bound linear calls: x [M, I] → y [M, O] in x's dtype. Here those made of ordinary torch: dense, and the reference.

Knows records and tensors; not devices' special operators.
Legend: M tokens, O out, I in, R rank.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compress.weights import ActivationGrid, DenseWeight, StoredWeight, to_tensors
from .prepare import Prepared, Segment
from .reference import dequantize_activations, quantize_activations


class Operator(Protocol):
    def __call__(self, x_MI: Tensor) -> Tensor: ...

    def tensors(self) -> list[Tensor]:
        """Everything that stays in memory between calls."""
        ...


class ReferenceOperator:
    """A stored weight by its definition, dequantized at every call, in float32: base·Q(x / smooth) + up·(down·x) + delta·x + bias."""

    def __init__(self, stored: StoredWeight, bias: Tensor | None) -> None:
        self.stored, self.bias = stored, bias

    def __call__(self, x_MI: Tensor) -> Tensor:
        raw, stored = x_MI.float(), self.stored
        inner = raw if stored.smooth is None else raw / stored.smooth.float()
        y = F.linear(rounded(inner, stored.activations), stored.base_dense())
        if stored.low_rank is not None:
            up, down = stored.low_rank.factors()
            y = y + F.linear(F.linear(raw, down), up)
        if stored.delta is not None:
            y = y + F.linear(raw, stored.delta.add_to_(torch.zeros(stored.shape, device=raw.device)))
        return (y if self.bias is None else y + self.bias.float()).to(x_MI.dtype)

    def tensors(self) -> list[Tensor]:
        return present(self.bias, *to_tensors(self.stored).values())


class DenseOperator:
    """A matrix [O, I] in `form` and torch's matmul; the low-rank term is added into it unless the base's input is rounded."""

    def __init__(self, prepared: Prepared, form: torch.dtype) -> None:
        weight = effective_base(prepared)
        self.activations, self.smooth, self.low_rank = prepared.activations, None, None
        if prepared.activations is None:
            if prepared.smooth is not None:
                weight = weight / prepared.smooth.float()
            for segment, up in zip(prepared.segments, prepared.ups, strict=True):
                if up is not None and prepared.down is not None:
                    down = prepared.down[segment.rank : segment.rank + segment.ranks]
                    weight[segment.row : segment.row + segment.rows] += up.float() @ down.float()
        else:
            self.smooth, self.low_rank = prepared.smooth, LowRankSegments(prepared)
        self.weight = weight.to(form)
        self.bias = None if prepared.bias is None else prepared.bias.to(form)

    def __call__(self, x_MI: Tensor) -> Tensor:
        inner = x_MI if self.smooth is None else x_MI / self.smooth.to(x_MI.dtype)
        y = F.linear(rounded(inner, self.activations).to(self.weight.dtype), self.weight, self.bias)
        if self.low_rank is not None:
            y = self.low_rank.add_(y.float(), x_MI.float())
        return y.to(x_MI.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """[N, I] of rows ids int64 [N], in the matrix's dtype."""
        return self.weight[ids]

    def tensors(self) -> list[Tensor]:
        return present(self.weight, self.bias, self.smooth, *(self.low_rank.tensors() if self.low_rank else ()))


class LowRankSegments:
    """y[:, rows of a segment] += (x·downᵀ)[:, its ranks]·upᵀ, in float32; the factors are kept in the dtype they are stored in."""

    def __init__(self, prepared: Prepared) -> None:
        self.down = prepared.down
        self.ups: list[tuple[Segment, Tensor]] = []
        for segment, up in zip(prepared.segments, prepared.ups, strict=True):
            if up is not None:
                self.ups.append((segment, up.t().contiguous()))  # [R, O]: twice as fast as [O, R] for one row of a float32 product
        self.whole = len(prepared.segments) == 1

    def add_(self, y_MO: Tensor, x_MI: Tensor) -> Tensor:
        if self.down is None:
            return y_MO
        h_MR = F.linear(x_MI, self.down.float())
        if self.whole:
            return torch.addmm(y_MO, h_MR, self.ups[0][1].float())
        for segment, up_RO in self.ups:
            h = h_MR[:, segment.rank : segment.rank + segment.ranks]
            y_MO[:, segment.row : segment.row + segment.rows].addmm_(h, up_RO.float())
        return y_MO

    def tensors(self) -> list[Tensor]:
        return present(self.down, *(up for _, up in self.ups))


class FrozenProduct(torch.autograd.Function):
    """x·Wᵀ by a packed operator, with a gradient for x alone: grad·W, dequantized on the fly in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, product: Callable[[Tensor], Tensor], dense: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.dense, ctx.dtype = dense, x_MI.dtype
        return product(x_MI)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_MO,) = grads
        return (grad_MO.float() @ ctx.dense(torch.float32)).to(ctx.dtype), None, None


def effective_base(prepared: Prepared) -> Tensor:
    """float32 [O, I] in the order of x's columns."""
    weight = prepared.base.dense()
    if prepared.columns is not None:
        weight = torch.empty_like(weight).index_copy_(1, prepared.columns, weight)
    return weight.clone() if isinstance(prepared.base, DenseWeight) else weight


def rounded(x_MI: Tensor, activations: ActivationGrid | None) -> Tensor:
    """x through its dynamic grid, in float32, or as it is."""
    if activations is None:
        return x_MI
    codes, scales = quantize_activations(x_MI, activations.bits, activations.group_size)
    return dequantize_activations(codes, scales, activations.group_size)


def present(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind the tensors, memory that several share counted once."""
    storages = {(t.device, t.untyped_storage().data_ptr()): t.untyped_storage().nbytes() for t in tensors if t.device.type != "meta"}
    return sum(storages.values())
