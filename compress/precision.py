"""Precision of float32 matmuls during training (TF32, bfloat16 products): for gradients only, never for statistics or measurements."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Matmul = Literal["auto", "highest", "high", "medium"]
"""auto: float32, but what is summed over a group before it is used (gradients of scales) is computed on a device's units for short
floats, where it has them. The others are torch's names: float32; TF32 on CUDA; bfloat16 products summed in float32 on a CPU that has them
(AMX, AVX512-BF16), TF32 on CUDA."""

_sums_are_short = False


@contextmanager
def matmuls(precision: Matmul) -> Iterator[None]:
    """Within, float32 products are computed with this precision; what was set before is set again after."""
    global _sums_are_short
    before = torch.get_float32_matmul_precision(), _sums_are_short
    torch.set_float32_matmul_precision("highest" if precision == "auto" else precision)
    _sums_are_short = precision == "auto"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        _sums_are_short = before[1]


def summed(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right for a reader who sums its entries: in short floats where `matmuls` allows it and the device has units for them."""
    if not _sums_are_short or not has_short_units(left.device):
        return left @ right
    with matmuls("medium"):
        return left @ right


def has_short_units(device: torch.device) -> bool:
    """Units that multiply short floats many times as fast as float32: AMX, tensor cores from Ampere on. AVX512-BF16 alone gains nothing."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16"))
