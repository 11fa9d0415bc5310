"""The operators in plain torch: what every fast path is tested against, and the backend of last resort.

Knows tensors only. All arithmetic in float32 (or float64 when asked), rounded once at the end.
Legend: M tokens, O out, I in, R rank, G groups of activations, S partial sums.
"""

import torch
from torch import Tensor

from .layout import Segments, TiledWeight


def quantize_activations(x_MI: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """(codes int8 [M, I], scales float32 [M, G]): symmetric, per token per group; the last group may be shorter.

    scale = absmax / (2^(bits−1) − 1); a group of zeros has scale 0 and codes 0; halves round away from zero."""
    rows, columns = x_MI.shape
    top = (1 << (bits - 1)) - 1
    grouped = torch.nn.functional.pad(x_MI.float(), (0, -columns % group_size)).view(rows, -1, group_size)
    absmax = grouped.abs().amax(-1)
    inverse = torch.where(absmax > 0, top / absmax, torch.zeros_like(absmax))
    scaled = grouped * inverse.unsqueeze(-1)
    codes = torch.where(scaled >= 0, (scaled + 0.5).floor(), (scaled - 0.5).ceil()).clamp_(-top, top)
    return codes.to(torch.int8).view(rows, -1)[:, :columns].contiguous(), absmax / top


def dequantize_activations(codes_MI: Tensor, scales_MG: Tensor, group_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[M, I]: code·scale of its group."""
    group = torch.arange(codes_MI.shape[1], device=codes_MI.device) // group_size
    return codes_MI.to(dtype) * scales_MG.to(dtype)[:, group]


def fake_quantize(x: Tensor, bits: int, group_size: int) -> Tensor:
    """x [..., I] through the dynamic grid of its last dimension and back, in x's dtype: what W4A8 and W4A4 make of an input."""
    rows = x.reshape(-1, x.shape[-1])
    codes, scales = quantize_activations(rows, bits, group_size)
    return dequantize_activations(codes, scales, group_size).to(x.dtype).view(x.shape)


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
