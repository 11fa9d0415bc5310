"""Prepares stored weights for the operators: masks folded into codes, columns put in the order of their groups,
several linears of one input concatenated.

Knows records; not devices or kernels.
Legend: O out, I in, R rank, G groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..compress import normal_float
from ..compress.weights import ActivationGrid, Base, DenseWeight, GgmlWeight, NormalFloatWeight, StoredWeight, UniformWeight


@dataclass(frozen=True)
class Segment:
    """Outputs [row, row + rows) of a group read ranks [rank, rank + ranks) of h; ranks 0: no low-rank term."""

    row: int
    rows: int
    rank: int
    ranks: int


@dataclass(frozen=True)
class Prepared:
    """y = base·(x / smooth)[columns] + up·(down·x) + bias, `up` and `rank` per segment.

    base: no mask, no group_index; columns int64 [I] or None; down [R, I] of all segments (one, where it is shared), in the
    stored dtype; ups: per segment [O_s, R_s] or None."""

    base: Base
    columns: Tensor | None
    smooth: Tensor | None
    activations: ActivationGrid | None
    down: Tensor | None
    ups: tuple[Tensor | None, ...]
    bias: Tensor | None
    segments: tuple[Segment, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape


def prepare(stored: StoredWeight, bias: Tensor | None) -> Prepared:
    """ValueError says what no fused operator can express: a sparse delta, a mask that a grid cannot follow, ragged groups."""
    if stored.delta is not None:
        raise ValueError("a sparse delta lies between the codes, and no packed operator adds one")
    if isinstance(stored.base, GgmlWeight):  # no operator here reads small codes
        stored = replace(stored, base=stored.base.uniform())
    base, columns = _contiguous_groups(_mask_in_codes(stored))
    down = up = None
    if stored.low_rank is not None:
        up, down = _stored_factors(stored)
    segment = Segment(0, stored.shape[0], 0, 0 if down is None else down.shape[0])
    return Prepared(base, columns, stored.smooth, stored.activations, down, (up,), bias, (segment,))


def _stored_factors(stored: StoredWeight) -> tuple[Tensor, Tensor]:
    """(up, down), floating: each in its own dtype, those on a grid in float16."""
    assert stored.low_rank is not None
    pair = (stored.low_rank.up, stored.low_rank.down)
    up, down = (f.dense(torch.float16) if isinstance(f, UniformWeight) else f.detach() for f in pair)
    return up, down


def _mask_in_codes(stored: StoredWeight) -> Base:
    """The base with every masked place at the code whose value is exactly 0."""
    base, mask = stored.base, stored.mask_OI()
    if mask is None or isinstance(base, GgmlWeight):
        return base
    if isinstance(base, DenseWeight):
        return DenseWeight(base.weight.where(mask, torch.zeros((), dtype=base.weight.dtype, device=base.weight.device)))
    if not bool((base.dense() * ~mask).any()):
        return base
    codes = base.codes_OI()
    if isinstance(base, NormalFloatWeight):
        zero_code = int((normal_float.code_book(base.bits) == 0).nonzero()[0, 0])
        masked = UniformWeight.from_codes(codes.where(mask, zero_code), base.absmax_OG(), None, base.bits, base.block_size).codes
        return replace(base, codes=masked)
    zeros = base.zeros_OG()
    if bool((zeros != zeros.round()).any()) or bool(((zeros < 0) | (zeros >= 1 << base.bits)).any()):
        raise ValueError("the mask removes weights, and this grid's floating zero points have no code for 0")
    return replace(
        base,
        codes=UniformWeight.from_codes(
            codes.where(mask, zeros[:, _group_of(base)].to(torch.uint8)), base.scales, None, base.bits, base.group_size
        ).codes,
    )


def _group_of(base: UniformWeight) -> Tensor:
    """int64 [I]: each column's group."""
    if base.group_index is not None:
        return base.group_index.long()
    return torch.arange(base.in_features, device=base.codes.device) // (base.in_features // base.groups)


def _contiguous_groups(base: Base) -> tuple[Base, Tensor | None]:
    """(base with its columns sorted by group, the order that x has to be read in)."""
    if not isinstance(base, UniformWeight) or base.group_index is None:
        return base, None
    counts = torch.bincount(base.group_index.long(), minlength=base.groups)
    if bool((counts != counts[0]).any()):
        raise ValueError(
            f"group_index makes groups of {int(counts.min())} to {int(counts.max())} columns; packed operators need equal ones"
        )
    order = torch.argsort(base.group_index.long(), stable=True)
    plain = replace(base, group_index=None)
    if bool((order == torch.arange(len(order), device=order.device)).all()):
        return plain, None
    codes = UniformWeight.from_codes(base.codes_OI()[:, order], base.scales, None, base.bits, base.group_size).codes
    return replace(plain, codes=codes), order


