"""Shared low-rank factors: one right factor for several matrices, their stacked left factor split, and stored references to it checked.

Knows records by name; not how a factor was computed, nor where records are stored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from .weights import Factor, GgmlWeight, StoredWeight, UniformWeight, describe, to_tensors

_OnGrid = TypeVar("_OnGrid", bound=UniformWeight | GgmlWeight)
SHARED = "low_rank.down"
"""The tensor, or the beginning of the names of the tensors, that a record with a shared factor leaves to its holder."""


def holder_of(description: Mapping[str, object]) -> str | None:
    """The linear that stores the factor which the described record shares, or None."""
    low_rank = description.get("low_rank")
    return low_rank.get("shared") if isinstance(low_rank, Mapping) else None


def own_tensors(record: StoredWeight) -> dict[str, Tensor]:
    """The tensors a record stores itself, under their dotted names."""
    elsewhere = record.low_rank is not None and record.low_rank.shared is not None
    return {name: tensor for name, tensor in to_tensors(record).items() if not (elsewhere and name.startswith(SHARED))}


def rows_of(factor: Factor, rows: slice) -> Factor:
    """Some rows of a factor, in memory of their own."""
    return rows_on_grid(factor, rows) if isinstance(factor, UniformWeight) else factor[rows].clone()


def rows_on_grid(weight: _OnGrid, rows: slice) -> _OnGrid:
    """Some rows, in memory of their own."""
    own = {name: tensor.clone() if name == "group_index" else tensor[rows].clone() for name, tensor in to_tensors(weight).items()}
    return replace(weight, **own)


def joined_rows(parts: Sequence[_OnGrid]) -> _OnGrid:
    """Rows on one kind of grid, without a group index, one part below the other."""
    each = [to_tensors(part) for part in parts]
    return parts[0] if len(parts) == 1 else replace(parts[0], **{name: torch.cat([tensors[name] for tensors in each]) for name in each[0]})


def settled(linears: Mapping[str, StoredWeight]) -> dict[str, StoredWeight]:
    """The records with every claim to share a factor held against the named one: where the two differ (one has been trained, or is gone)
    the claim is dropped, and the record stores, and counts, its own."""
    out = dict(linears)
    for name, record in linears.items():
        low_rank = record.low_rank
        if low_rank is not None and low_rank.shared is not None:
            holder = linears.get(low_rank.shared)
            held = None if holder is None else holder.low_rank
            if held is None or held.shared is not None or not _equal(held.down, low_rank.down):
                out[name] = replace(record, low_rank=replace(low_rank, shared=None))
    return out


def _equal(one: Factor, other: Factor) -> bool:
    if isinstance(one, UniformWeight) or isinstance(other, UniformWeight):
        if not (isinstance(one, UniformWeight) and isinstance(other, UniformWeight)):
            return False
        mine, theirs = to_tensors(one), to_tensors(other)
        same = describe(one) == describe(other)
        return same and all(torch.equal(mine[n], theirs[n].to(mine[n].device)) for n in mine)
    return one.dtype == other.dtype and torch.equal(one, other.to(one.device))
