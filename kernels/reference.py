"""The operators in plain torch: what every fast path is tested against, and the backend of last resort.

Knows tensors only. All arithmetic in float32 (or float64 when asked), rounded once at the end.
Legend: M tokens, O out, I in, R rank, G groups of activations, S partial sums.
"""

import torch
from torch import Tensor

from ..compress.activation_grid import dequantize_activations, quantize_activations
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
    if up_OR is not None:
        if h_MR is None:
            assert down_RI is not None, "up_OR without h_MR needs down_RI"
            h_MR = x @ down_RI.to(compute).t()
        h = h_MR.to(compute).sum(0) if h_MR.dim() == 3 else h_MR.to(compute)
        for row, rows, rank, ranks in segments if segments is not None else ((0, *up_OR.shape[:1], 0, up_OR.shape[1]),):
            y[:, row : row + rows] += h[:, rank : rank + ranks] @ up_OR[row : row + rows, :ranks].to(compute).t()
    return (y if bias_O is None else y + bias_O.to(compute)).to(x_MI.dtype)
