"""Pruning masks: sparsity patterns, the magnitude and Wanda criteria, and applying a mask to a stored weight.

Knows tensors and records only. A mask is bool, True where a weight is kept.
Legend: O out, I in, M the length of an N:M group.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .normal_float import zero_code
from .packing import pack_codes
from .ranges import Pattern, Share
from .statistics import LayerStatistics
from .weights import Base, DenseWeight, GgmlWeight, StoredWeight, UniformWeight

Allocation = Literal["uniform", "depth", "outliers"]
_SHORT = 32


@dataclass(frozen=True)
class MagnitudeConfig:
    """`pattern` "unstructured" or "N:M" (at most N kept of every M along the input); `allocation` says how blocks share the
    mean sparsity (compress/sparsity.py) and `spread` how far they may lie from it (null: the rule's own), and whoever shares it
    hands each matrix its own `sparsity`."""

    sparsity: Share = 0.5
    pattern: Pattern = "unstructured"
    allocation: Allocation = "uniform"
    spread: Share | None = None

    def __post_init__(self) -> None:
        check_pattern(self.sparsity, self.pattern, self.allocation, self.spread)


@dataclass(frozen=True)
class WandaConfig(MagnitudeConfig):
    """As MagnitudeConfig; unstructured sparsity is the same in every output row."""


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """(kept, of) for "N:M", None for "unstructured". ValueError otherwise."""
    if pattern == "unstructured":
        return None
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    kept, of = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < kept < of:
        raise ValueError(f'pattern {pattern!r} is unknown; choose "unstructured" or "N:M" with 0 < N < M, such as "2:4" or "4:8"')
    return kept, of


def check_pattern(sparsity: float, pattern: str, allocation: str = "uniform", spread: float | None = None) -> None:
    """ValueError for settings that contradict one another."""
    if spread is not None and allocation == "uniform":
        raise ValueError(f"spread {spread} has nothing to spread under allocation 'uniform'; choose 'depth' or 'outliers'")
    parsed = parse_pattern(pattern)
    if parsed is None:
        return
    kept, of = parsed
    if abs(sparsity - (1 - kept / of)) > 1e-6:
        raise ValueError(f"pattern {pattern} keeps {kept} of {of}, a sparsity of {1 - kept / of:g}, not {sparsity:g}; set one to match")
    if allocation != "uniform":
        raise ValueError(f"pattern {pattern} fixes the sparsity of every matrix; allocation {allocation!r} needs pattern 'unstructured'")


def keep_highest(score: Tensor, dropped: int) -> Tensor:
    """Mask of the last dimension that drops exactly the `dropped` lowest scores of each row, ties by lower index first."""
    if dropped == 0:
        return torch.ones_like(score, dtype=torch.bool)
    if score.shape[-1] <= _SHORT:
        order = score.argsort(dim=-1, stable=True)[..., :dropped]
        return torch.ones_like(score, dtype=torch.bool).scatter_(-1, order, False)
    # linear in time, where a sort is not; kthvalue has no deterministic algorithm on CUDA
    threshold = score.topk(dropped, dim=-1, largest=False, sorted=False).values.amax(-1, keepdim=True)
    below, tied = score < threshold, score == threshold
    wanted = dropped - below.sum(-1, keepdim=True)
    if bool((tied.sum(-1, keepdim=True) > wanted).any()):
        tied &= tied.cumsum(-1) <= wanted
    return ~(below | tied)


def pattern_mask(score_OI: Tensor, kept: int, of: int) -> Tensor:
    """Exactly `kept` of every `of` consecutive columns, the highest scores. ValueError when `of` does not divide the columns."""
    rows, columns = score_OI.shape
    if columns % of:
        raise ValueError(f"in_features {columns} is not a multiple of {of}; pattern {kept}:{of} cannot be met")
    return keep_highest(score_OI.view(rows, -1, of), of - kept).view(rows, columns)


def magnitude_mask(weight_OI: Tensor, sparsity: float, pattern: str = "unstructured", allowed_OI: Tensor | None = None) -> Tensor:
    """Drop the smallest |w| of the whole matrix, or of each N:M group."""
    score = _already_dropped_first(weight_OI.abs(), allowed_OI)
    parsed = parse_pattern(pattern)
    if parsed is not None:
        return pattern_mask(score, *parsed)
    return keep_highest(score.view(-1), round(score.numel() * sparsity)).view(score.shape)


def wanda_mask(
    weight_OI: Tensor, input_norm_I: Tensor, sparsity: float, pattern: str = "unstructured", allowed_OI: Tensor | None = None
) -> Tensor:
    """Each row (or N:M group) drops its smallest |w|·‖x‖ (arXiv:2306.11695, eq. 1)."""
    score = _already_dropped_first(weight_OI.abs() * input_norm_I, allowed_OI)
    parsed = parse_pattern(pattern)
    if parsed is not None:
        return pattern_mask(score, *parsed)
    return keep_highest(score, round(score.shape[1] * sparsity))


def masked_base(base: Base, mask_OI: Tensor) -> Base:
    """The base with every dropped weight at exactly 0: a zero, the grid's zero point, or the code book's 0."""
    if isinstance(base, DenseWeight):
        return DenseWeight(base.weight.where(mask_OI, 0))
    if isinstance(base, GgmlWeight) and not base.symmetric:
        raise ValueError(
            f"the minima of {base.type} leave no code for 0; prune before the quantization, or on a grid without minima (q3_k, q6_k)"
        )
    if not isinstance(base, UniformWeight):
        zero = torch.full_like(base.codes_OI(), base.layout.zero if isinstance(base, GgmlWeight) else zero_code(base.bits))
    else:
        zero = column_values(base, base.zeros_OG()).to(torch.uint8)
        if base.zeros is not None and base.zeros.is_floating_point():
            raise ValueError("a grid with floating zero points has no code for 0; prune before such a quantization")
    return replace(base, codes=pack_codes(base.codes_OI().where(mask_OI, zero), base.bits))


def column_values(base: UniformWeight, values_OG: Tensor) -> Tensor:
    """[O, I]: each column's value of its group."""
    if base.group_index is not None:
        return values_OG[:, base.group_index.long()]
    return values_OG.repeat_interleave(base.in_features // base.groups, dim=1)


def magnitude(
    weight: StoredWeight, target_OI: Tensor, statistics: LayerStatistics, config: MagnitudeConfig
) -> tuple[StoredWeight, dict[str, float]]:
    """Prune by |w|; kept weights stay what they are."""
    current = finite(weight.base_dense(), "weight")
    return pruned(weight, magnitude_mask(current, config.sparsity, config.pattern, weight.mask_OI()))


def wanda(
    weight: StoredWeight, target_OI: Tensor, statistics: LayerStatistics, config: WandaConfig
) -> tuple[StoredWeight, dict[str, float]]:
    """Prune by |w|·‖x‖; kept weights stay what they are. A layer whose inputs are all zero falls back to |w|, and says so."""
    current, norm_I = finite(weight.base_dense(), "weight"), finite(statistics.inputs.norm_I, "input norms")
    if weight.smooth is not None:
        norm_I = norm_I / weight.smooth.float()
    dead = not bool((norm_I > 0).any())
    record, metrics = pruned(
        weight, wanda_mask(current, torch.ones_like(norm_I) if dead else norm_I, config.sparsity, config.pattern, weight.mask_OI())
    )
    return record, metrics | {"dead_layer": float(dead)}


def pruned(weight: StoredWeight, mask_OI: Tensor) -> tuple[StoredWeight, dict[str, float]]:
    """The record under a new mask, and its sparsity."""
    record = replace(weight, base=masked_base(weight.base, mask_OI)).with_mask(mask_OI)
    return record, {"sparsity": 1.0 - mask_OI.float().mean().item()}


def finite(tensor: Tensor, name: str) -> Tensor:
    """The tensor itself; ValueError naming it when it holds NaN or Inf."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name}: {int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values are NaN or Inf")
    return tensor


def _already_dropped_first(score: Tensor, allowed_OI: Tensor | None) -> Tensor:
    return score if allowed_OI is None else score.where(allowed_OI, -1.0)
