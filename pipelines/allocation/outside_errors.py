"""Errors of the matrices outside the blocks: the token embeddings, the head, or the one matrix that is both, under every setting.

An embedding's output is a row that is looked up: its squared error is the mean over the calibration text's tokens, so that a row counts as often
as it comes. A head is multiplied, with what leaves the last norm. Where both are one matrix, its error is the sum of the two. Rows are rounded
independently, some at once, for a vocabulary may be large. Knows one matrix and its uses; not where they are gathered (`error_tables`).
Legend: O rows (the vocabulary), I columns, K settings, V views of an error (as it is; in nats).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...compress.lowrank import Metric, WeightedError
from ...compress.rounding import RtnConfig, rtn
from ...compress.statistics import InputStatistics, LayerStatistics
from ...compress.weights import DenseWeight, StoredWeight

ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Lookup:
    """`share_O`: how often a row is looked up, as a share of all tokens; a squared error in column i counts gain_VI[v, i] times. float64."""

    share_O: Tensor
    gain_VI: Tensor

    def squared_V(self, error_OI: Tensor, rows: slice) -> Tensor:
        return self.gain_VI @ (self.share_O[rows] @ error_OI.double().square())


@dataclass(frozen=True)
class Product:
    """With inputs of the metric's second moment; a squared error of output o counts gain_VO[v, o] times. float64."""

    metric: Metric
    gain_VO: Tensor

    def squared_V(self, error_OI: Tensor, rows: slice) -> Tensor:
        return self.gain_VO[:, rows] @ WeightedError(error_OI, self.metric).squared_O.clamp(min=0)


def gain(rows: int, squares: Tensor | None, nats_per_square: float) -> Tensor:
    """[V, rows] float64: ones; and, where the squared gradients at the outputs are known, what a squared error there costs in nats per token."""
    return torch.stack(
        [torch.ones(rows, dtype=torch.float64), *([] if squares is None else [squares.double().cpu() * nats_per_square / 2])]
    )


def outside_errors(
    target: StoredWeight, current: StoredWeight, configs: Sequence[RtnConfig], uses: Sequence[Lookup | Product], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Squared errors [V, K] of `current` rounded by each config and the squared output [V] of `target`, summed over its uses, float64 on the CPU.
    ValueError for a weight that is NaN or Inf."""
    none = LayerStatistics(InputStatistics(target.shape[1], frozenset()))
    errors, energies = [], []
    for rows in _spans(target, current):
        target_OI = _rows(target, rows).to(device).dense().contiguous()
        record = _rows(current, rows).to(device)
        energies.append(_squared(target_OI, rows, uses))
        lost = (target_OI - rtn(record, target_OI, none, config)[0].dense() for config in configs)
        errors.append(torch.stack([_squared(error_OI, rows, uses) for error_OI in lost], 1))
    return torch.stack(errors).sum(0), torch.stack(energies).sum(0)


def _squared(error_OI: Tensor, rows: slice, uses: Sequence[Lookup | Product]) -> Tensor:
    return torch.stack([use.squared_V(error_OI, rows) for use in uses]).sum(0).cpu()


def _spans(*records: StoredWeight) -> list[slice]:
    """Some rows at a time; all of them where a record has parts that are no rows."""
    count = records[0].shape[0]
    whole = any(not isinstance(r.base, DenseWeight) or r.low_rank is not None or r.delta is not None for r in records)
    return [slice(0, count)] if whole else [slice(start, start + ROWS_AT_ONCE) for start in range(0, count, ROWS_AT_ONCE)]


def _rows(record: StoredWeight, rows: slice) -> StoredWeight:
    if not isinstance(record.base, DenseWeight):
        return record
    return replace(record, base=DenseWeight(record.base.weight[rows]), mask=None if record.mask is None else record.mask[rows])
