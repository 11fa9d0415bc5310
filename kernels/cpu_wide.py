"""Weights that stay in 8 or 16 bits on the CPU and are multiplied in float32, a chunk of rows at a time.

What memory has to deliver is the narrow form; a chunk is widened in a scratch that the cache holds, and multiplied there.
Knows records of weights and torch; not which way is faster here.
Legend: M tokens, O out, I in, G groups, N rows of a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compress.weights import UniformWeight
from .scratch import CHUNK, scratch

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class HalfWeight:
    """weight float16 or bfloat16 [O, I]."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def kind(self) -> str:
        return str(self.weight.dtype).removeprefix("torch.")

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    def products(self, half_pays: Callable[[torch.dtype], bool], rows: int) -> dict[str, Product]:
        """Ways to multiply x [M, I] → [M, O]. torch's own product of many rows takes minutes where 16 bits have no arithmetic."""
        result: dict[str, Product] = {"widen": lambda x: widened_matmul(x, self)}
        if rows == 1 or half_pays(self.weight.dtype):
            result["direct"] = lambda x: F.linear(x.to(self.weight.dtype), self.weight)
        return result

    def widened(self, first: int, last: int) -> Tensor:
        """float32 [N, I] of rows [first, last), in this thread's scratch: valid until the next chunk."""
        return scratch((last - first) * self.shape[1]).view(last - first, -1).copy_(self.weight[first:last])

    def finish_(self, y_MO: Tensor, x_MI: Tensor) -> Tensor:
        return y_MO

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [N, I] of rows ids int64 [N]."""
        return self.weight[ids].float()

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.weight.to(dtype)


@dataclass(frozen=True)
class ByteWeight:
    """(code − zero)·scale: codes int8 [O, I] and zeros int8 [O, G], both less than the record's by half their levels; zeros None: all 0."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def kind(self) -> str:
        return f"int8 group {self.shape[1] // self.scales.shape[1]}"

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.codes, self.scales) if self.zeros is None else (self.codes, self.scales, self.zeros)

    def products(self, half_pays: Callable[[torch.dtype], bool], rows: int) -> dict[str, Product]:
        return {"widen": lambda x: widened_matmul(x, self)}

    def widened(self, first: int, last: int) -> Tensor:
        """float32 [N, I] of rows [first, last) as if their zeros were 0, in this thread's scratch: valid until the next chunk."""
        levels = scratch((last - first) * self.shape[1]).view(last - first, self.scales.shape[1], -1)
        levels.copy_(self.codes[first:last].view_as(levels)).mul_(self.scales[first:last].float().unsqueeze(-1))
        return levels.view(last - first, -1)

    def finish_(self, y_MO: Tensor, x_MI: Tensor) -> Tensor:
        """Zeros act on the groups' sums of x, which are far fewer than the weights."""
        if self.zeros is None:
            return y_MO
        sums_MG = x_MI.view(x_MI.shape[0], self.scales.shape[1], -1).sum(-1)
        return y_MO.addmm_(sums_MG, (self.scales.float() * self.zeros).t(), alpha=-1)

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [N, I] of rows ids int64 [N]."""
        codes, scales = self.codes[ids].float().view(len(ids), self.scales.shape[1], -1), self.scales[ids].float().unsqueeze(-1)
        if self.zeros is not None:
            codes.sub_(self.zeros[ids].unsqueeze(-1))
        return codes.mul_(scales).view(len(ids), -1)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.rows(torch.arange(self.shape[0])).to(dtype)


def pack_bytes(base: UniformWeight) -> ByteWeight:
    """ValueError says why a weight cannot be kept as bytes: columns out of order, or zero points that are no integers of a byte."""
    if base.group_index is not None:
        raise ValueError("bytes need contiguous groups and group_index is set")
    zeros = base.zeros_OG()
    if bool((zeros != zeros.round()).any()) or bool(((zeros < 0) | (zeros >= 1 << base.bits)).any()):
        raise ValueError(f"bytes need integer zero points from 0 to {(1 << base.bits) - 1}")
    middle = 1 << (base.bits - 1)
    shifted = (zeros - middle).to(torch.int8)
    codes = (base.codes_OI().to(torch.int16) - middle).to(torch.int8)
    return ByteWeight(codes, base.scales, shifted if bool(shifted.any()) else None)


def widened_matmul(x_MI: Tensor, weight: HalfWeight | ByteWeight) -> Tensor:
    """float32 [M, O]."""
    x, (out, inputs) = x_MI.float().contiguous(), weight.shape
    step, y = max(1, CHUNK // inputs), x.new_empty(x.shape[0], out)
    for first in range(0, out, step):
        last = min(first + step, out)
        torch.mm(x, weight.widened(first, last).t(), out=y[:, first:last])
    return weight.finish_(y, x)
