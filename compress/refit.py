"""The scales of a grid weight solved anew once its codes are known: least squares in the G scales of each row.

GPTQ fixes a scale before it knows which errors its codes will compensate, and by the compressed model's inputs. Here every row solves
min_s E‖w·x′ − (s ∘ l)·x‖², x what the compressed model feeds the matrix, x′ what the dense one would, or anything between.
Knows one matrix and its statistics. Legend: O out, I in, G groups.
"""

from dataclasses import replace

import torch
from torch import Tensor

from .weights import UniformWeight

_RIDGE = 1e-6
"""Of a row's mean diagonal, in float64: only for scales that nothing depends on."""
_REACH = 0.5
"""A scale that would move by more than this share of itself stays as it is: its row is all but undetermined."""


def refit_scales(
    base: UniformWeight, target_OI: Tensor, moment_II: Tensor, cross_II: Tensor, mask_OI: Tensor | None = None
) -> UniformWeight:
    """The record with other scales, in their dtype; codes and zeros as they are.

    target: float32 [O, I], what the matrix should be; moment E[x xᵀ] and cross E[x′ xᵀ], float32 [I, I].
    """
    levels_OI, columns_I = _levels(base, mask_OI)
    normal_OGG, right_OG = _normal_equations(levels_OI, columns_I, base.groups, moment_II, target_OI @ cross_II)
    start_OG = base.scales.double()
    diagonal_OG = normal_OGG.diagonal(dim1=1, dim2=2)
    diagonal_OG += _RIDGE * diagonal_OG.mean(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    left_OG = right_OG - (normal_OGG @ start_OG.unsqueeze(-1)).squeeze(-1)
    moved_OG = torch.linalg.solve(normal_OGG, left_OG.unsqueeze(-1)).squeeze(-1)
    held = moved_OG.abs() > _REACH * start_OG
    return replace(base, scales=torch.where(held, start_OG, start_OG + moved_OG).to(base.scales.dtype))


def _levels(base: UniformWeight, mask_OI: Tensor | None) -> tuple[Tensor, Tensor]:
    """(code − zero, float32 [O, I], 0 where masked; the group of each column, int64 [I])."""
    columns = base.shape[1]
    if base.group_index is not None:
        columns_I = base.group_index.long()
    else:
        columns_I = torch.arange(columns, device=base.codes.device) // (columns // base.groups)
    levels_OI = base.codes_OI().float() - base.zeros_OG()[:, columns_I]
    return (levels_OI if mask_OI is None else levels_OI * mask_OI), columns_I


def _normal_equations(levels_OI: Tensor, columns_I: Tensor, groups: int, moment_II: Tensor, wanted_OI: Tensor) -> tuple[Tensor, Tensor]:
    """(E[(l_g·x)(l_h·x)] float64 [O, G, G], E[(w·x′)(l_g·x)] float64 [O, G]); `wanted` is w·E[x′ xᵀ]."""

    def by_group(matrix_OI: Tensor) -> Tensor:
        return torch.zeros(len(matrix_OI), groups, device=matrix_OI.device).index_add_(1, columns_I, matrix_OI).double()

    rows = [by_group((levels_OI[:, own] @ moment_II[own]).mul_(levels_OI)) for own in (columns_I == g for g in range(groups))]
    return torch.stack(rows, 1), by_group(wanted_OI * levels_OI)
