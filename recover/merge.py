"""After training: merge where it is exact, refuse where it would lose, and audit that masks and grids are what they were.

Knows records and compressed linears; not files or formats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..compress.weights import DenseWeight, GgmlWeight, NormalFloatWeight, StoredWeight, UniformWeight
from .compressed_linear import CompressedLinear
from .compressed_model import compressed_linears
from .student import Batch, Student
from .train import held_out_loss

Records = Mapping[str, StoredWeight]


def merge_refusal(stored: StoredWeight) -> str | None:
    """Why the terms around a base cannot be merged into it exactly; None when they can (or there is nothing to merge)."""
    if stored.low_rank is None and stored.delta is None and stored.smooth is None:
        return None
    if isinstance(stored.base, UniformWeight | NormalFloatWeight | GgmlWeight):
        named = [n for n, v in (("low-rank term", stored.low_rank), ("delta", stored.delta), ("smoothing", stored.smooth)) if v is not None]
        kind = f"{stored.base.bits}-bit codes"
        return f"its {' and '.join(named)} cannot be added to {kind} without rounding again: export base and adapter, or requantize"
    if stored.activations is not None and (stored.low_rank is not None or stored.delta is not None):
        return "its low-rank term and delta see the raw input, its base a rounded one"
    if stored.mask is not None and stored.low_rank is not None:
        return "a low-rank term would fill the weights that the mask holds at 0: keep it as an adapter, or train with perp lora=mask_lora"
    return None


def merge(stored: StoredWeight) -> StoredWeight:
    """One dense base that does the same as base, smoothing, low-rank term and delta together, in the base's dtype; the mask stays.
    ValueError, with the reason, where that would not be exact."""
    reason = merge_refusal(stored)
    if reason is not None:
        raise ValueError(reason)
    if not isinstance(stored.base, DenseWeight) or (stored.low_rank is None and stored.delta is None and stored.smooth is None):
        return stored
    mask, dense = stored.mask_OI(), stored.dense()
    if mask is not None:
        outside = int((dense[~mask] != 0).sum())
        if outside:
            raise ValueError(f"its delta moves {outside} weights that the mask holds at 0")
    return replace(stored, base=DenseWeight(dense.to(stored.base.weight.dtype)), low_rank=None, delta=None, smooth=None)


def audit(before: Records, after: Records, codes_move: bool = False) -> list[str]:
    """What an operation on records must not have changed: masks bit for bit, zeros under them, the grid's shape, bits, groups and (unless
    `codes_move`) codes. Returns the violations, each with its layer; [] when all is well."""
    out = [f"{name}: the layer is gone" for name in before if name not in after]
    for name in before:
        if name in after:
            out += [f"{name}: {problem}" for problem in _differences(before[name], after[name], codes_move)]
    return out


def _differences(old: StoredWeight, new: StoredWeight, codes_move: bool) -> list[str]:
    out = []
    before, mask = old.mask_OI(), new.mask_OI()
    if before is None or mask is None:
        if before is not mask:
            out.append("a mask appeared" if before is None else "the mask is gone")
    elif not torch.equal(before, mask):
        out.append(f"the mask differs in {int((before ^ mask).sum())} weights")
    if mask is not None:
        outside = int((new.base_dense()[~mask] != 0).sum()) + _stored_outside(new, mask)
        if outside:
            out.append(f"{outside} weights under the mask are not 0")
    if not isinstance(old.base, DenseWeight):
        out += _grid_differences(old.base, new.base, codes_move)
    return out


def _stored_outside(stored: StoredWeight, mask_OI: Tensor) -> int:
    """Weights that lie outside the mask in what is stored: a dense base must hold real zeros, a delta must not reach there."""
    count = int((stored.base.weight[~mask_OI] != 0).sum()) if isinstance(stored.base, DenseWeight) else 0
    return count if stored.delta is None else count + int((~mask_OI).view(-1)[stored.delta.index.long()].sum())


def _grid_differences(old: UniformWeight | NormalFloatWeight | GgmlWeight, new: Any, codes_move: bool) -> list[str]:
    if type(old) is not type(new):
        return [f"{type(old).__name__} became {type(new).__name__}"]
    if (old.bits, old.groups, old.shape) != (new.bits, new.groups, new.shape):
        return [f"the grid was {old.bits} bits × {old.groups} groups, it is {new.bits} × {new.groups}"]
    out = []
    if not codes_move and not torch.equal(old.codes, new.codes):
        out.append(f"{int((old.codes_OI() != new.codes_OI()).sum())} codes changed")
    if isinstance(old, GgmlWeight):
        if old.type != new.type or (not codes_move and not _same(old.small_codes, new.small_codes)):
            out.append(f"the small codes of {old.type} changed, or it became {new.type}")
        if not bool(torch.isfinite(new.super_scales).all()):
            out.append("a scale is not finite")
    if isinstance(old, UniformWeight):
        if not _same(old.group_index, new.group_index):
            out.append("the columns' groups changed")
        if not bool(torch.isfinite(new.scales).all()):
            out.append("a scale is not finite")
    return out


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


@torch.no_grad()
def stored_loss(model: nn.Module, student: Student, held_out: Sequence[Batch]) -> float:
    """Held-out loss of the records that `to_stored` gives, run in the model's place: what a reloaded artifact will show."""
    trained = compressed_linears(model)
    try:
        for name, linear in trained.items():
            record, bias = linear.to_stored()
            _put(model, name, _with_hooks(CompressedLinear(record, bias, linear.dtype), linear))
        return held_out_loss(student, held_out)
    finally:
        for name, linear in trained.items():
            _put(model, name, linear)


def _put(model: nn.Module, name: str, linear: CompressedLinear) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, linear)


def _with_hooks(fresh: CompressedLinear, old: CompressedLinear) -> CompressedLinear:
    """Extra modules are hooks: they stay where they were."""
    fresh._forward_hooks, fresh._forward_pre_hooks = old._forward_hooks, old._forward_pre_hooks
    return fresh
