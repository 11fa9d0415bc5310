"""How exactly float32 matrices are multiplied while something trains: a choice for gradients, never for statistics or measurements."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Matmul = Literal["highest", "high", "medium"]
"""torch's names: float32; TF32 on CUDA; bfloat16 products summed in float32 on a CPU that has them (AMX, AVX512-BF16), TF32 on CUDA."""


@contextmanager
def matmuls(precision: Matmul) -> Iterator[None]:
    """Within, float32 products are computed with this precision; what was set before is set again after."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
