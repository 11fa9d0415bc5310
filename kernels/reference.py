"""The operators in plain torch: what every fast path is tested against, and the backend of last resort.

Knows tensors only. All arithmetic in float32 (or float64, by `dtype`), rounded once at the end.
Legend: M tokens, O out, I in, R rank, G groups of activations, S partial sums.
"""

import torch
from torch import Tensor

from ..compress.activation_grid import dequantize_activations, group_columns, quantize_activations
from .layout import Segments, TiledWeight


def quantize_down(
    x_MI: Tensor, smooth_I: Tensor | None, down_RI: Tensor | None, bits: int = 8, group_size: int = 64
) -> tuple[Tensor, Tensor, Tensor | None]:
    """codes int8 [M, I] and scales float32 [M, G] of x / smooth, and h float32 [M, R] = x·downᵀ of the raw x."""
    smoothed = x_MI.float() if smooth_I is None else x_MI.float() / smooth_I.float()
    codes, scales = quantize_activations(smoothed, bits, group_size)
    return codes, scales, None if down_RI is None else x_MI.float() @ down_RI.float().t()


def lowbit_matmul_up(
    codes_MI: Tensor,
    scales_MG: Tensor,
    weight: TiledWeight,
    h_MR: Tensor | None = None,
    up_OR: Tensor | None = None,
    bias_O: Tensor | None = None,
    *,
    group_size: int = 64,
    segments: Segments | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[M, O] in `dtype`: dequantized activations times dequantized weight, plus h·upᵀ and the bias."""
    x_MI = dequantize_activations(codes_MI, scales_MG, group_size)
    return weight_only_matmul_up(x_MI, weight, h_MR, up_OR, bias_O, segments=segments).to(dtype)


def two_level_matmul_up(
    codes_MI: Tensor,
    scales_MG: Tensor,
    weight: TiledWeight,
    h_MR: Tensor | None = None,
    up_OR: Tensor | None = None,
    bias_O: Tensor | None = None,
    *,
    group_size: int = 64,
    segments: Segments | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[M, O] in `dtype`: the same by whole numbers, summed exactly over each of the input's groups, then scaled by it and by the output's
    own float (QServe, arXiv:2405.04532, §4.1). ValueError where the weight's scales are no such products."""
    if weight.two_levels is None:
        raise ValueError("weight's scales are no whole numbers times one float an output")
    (level_GO, channel_O), inputs = weight.two_levels, weight.in_features
    group = torch.arange(inputs, device=weight.device) // weight.group_size
    zeros = float(1 << (weight.bits - 1)) if weight.zeros is None else weight.zeros.double().t()[:, group]
    whole_OI = (weight.codes_OI().double() - zeros) * level_GO.double().t()[:, group]
    x_MI, width = codes_MI.double(), group_columns(group_size, inputs)
    y = x_MI.new_zeros(len(x_MI), weight.shape[0])
    for g, first in enumerate(range(0, inputs, width)):  # float64 holds the sums of bytes' products exactly
        sums = x_MI[:, first : first + width] @ whole_OI[:, first : first + width].t()
        y += sums * scales_MG[:, g : g + 1].double()
    return _finished(y * channel_O.double(), h_MR, up_OR, bias_O, segments).to(dtype)


def _finished(y: Tensor, h_MR: Tensor | None, up_OR: Tensor | None, bias_O: Tensor | None, segments: Segments | None) -> Tensor:
    """y [M, O], added to in place, + h·upᵀ of every segment + bias."""
    if up_OR is not None:
        assert h_MR is not None
        h = h_MR.to(y.dtype).sum(0) if h_MR.dim() == 3 else h_MR.to(y.dtype)
        for row, rows, rank, ranks in segments if segments is not None else ((0, *up_OR.shape[:1], 0, up_OR.shape[1]),):
            y[:, row : row + rows] += h[:, rank : rank + ranks] @ up_OR[row : row + rows, :ranks].to(y.dtype).t()
    return y if bias_O is None else y + bias_O.to(y.dtype)


def weight_only_matmul_up(
    x_MI: Tensor,
    weight: TiledWeight,
    h_MR: Tensor | None = None,
    up_OR: Tensor | None = None,
    bias_O: Tensor | None = None,
    *,
    down_RI: Tensor | None = None,
    segments: Segments | None = None,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """[M, O] in x's dtype: x·Wᵀ + h·upᵀ + bias. h float [M, R] or partial sums [S, M, R], or made here from `down_RI`;
    a segment (row, rows, rank, ranks) reads its own ranks of h."""
    x = x_MI.to(compute)
    y = x @ weight.dense(compute).t()
    if up_OR is not None and h_MR is None:
        assert down_RI is not None, "up_OR without h_MR needs down_RI"
        h_MR = x @ down_RI.to(compute).t()
    return _finished(y, h_MR, up_OR, bias_O, segments).to(x_MI.dtype)
