"""Error metrics: a `Metric` built from a matrix's statistics, and numbers that describe those statistics.

Knows statistics; not what is done with the metric.
Legend: O out, I in.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from .lowrank import Metric
from .statistics import LayerStatistics

_OUTPUTS = 8192
"""Rows of a matrix that are multiplied at once."""

MetricName = Literal["plain", "absmean", "diagonal", "fisher", "second_moment"]
"""plain ‖E‖_F (LoftQ, ZeroQuant-V2); absmean ‖E·diag E|x|‖ (L²QER); diagonal ‖E·diag √E[x²]‖ (QERA-approx); fisher
‖√row mean · E · √column mean‖ (LQ-LoRA); second_moment ‖E·R^½‖, the output error itself (QERA-exact, EoRA, CLoQ, CALDERA)."""


def metric_of(statistics: LayerStatistics, name: MetricName) -> tuple[Metric, dict[str, float]]:
    """The metric, and notes: `tokens_short_of` (the number that would do, when there are fewer tokens than input features),
    `moment_singular`, `statistics_zero` (no input was ever non-zero, or the Fisher diagonal is 0: the plain metric stands in),
    `fisher_rows_zero`. ValueError for statistics with NaN or Inf, or a Fisher diagonal that was not collected."""
    inputs = statistics.inputs
    if name == "plain":
        return Metric(), {}
    if name == "fisher":
        return _fisher(statistics)
    broken = inputs.non_finite()
    if broken is not None:
        raise ValueError(f"the calibration statistic {broken} holds NaN or Inf; look at the layers below, or use metric: plain")
    notes = {"tokens_short_of": float(inputs.features)} if inputs.tokens < inputs.features else {}
    if name == "second_moment":
        moment_II = inputs.second_moment_II.double()
        if not bool((moment_II.diagonal() > 0).any()):
            return Metric(), notes | {"statistics_zero": 1.0}
        return Metric(moment_II=moment_II), notes | ({"moment_singular": 1.0} if _singular(moment_II) else {})
    column_I = inputs.absmean_I if name == "absmean" else inputs.norm_I / max(inputs.tokens, 1) ** 0.5
    return (Metric(column_I=column_I), notes) if bool(column_I.any()) else (Metric(), notes | {"statistics_zero": 1.0})


def gradient_squares(statistics: LayerStatistics) -> Tensor:
    """G, float64 [O]: the mean square of the loss's gradient at each output, up to one factor for all matrices, so that Σ_o G_o·E‖e_o·x‖² is
    the second-order estimate of what an error costs the loss (a Kronecker-factored Fisher matrix, its output side diagonal).
    Read off the Fisher diagonal: F_oj ≈ G_o·R_jj, so G_o = row mean of F / mean of diag R, R the inputs' second moment."""
    if statistics.fisher is None:
        raise ValueError("the gradient at the outputs needs the Fisher diagonal, which was not collected")
    inputs = statistics.inputs
    mean = inputs.norm_I.double().square().mean() / max(inputs.tokens, 1)
    return statistics.fisher.row_mean_O.double() / mean.clamp(min=torch.finfo(torch.float32).tiny)


def output_error(weight_OI: Tensor, target_OI: Tensor, x_TI: Tensor) -> float | None:
    """E‖(W − Ŵ)x‖² / E‖Wx‖² over the rows of x: what of a matrix' output is lost, the same for every method. None where it is no number."""
    lost, whole = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for ours_OI, wanted_OI in zip(weight_OI.float().split(_OUTPUTS), target_OI.float().split(_OUTPUTS), strict=True):
        x_TI = x_TI.to(wanted_OI)
        lost += (x_TI @ (wanted_OI - ours_OI).T).square_().sum(dtype=torch.float64).cpu()
        whole += (x_TI @ wanted_OI.T).square_().sum(dtype=torch.float64).cpu()
    result = float(lost / whole) if whole > 0 else float(lost)
    return result if math.isfinite(result) else None


def _fisher(statistics: LayerStatistics) -> tuple[Metric, dict[str, float]]:
    """D1 = √row mean, D2 = √column mean of the Fisher diagonal (arXiv:2311.12023, section 3.3)."""
    if statistics.fisher is None:
        raise ValueError("metric: fisher needs the Fisher diagonal of this weight, which was not collected; choose another metric")
    row_O, column_I = statistics.fisher.row_mean_O.double().sqrt(), statistics.fisher.column_mean_I.double().sqrt()
    if not bool(torch.isfinite(row_O).all() and torch.isfinite(column_I).all()):
        raise ValueError("the Fisher diagonal holds NaN, Inf or negative numbers: the gradients overflowed; collect it in float32")
    if not bool(row_O.any() and column_I.any()):
        return Metric(), {"statistics_zero": 1.0}
    silent = float((row_O == 0).sum())
    return Metric(_without_zeros(row_O), column_I), {"fisher_rows_zero": silent} if silent else {}


def _without_zeros(row_O: Tensor) -> Tensor:
    """A row of no account weighs a thousandth of the mean: the solution divides by it."""
    return row_O.clamp(min=1e-3 * row_O.mean().item())


def _singular(moment_II: Tensor) -> bool:
    """Whether the correlation matrix's smallest eigenvalue is below 1e-6 (dead inputs, too few tokens)."""
    scale_I = moment_II.diagonal().double().clamp(min=0).sqrt()
    if not bool((scale_I > 0).all()):
        return True
    correlation_II = (moment_II.double() / scale_I).div_(scale_I.unsqueeze(1))
    correlation_II.diagonal().sub_(1e-6)
    return bool(torch.linalg.cholesky_ex(correlation_II).info)
