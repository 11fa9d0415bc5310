"""Others' 4-bit operators on the same weights, for the benchmark's table: torch's own int4 product, and gemlite where it is installed.

Knows records and how each wants them packed; not how time is measured.
Legend: M rows of activations, O out, I in, G groups.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..compress.weights import StoredWeight, UniformWeight

INNER_TILES = 8
TORCH_GROUPS = (32, 64, 128, 256)
MIDDLE = 8
"""torch counts a code from here: w = (q − 8)·scale + zero."""
Rival = tuple[Callable[[Tensor], Tensor], int]


def rivals(stored: StoredWeight) -> dict[str, Callable[[], Rival]]:
    """Name → how it is built (x [M, I] bfloat16 → y [M, O], and the bytes that it keeps); none for what is more than 4-bit codes in groups."""
    base = stored.base
    if not isinstance(base, UniformWeight) or base.bits != 4 or stored.low_rank is not None or stored.activations is not None:
        return {}
    found: dict[str, Callable[[], Rival]] = {}
    if base.group_size in TORCH_GROUPS:
        found["torch int4"] = lambda: torch_int4(base)
    if base.scales.device.type == "cuda" and find_spec("gemlite") is not None:
        found["gemlite"] = lambda: gemlite(base)
    return found


def torch_int4(base: UniformWeight) -> Rival:
    """aten's tinygemm product: scales and zeros of a group stand side by side in bfloat16."""
    codes_OI, scales_OG = base.codes_OI(), base.scales.float()
    both = torch.stack((scales_OG, (MIDDLE - base.zeros_OG()) * scales_OG), dim=2).transpose(0, 1).contiguous().to(torch.bfloat16)
    aten: Any = torch.ops.aten
    if scales_OG.device.type == "cpu":
        packed = aten._convert_weight_to_int4pack_for_cpu(codes_OI.int(), INNER_TILES)
        product = aten._weight_int4pack_mm_for_cpu
    else:
        pairs = (codes_OI[:, ::2] << 4 | codes_OI[:, 1::2]).to(torch.uint8)
        packed = aten._convert_weight_to_int4pack(pairs, INNER_TILES)
        product = aten._weight_int4pack_mm
    kept = packed.numel() * packed.element_size() + both.numel() * both.element_size()
    return (lambda x: product(x, packed, base.group_size, both)), kept


def gemlite(base: UniformWeight) -> Rival:
    from gemlite.core import DType, GemLiteLinearTriton  # type: ignore[import-not-found]

    out, inputs = base.shape
    made = GemLiteLinearTriton(4, base.group_size, inputs, out, input_dtype=DType.BF16, output_dtype=DType.BF16)
    made.pack(base.codes_OI(), base.scales.float().reshape(-1, 1), base.zeros_OG().reshape(-1, 1), None)
    kept = sum(tensor.numel() * tensor.element_size() for tensor in (*made.parameters(), *made.buffers()))
    return made, kept
