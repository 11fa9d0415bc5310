"""Operators that a bound linear calls, x [M, I] → y [M, O] in x's dtype; here those in ordinary torch: dense, and the reference.

Knows records and tensors; not devices' special operators.
Legend: M tokens, O out, I in, R rank.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compress.activation_grid import dequantize_activations, quantize_activations
from ..compress.weights import ActivationGrid, DenseWeight, StoredWeight, to_tensors
from .prepare import Prepared

MOST_BLOCKS = 16  # beyond these, a batch of small products costs more than the segments one by one


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
    """y[:, rows of a segment] += (x·downᵀ)[:, its ranks]·upᵀ, in float32; the factors are kept in the dtype they are stored in.

    A token's time is the number of its operations. So segments of equal ranks are kept as blocks of as many rows as divide all of
    them, and one row of x meets them in one batched product; and all factors lie in one piece of memory, widened at once."""

    def __init__(self, prepared: Prepared) -> None:
        self.down = prepared.down
        pairs = [(segment, up) for segment, up in zip(prepared.segments, prepared.ups, strict=True) if up is not None]
        self.segments = [segment for segment, _ in pairs]
        # [R, O]: twice as fast as [O, R] for one row of a float32 product
        self.ups = [up.t().contiguous() for _, up in pairs]
        self.factors: Tensor | None = None  # down, then blocks [B, R, rows of a block]
        self.owners: Tensor | None = None  # int64 [B]: which R of h's ranks each reads, where that is neither all nor its own
        if self.down is not None and len(pairs) == len(prepared.segments) and len({(u.shape[0], u.dtype) for u in self.ups}) == 1:
            self._in_blocks(self.down)

    def _in_blocks(self, down_RI: Tensor) -> None:
        rows, ranks = math.gcd(*(segment.rows for segment in self.segments)), self.segments[0].ranks
        counts = [segment.rows // rows for segment in self.segments]
        if sum(counts) > MOST_BLOCKS or self.ups[0].dtype != down_RI.dtype:
            return
        blocks = torch.cat([up.view(ranks, -1, rows).transpose(0, 1) for up in self.ups])
        owners = [segment.rank // ranks for segment, count in zip(self.segments, counts, strict=True) for _ in range(count)]
        if down_RI.shape[0] > ranks and owners != list(range(down_RI.shape[0] // ranks)):
            self.owners = torch.tensor(owners, device=down_RI.device)
        self.factors = torch.cat((down_RI.flatten(), blocks.flatten()))
        self.down, blocks = self._parts(self.factors, blocks.shape)
        ends = torch.tensor(counts).cumsum(0).tolist()
        self.ups = [blocks[end - count : end] for end, count in zip(ends, counts, strict=True)]
        self.shape = blocks.shape

    def _parts(self, factors: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """(down [R, I], blocks) as views."""
        assert self.down is not None
        ranks, inputs = self.down.shape
        _, inner, rows = shape
        return factors.as_strided((ranks, inputs), (inputs, 1)), factors.as_strided(shape, (inner * rows, rows, 1), ranks * inputs)

    def add_(self, y_MO: Tensor, x_MI: Tensor) -> Tensor:
        if self.down is None:
            return y_MO
        if self.factors is not None and x_MI.shape[0] == 1:
            return self._add_to_one(self.factors, y_MO, x_MI)
        h_MR = F.linear(x_MI, self.down.float())
        for segment, up in zip(self.segments, self.ups, strict=True):
            h = h_MR[:, segment.rank : segment.rank + segment.ranks]
            up_RO = up if self.factors is None else up.transpose(0, 1).reshape(segment.ranks, -1)
            y_MO[:, segment.row : segment.row + segment.rows].addmm_(h, up_RO.float())
        return y_MO

    def _add_to_one(self, factors: Tensor, y_1O: Tensor, x_1I: Tensor) -> Tensor:
        down, blocks = self._parts(factors.float(), self.shape)
        h_1R, (count, ranks, rows) = F.linear(x_1I, down), self.shape
        if count == 1:
            return torch.addmm(y_1O, h_1R, blocks[0])
        h = h_1R.view(-1, 1, ranks)
        h = h.expand(count, 1, ranks) if self.owners is None else h.index_select(0, self.owners)
        return torch.baddbmm(y_1O.view(count, 1, rows), h, blocks).view(1, -1)

    def tensors(self) -> list[Tensor]:
        return present(self.down, *self.ups, self.owners)


class FrozenProduct(torch.autograd.Function):
    """x·Wᵀ by a packed operator, with a gradient for x alone: grad·W, dequantized on the fly in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, product: Callable[[Tensor], Tensor], dense: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.dense, ctx.dtype = dense, x_MI.dtype
        y_MO = product(x_MI)
        return y_MO.clone() if y_MO._is_view() else y_MO  # a low-rank term is added to it in place, which autograd forbids for a view

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