def join(parts: Sequence[Prepared], widen: bool, rank_limit: int | None = None) -> Prepared:
    """Several linears of one input as one. `widen` lets uniform grids of different bits meet at the widest, if that has four at most;
    `rank_limit` bounds the sum of the members' ranks. ValueError says what differs or does not fit."""
    first = parts[0]
    for name in ("columns", "smooth"):
        if not all(_same(getattr(part, name), getattr(first, name)) for part in parts):
            raise ValueError(f"the members' {name} differ, so their inputs are not the same")
    if any(part.activations != first.activations for part in parts):
        raise ValueError("the members round their activations differently")
    base = _join_bases([part.base for part in parts], widen)
    down, starts = _join_downs([part.down for part in parts])
    if rank_limit is not None and down is not None and down.shape[0] > rank_limit:
        raise ValueError(f"the members' ranks add up to {down.shape[0]}; one product takes at most {rank_limit}")
    segments, row = [], 0
    for part, start in zip(parts, starts, strict=True):
        segments.append(Segment(row, part.shape[0], start, 0 if part.down is None else part.down.shape[0]))
        row += part.shape[0]
    return Prepared(
        base, first.columns, first.smooth, first.activations, down, tuple(p.ups[0] for p in parts), _join_biases(parts), tuple(segments)
    )


def _join_biases(parts: Sequence[Prepared]) -> Tensor | None:
    present = [part.bias for part in parts if part.bias is not None]
    if not present:
        return None
    return torch.cat([present[0].new_zeros(part.shape[0]) if part.bias is None else part.bias for part in parts])


def _join_downs(downs: Sequence[Tensor | None]) -> tuple[Tensor | None, list[int]]:
    """(stacked down-projections, first rank of each member); one matrix where all members share it."""
    present = [d for d in downs if d is not None]
    if not present:
        return None, [0] * len(downs)
    if len(present) == len(downs) and all(_same(d, present[0]) for d in present):
        return present[0], [0] * len(downs)
    starts, rank = [], 0
    for d in downs:
        starts.append(rank)
        rank += 0 if d is None else d.shape[0]
    return torch.cat(present), starts


def _join_bases(bases: Sequence[Base], widen: bool) -> Base:
    first = bases[0]
    if any(type(base) is not type(first) for base in bases):
        raise ValueError(f"the members are stored differently: {sorted({type(base).__name__ for base in bases})}")
    if isinstance(first, DenseWeight):
        return DenseWeight(torch.cat([base.dense(first.weight.dtype) for base in bases]))
    if isinstance(first, UniformWeight):
        return _join_uniform([base for base in bases if isinstance(base, UniformWeight)], widen)
    members = [base for base in bases if isinstance(base, NormalFloatWeight)]
    if len({(base.bits, base.block_size) for base in members}) > 1:
        raise ValueError(f"the members' grids differ: {[f'NF{base.bits} block {base.block_size}' for base in members]}")
    absmax = torch.cat([base.absmax_OG() for base in members])
    return replace(members[0], codes=torch.cat([base.codes for base in members]), absmax=absmax, absmax_codes=None, absmax_scales=None, absmax_offset=None)


def _join_uniform(members: Sequence[UniformWeight], widen: bool) -> UniformWeight:
    groups, bits = {base.groups for base in members}, max(base.bits for base in members)
    if len(groups) > 1 or (len({base.bits for base in members}) > 1 and not (widen and bits <= 4)):
        raise ValueError(f"the members' grids differ: {[f'{base.bits} bits group {base.group_size}' for base in members]}")
    scales = torch.cat([base.scales for base in members])
    if all(base.symmetric and base.bits == bits for base in members):
        zeros = None
    else:
        zeros = torch.cat([base.zeros_OG() for base in members])
        if all(base.zeros is None or not base.zeros.is_floating_point() for base in members):
            zeros = zeros.to(torch.int64)
    return UniformWeight.from_codes(torch.cat([base.codes_OI() for base in members]), scales, zeros, bits, members[0].group_size)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b)))
