"""GPTQ (arXiv:2210.17323): round column by column and compensate each error in the later columns, on a uniform grid or a codebook.

Knows tensors and records only. Masked weights stay at exactly 0; the error of dropping them is compensated in later columns, too.
Legend: O out, I in, G groups, S columns of a sub-block or group.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from . import normal_float as nf
from .block import BlockShare
from .feedback import InverseFactor, factor_of, part_rows
from .ggml_grids import check_type
from .ggml_types import GridName, type_for
from .gptq_sweeps import SweepConfig, gptq_book, gptq_ggml, gptq_uniform
from .grids import Clip, UniformGrid, check_zeros, divide
from .guided import swept_by_groups
from .masks import finite
from .ranges import Bits, Damp, Group, RowGroupsOrZero, Share, ShareOrAll, Width
from .refit import refit_scales
from .rounding import base_target, grid_importance, normal_float_record, quantized, refuse_float_zeros
from .sharing import joined_rows, rows_on_grid
from .statistics import LayerStatistics
from .weights import ActivationGrid, GgmlWeight, StoredWeight, UniformWeight, to_tensors

ActOrder = Literal["static_groups", "full", "none"]


@dataclass(frozen=True)
class GptqConfig:
    """`act_order` "static_groups": grids fitted beforehand, columns visited by falling mean square, groups contiguous; "none": natural
    order, each grid fitted to the updated weights when its group begins; "full": as "none" over the visiting order, so that
    columns of a group are scattered and a group index is stored. `correction` ∈ [0, 1] moves the target toward what the dense
    model's inputs would give (GPTAQ, arXiv:2504.02692; 1 is the paper's, smaller is steadier). `first_order` ∈ [0, 1) draws each column
    back toward its own value by that share before it is rounded (FOEM, arXiv:2507.11017; 0.1 and 0.2 are its authors'). `refit` solves the
    scales anew for the codes that came out (`refit`), against what the matrix would give for the inputs of the compressed model (0), those
    of the dense one (1), or between; None leaves them. Half way took the demo model's 33.2 at 3 bits to 31.0, all the way to 84.5.

    `clip` hessian weighs the grid search by the inputs' mean squares: perplexity 41.9 instead of 45.4 at 3 bits and 120 instead of 138 at
    2 (SmolLM2-135M, group 64, 64 × 512 tokens of WikiText-2). Weighing by what is left after later columns made up for an error, 1/U_jj²,
    was worse (44.1).

    `grid` as for `rtn`; one of ggml's is fitted whole before the sweep, and the sweep finds the codes on it.

    `guided` > 0 solves so many groups of consecutive rows each under a second moment Σₜ sₜ·xₜxₜᵀ of its own, in which a token counts by the
    loss's squared gradient at the group's outputs (GuidedQuant, arXiv:2505.07004, equation 7; tempered, which the paper does not: see
    `guided.token_weights`). One group did better than its authors' four (reports/published/README.md, Quantizing).
    """

    bits: Bits = 4
    group_size: Group = 64
    symmetric: bool = False
    clip: Clip = "hessian"
    float_zeros: bool = False
    act_order: ActOrder = "static_groups"
    damp: Damp = 0.01
    correction: ShareOrAll = 0.0
    first_order: Share = 0.0
    refit: ShareOrAll | None = None
    activations: ActivationGrid | None = None
    grid: GridName = "uniform"
    guided: RowGroupsOrZero = 0

    def __post_init__(self) -> None:
        check_zeros(self.symmetric, self.float_zeros)
        check_type(self)
        if self.guided and (self.correction or self.refit is not None or self.act_order == "full"):
            raise ValueError(
                f"guided {self.guided}: every group of rows has a second moment of its own, so correction {self.correction:g} and refit "
                f"{self.refit}, which know one, and act_order {self.act_order}, whose group index is all rows', do not go with it; set "
                "correction: 0, refit: null and act_order: static_groups, or guided: 0"
            )
        if self.grid != "uniform" and (self.act_order != "static_groups" or self.refit is not None):
            raise ValueError(
                f"grid {self.grid} is fitted before the sweep: act_order {self.act_order} and refit {self.refit} concern uniform grids; "
                "set act_order: static_groups and refit: null"
            )


@dataclass(frozen=True)
class GptqNormalFloatConfig:
    """GPTQ on a NormalFloat book; the absmax, double-quantized or not, is fixed beforehand."""

    bits: Bits = 4
    block_size: Width = 64
    double_quantize: bool = True
    damp: Damp = 0.01
    correction: ShareOrAll = 0.0
    activations: ActivationGrid | None = None


def corrected_target(weight_OI: Tensor, shift_II: Tensor, factor: InverseFactor, strength: float) -> Tensor:
    """W + strength·W·P with P = triu(D·Uᵀ, 1)·U and the shift D = E[(x_dense − x)·xᵀ] (GPTAQ, arXiv:2504.02692).

    At each column P hands the part of w·(x_dense − x) that later columns can reproduce to those columns. It is linear in the
    dense weight, so it can be added before the sweep; what a column holds when its turn comes is the same.
    """
    order_I = factor.order_I
    shift_II = shift_II[order_I][:, order_I]
    upper_II = factor.unit_II * factor.diagonal_I.unsqueeze(1)
    ahead_II = (shift_II @ upper_II.T).triu_(1) @ upper_II
    return weight_OI + strength * (weight_OI[:, order_I] @ ahead_II)[:, factor.place_I]


def gptq(weight: StoredWeight, target_OI: Tensor, statistics: LayerStatistics, config: GptqConfig) -> tuple[StoredWeight, dict[str, float]]:
    """GPTQ on a uniform grid."""
    records, metrics = gptq_group({"": weight}, {"": target_OI}, {"": statistics}, config)
    return records[""], metrics[""]


def by_rows(config: GptqConfig) -> bool:
    """Whether `gptq_group` can be divided among processes: a sweep on grids that are known beforehand processes rows in parts anyway."""
    return config.act_order == "static_groups" and not config.guided


def gptq_group(
    weights: Mapping[str, StoredWeight],
    targets: Mapping[str, Tensor],
    statistics: Mapping[str, LayerStatistics],
    config: GptqConfig,
    share: BlockShare | None = None,
) -> tuple[dict[str, StoredWeight], dict[str, dict[str, float]]]:
    """GPTQ of matrices that read one input (q/k/v, gate/up): rows are independent, so one sweep covers all of them. Matrices
    whose inputs are smoothed differ in their factors and go one by one. With `share` (`by_rows`) parts of the rows, whose height is a matter of their
    number alone, are swept apart, each by its owner; every process is given all. Where there are several, a ValueError begins with the name of the
    matrix, or of the first where it is the input that will not do."""
    if len(weights) > 1 and any(weight.smooth is not None for weight in weights.values()):
        solved = {n: gptq_group({n: weights[n]}, {n: targets[n]}, {n: statistics[n]}, config, share) for n in weights}
        return {n: records[n] for n, (records, _) in solved.items()}, {n: metrics[n] for n, (_, metrics) in solved.items()}
    grid = UniformGrid(config.bits, config.group_size, config.symmetric, config.float_zeros)
    first, several = next(iter(weights)), len(weights) > 1
    known, bases = statistics[first], []
    with _named(first, several):
        kind = None if config.grid == "uniform" else type_for(config.grid, weights[first].shape[1])
        if kind is None:
            grid.size(weights[first].shape[1])
    for name, weight in weights.items():
        with _named(name, several):
            refuse_float_zeros(weight, grid)
            if kind is not None:
                type_for(kind, weight.shape[1], weight.mask is not None)
            bases.append(base_target(weight, targets[name]))
    counts = [len(base_OI) for base_OI in bases]
    mask_OI = _stacked_masks([weight.mask_OI() for weight in weights.values()], bases)
    sweep = SweepConfig(config.clip, config.act_order == "static_groups", config.first_order)

    def swept(rows: slice, factor: InverseFactor, importance_I: Tensor | None) -> tuple[UniformWeight | GgmlWeight, Tensor]:
        own_OI, own_mask_OI = whole_OI[rows], None if mask_OI is None else mask_OI[rows]
        if kind is None:
            return gptq_uniform(own_OI, factor, grid, sweep, importance_I, own_mask_OI)
        return gptq_ggml(own_OI, factor, kind, sweep, importance_I, own_mask_OI)

    if config.guided:
        whole_OI = torch.cat(bases) if several else bases[0]
        whole, loss_O, factor = swept_by_groups(
            swept, weights, statistics, config.guided, config.damp, config.act_order != "none", config.clip
        )
    else:
        with _named(first, several):  # what all of them read
            factor = factor_of(known.inputs, config.damp, config.act_order != "none", weights[first].smooth)
            importance_I = grid_importance(weights[first], known, config.clip)
            shift_II = _shift(weights[first], known) if config.correction else None
        if shift_II is not None:
            bases = [corrected_target(base_OI, shift_II, factor, config.correction) for base_OI in bases]
        whole_OI = torch.cat(bases) if several else bases[0]
        alike = partial(swept, factor=factor, importance_I=importance_I)
        whole, loss_O = alike(slice(None)) if share is None else _swept_apart(alike, len(whole_OI), share, whole_OI.device)
    losses = torch.stack([loss.sum() for loss in loss_O.split(counts)]).tolist()
    records, metrics, end = dict[str, StoredWeight](), dict[str, dict[str, float]](), 0
    for name, base_OI, loss in zip(weights, bases, losses, strict=True):
        base, end = whole if not several else rows_on_grid(whole, slice(end, end + len(base_OI))), end + len(base_OI)
        base, loss = _refitted(base, loss, base_OI, weights[name], targets[name], known, config)
        records[name] = quantized(weights[name], base, config.activations)
        metrics[name] = feedback_metrics(factor, loss)
    return records, metrics


def _swept_apart(
    swept: Callable[[slice], tuple[UniformWeight | GgmlWeight, Tensor]], rows: int, share: BlockShare, device: torch.device
) -> tuple[UniformWeight | GgmlWeight, Tensor]:
    """(record, error of every row) of parts of the rows, each swept by its owner."""
    height = part_rows(rows)
    parts = [slice(start, min(start + height, rows)) for start in range(0, rows, height)]

    def solve(part: int) -> tuple[UniformWeight | GgmlWeight, Tensor]:
        record, loss_O = swept(parts[part])
        return (record, loss_O) if share.size == 1 else (_moved(record, "cpu"), loss_O.cpu())

    results = share.solved([float(part.stop - part.start) for part in parts], solve)
    return _moved(joined_rows([record for record, _ in results]), device), torch.cat([loss_O for _, loss_O in results]).to(device)


def _moved(record: UniformWeight | GgmlWeight, device: torch.device | str) -> UniformWeight | GgmlWeight:
    return replace(record, **{name: tensor.to(device) for name, tensor in to_tensors(record).items()})


@contextmanager
def _named(name: str, several: bool) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}" if several else str(error)) from error


def _stacked_masks(masks: list[Tensor | None], bases: list[Tensor]) -> Tensor | None:
    """Of all rows; None where no matrix has one."""
    if all(mask_OI is None for mask_OI in masks):
        return None
    whole = (torch.ones_like(b, dtype=torch.bool) if mask_OI is None else mask_OI for mask_OI, b in zip(masks, bases, strict=True))
    return torch.cat([*whole])


def _refitted(
    base: UniformWeight | GgmlWeight,
    loss: float,
    base_OI: Tensor,
    weight: StoredWeight,
    target_OI: Tensor,
    known: LayerStatistics,
    config: GptqConfig,
) -> tuple[UniformWeight | GgmlWeight, float]:
    """The codes with scales solved anew, where the config says so, and the squared error."""
    if config.refit is not None and isinstance(base, UniformWeight):
        moment_II = _seen(known.inputs.second_moment_II, weight)
        cross_II = moment_II + config.refit * _shift(weight, known) if config.refit else moment_II
        base = refit_scales(base, base_target(weight, target_OI), moment_II, cross_II, weight.mask_OI())
    if config.first_order or config.refit is not None:  # the sweep's own sum is not what is lost
        lost_OI = base_OI - base.dense() if weight.smooth is None else (base_OI - base.dense()) / weight.smooth.float()
        loss = float(((lost_OI @ known.inputs.second_moment_II) * lost_OI).sum())
    return base, loss


def gptq_nf(
    weight: StoredWeight, target_OI: Tensor, statistics: LayerStatistics, config: GptqNormalFloatConfig
) -> tuple[StoredWeight, dict[str, float]]:
    """GPTQ on a NormalFloat book, columns visited by falling mean square."""
    divide(target_OI.shape[1], config.block_size, "block_size")
    base_OI, factor = base_target(weight, target_OI), factor_of(statistics.inputs, config.damp, True, weight.smooth)
    if config.correction:
        base_OI = corrected_target(base_OI, _shift(weight, statistics), factor, config.correction)
    mask_OI = weight.mask_OI()
    absmax_OG = nf.absmax_of(base_OI if mask_OI is None else base_OI.where(mask_OI, 0), config.block_size)
    seen_OG = nf.dequantize_absmax(*nf.quantize_absmax(absmax_OG)) if config.double_quantize else absmax_OG
    codes_OI, loss = gptq_book(base_OI, factor, seen_OG, config.bits, mask_OI)
    base = normal_float_record(codes_OI, absmax_OG, config.bits, config.block_size, config.double_quantize)
    return quantized(weight, base, config.activations), feedback_metrics(factor, loss)


def feedback_metrics(factor: InverseFactor, loss: float) -> dict[str, float]:
    """What a sweep reports: squared output error per token (with the damping), the damping used, dead inputs."""
    dead = float(factor.dead)
    return {"squared_error": loss, "damp": factor.damp, "dead_inputs": dead, "dead_layer": float(factor.dead == len(factor.order_I))}


def _shift(weight: StoredWeight, statistics: LayerStatistics) -> Tensor:
    """E[(x_dense − x)·xᵀ] as the base sees its inputs."""
    inputs = statistics.inputs
    return _seen(finite(inputs.cross_moment_II, "cross moment") - inputs.second_moment_II, weight)


def _seen(moment_II: Tensor, weight: StoredWeight) -> Tensor:
    """A moment of the inputs as the base sees them: divided by what smooths them."""
    if weight.smooth is None:
        return moment_II
    return moment_II / (weight.smooth.float().unsqueeze(1) * weight.smooth.float())
