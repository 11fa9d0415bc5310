"""Binds a prepared weight to the Triton kernels. Knows prepared weights and launchers; not modules."""

import torch

from .operators import Operator
from .prepare import Prepared

NAME = "triton"


def operator_for(prepared: Prepared, place: torch.device, dtype: torch.dtype, forced: bool) -> tuple[Operator, str]:
    raise ValueError("triton backend is being built")


def availability(place: torch.device) -> str:
    return "triton" if place.type == "cuda" else "only on CUDA"
