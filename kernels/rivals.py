"""Third-party 4-bit operators on the same weights, for the benchmark's table: torch's own int4 product, and gemlite where it is installed.

Knows records and how each wants them packed; not how time is measured.
Legend: M rows of activations, O out, I in, G groups.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from ..compress.weights import StoredWeight, UniformWeight
from . import torch_int4

Rival = tuple[Callable[[Tensor], Tensor], int]


def rivals(stored: StoredWeight) -> dict[str, Callable[[], Rival]]:
    """Name → how it is built (x [M, I] bfloat16 → y [M, O], and the bytes that it keeps); none for what is more than 4-bit codes in groups and a
    low-rank term, which no such operator knows and which stands behind it in two products of its own."""
    base = stored.base
    if not isinstance(base, UniformWeight) or base.bits != 4 or stored.activations is not None:
        return {}
    builders: dict[str, Callable[[], Rival]] = {}
    if base.group_size in torch_int4.GROUPS:
        builders["torch int4"] = lambda: tinygemm(base)
    if base.scales.device.type == "cuda" and find_spec("gemlite") is not None:
        builders["gemlite"] = lambda: gemlite(base)
    if stored.low_rank is None:
        return builders
    up, down = stored.low_rank.factors(torch.bfloat16)
    return {f"{name}, unfused rank": partial(with_rank, build, up, down) for name, build in builders.items()}


def with_rank(build: Callable[[], Rival], up: Tensor, down: Tensor) -> Rival:
    """The operator, then h = x·downᵀ and h·upᵀ onto its output; factors of its own, which a cache would else hold for all copies."""
    (base, kept), up, down = build(), up.clone(), down.clone()
    return (lambda x: torch.addmm(base(x), x @ down.t(), up.t())), kept + sum(t.numel() * t.element_size() for t in (up, down))


def tinygemm(base: UniformWeight) -> Rival:
    packed, both = torch_int4.pack(base.codes_OI(), base.scales.t(), base.zeros_OG().t())
    kept = packed.numel() * packed.element_size() + both.numel() * both.element_size()
    return (lambda x: torch_int4.multiply(x, packed, both, base.group_size)), kept


def gemlite(base: UniformWeight) -> Rival:
    from gemlite.core import DType, GemLiteLinearTriton  # type: ignore[import-not-found]

    out, inputs = base.shape
    made = GemLiteLinearTriton(4, base.group_size, inputs, out, input_dtype=DType.BF16, output_dtype=DType.BF16)
    made.pack(base.codes_OI(), base.scales.float().reshape(-1, 1), base.zeros_OG().reshape(-1, 1), None)
    kept = sum(tensor.numel() * tensor.element_size() for tensor in (*made.parameters(), *made.buffers()))
    return made, kept
