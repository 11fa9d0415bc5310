"""Slices rows out of a record and stacks records, so that a fused expert matrix can be stored as several matrices in a file.

Knows records only. Legend: O out, I in, G groups.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...compress.packing import pack_codes
from ...compress.weights import Base, DenseWeight, Factor, GgmlWeight, LowRank, NormalFloatWeight, StoredWeight, UniformWeight, to_tensors


def take_rows(record: StoredWeight, rows: Tensor) -> StoredWeight:
    """The record of `rows` (int64 [O′]) alone. ValueError for a sparse delta, whose positions count the whole matrix."""
    if record.delta is not None:
        raise ValueError("a sparse delta cannot be cut by rows")
    low_rank = record.low_rank
    if low_rank is not None:
        low_rank = LowRank(_factor_rows(low_rank.up, rows), low_rank.down)
    mask = None if record.mask is None else record.mask[rows]
    return replace(record, base=base_rows(record.base, rows), mask=mask, low_rank=low_rank)


def base_rows(base: Base, rows: Tensor) -> Base:
    """Double-quantized absmax is laid out across rows, so it comes out as plain float32."""
    if isinstance(base, DenseWeight):
        return DenseWeight(base.weight[rows])
    if isinstance(base, GgmlWeight):
        return replace(base, **{name: tensor[rows] for name, tensor in to_tensors(base).items()})
    if isinstance(base, NormalFloatWeight):
        return NormalFloatWeight(base.codes[rows], base.bits, base.block_size, base.in_features, base.absmax_OG()[rows])
    zeros = None if base.zeros is None else base.zeros[rows]
    return replace(base, codes=base.codes[rows], scales=base.scales[rows], zeros=zeros)


def stack_rows(records: Sequence[StoredWeight]) -> StoredWeight:
    """One record of plain uniform or dense records, above each other. ValueError, saying why, when they share no grid."""
    bases = [record.base for record in records]
    if any(replace(record, base=bases[0]) != StoredWeight(bases[0]) for record in records):
        raise ValueError("only plain codes can be stacked")
    dense = [base for base in bases if isinstance(base, DenseWeight)]
    if len(dense) == len(bases):
        return StoredWeight(DenseWeight(torch.cat([base.weight for base in dense])))
    uniform = [base for base in bases if isinstance(base, UniformWeight)]
    if len(uniform) != len(bases):
        raise ValueError("they are of different kinds")
    first = uniform[0]
    for other in uniform[1:]:
        if (other.bits, other.group_size, other.in_features) != (first.bits, first.group_size, first.in_features):
            raise ValueError(
                f"they have {first.bits} bits in groups of {first.group_size} and {other.bits} bits in groups of {other.group_size}"
            )
        if not _same(first.group_index, other.group_index):
            raise ValueError("their g_idx differ")
    codes, scales = torch.cat([base.codes for base in uniform]), torch.cat([base.scales for base in uniform])
    return StoredWeight(replace(first, codes=codes, scales=scales, zeros=_stack_zeros(uniform)))


def _stack_zeros(bases: Sequence[UniformWeight]) -> Tensor | None:
    if all(base.zeros is None for base in bases):
        return None
    if any(base.zeros is not None and base.zeros.is_floating_point() for base in bases):
        return torch.cat([base.zeros_OG() for base in bases])
    return torch.cat([pack_codes(base.zeros_OG().long(), base.bits) for base in bases])


def _factor_rows(factor: Factor, rows: Tensor) -> Factor:
    if isinstance(factor, UniformWeight):
        out = base_rows(factor, rows)
        assert isinstance(out, UniformWeight)
        return out
    return factor[rows]


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)
