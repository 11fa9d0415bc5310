"""Activations on their dynamic grid (W4A8, W4A4): symmetric, per token and group, absmax at the top code; halves round away from zero.
A group size of −1 is the whole row: one scale a token.

The one rounding of inputs in the project: solvers, training, simulation and kernels call it or equal it. Knows tensors only.
Legend: M tokens, I in, G groups.
"""

import torch
from torch import Tensor


def group_columns(group_size: int, in_features: int) -> int:
    """Inputs of a group."""
    return max(in_features, 1) if group_size == -1 else group_size


def quantize_activations(x_MI: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """(codes int8 [M, I], scales float32 [M, G]): symmetric, per token per group; the last group may be shorter.

    scale = absmax / (2^(bits−1) − 1); a group of zeros has scale 0 and codes 0; halves round away from zero."""
    rows, columns = x_MI.shape
    group_size = group_columns(group_size, columns)
    top = (1 << (bits - 1)) - 1
    grouped = torch.nn.functional.pad(x_MI.float(), (0, -columns % group_size)).view(rows, -1, group_size)
    absmax = grouped.abs().amax(-1)
    inverse = torch.where(absmax > 0, top / absmax, torch.zeros_like(absmax))
    scaled = grouped * inverse.unsqueeze(-1)
    codes = torch.where(scaled >= 0, (scaled + 0.5).floor(), (scaled - 0.5).ceil()).clamp_(-top, top)
    return codes.to(torch.int8).view(rows, -1)[:, :columns].contiguous(), absmax / top


def dequantize_activations(codes_MI: Tensor, scales_MG: Tensor, group_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[M, I]: code·scale of its group."""
    group = torch.arange(codes_MI.shape[1], device=codes_MI.device) // group_columns(group_size, codes_MI.shape[1])
    return codes_MI.to(dtype) * scales_MG.to(dtype)[:, group]


def fake_quantize(x: Tensor, bits: int, group_size: int) -> Tensor:
    """x [..., I] through the dynamic grid of its last dimension and back, in x's dtype: what W4A8 and W4A4 make of an input."""
    rows = x.reshape(-1, x.shape[-1])
    codes, scales = quantize_activations(rows, bits, group_size)
    return dequantize_activations(codes, scales, group_size).to(x.dtype).view(x.shape)
