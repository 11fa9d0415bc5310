"""Embeddings that stay packed: rows are dequantized as they are looked up, and a tied head multiplies with the very same codes.

Knows records and operators; not models or files.
Legend: N tokens, D width, V rows of the table.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..compress.weights import DenseWeight, StoredWeight
from .linear import Backend, FusedLinear, bind, stays
from .operators import storage_bytes


class FusedEmbedding(nn.Module):
    """ids int64 [...] → rows [..., D] in `dtype`, times `scale` where the architecture scales its embeddings.

    Rows come from the operator of `table`, a linear [V, D] bound to kernels, which is the head itself where the two are tied."""

    def __init__(self, table: FusedLinear, dtype: torch.dtype, scale: Tensor | float | None = None) -> None:
        super().__init__()
        self.table, self.dtype, self.scale = [table], dtype, scale  # in a list: a tied head is a module of its own in the model
        self.num_embeddings, self.embedding_dim = table.out_features, table.in_features

    @property
    def backend(self) -> str:
        return self.table[0].backend

    @property
    def reason(self) -> str:
        return self.table[0].reason

    def forward(self, input: Tensor) -> Tensor:
        operator: Any = self.table[0].operator
        rows = operator.rows(input.reshape(-1)).to(self.dtype).view(*input.shape, -1)
        return rows if self.scale is None else rows * torch.as_tensor(self.scale, dtype=self.dtype, device=rows.device)

    def bound_tensors(self) -> list[Tensor]:
        return self.table[0].bound_tensors()

    def resident_bytes(self) -> int:
        return storage_bytes(self.bound_tensors())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        stays(self.table[0].device, fn)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, backend={self.backend}, {self.resident_bytes()} bytes"


def bind_table(
    stored: StoredWeight,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
    scale: Tensor | float | None = None,
) -> tuple[FusedEmbedding, FusedLinear]:
    """(embedding, the linear [V, D] that would be its tied head) of one table. A record that is more than a base (a low-rank term,
    smoothing, a mask, a sparse delta) becomes one dense matrix, since a row would have to be assembled from all of it."""
    plain = all(part is None for part in (stored.low_rank, stored.smooth, stored.delta, stored.mask, stored.activations))
    plain = plain and getattr(stored.base, "group_index", None) is None
    table = stored if plain else StoredWeight(DenseWeight(stored.dense()))
    head = bind(table, device=device, dtype=dtype, backend="dense" if backend == "reference" else backend)
    return FusedEmbedding(head, dtype, scale), head
