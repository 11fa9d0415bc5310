"""Which of ggml's block types holds a record exactly, value for value.

A uniform grid fits where its groups are whole blocks of 32 columns, its scale is a float16, and its levels (code − zero point) lie in those of a
type; a zero point needs no minimum then, only room. Knows records and types; no bytes, no names.
Legend: O out, I in, G groups, B blocks.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...compress.ggml_types import GGML_TYPES, GgmlName
from ...compress.weights import DenseWeight, GgmlWeight, NormalFloatWeight, StoredWeight, UniformWeight
from ..errors import UsageError
from .checkpoint import half_scales, refuse_beyond_codes, refuse_other_grid

LABEL = "GGUF"
BLOCK = 32
LEGACY: tuple[GgmlName, ...] = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
"""From the smallest to the largest."""
FLOATS: Mapping[str, torch.dtype] = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def held(name: str, record: StoredWeight) -> tuple[GgmlWeight | DenseWeight, bool]:
    """(the record on the smallest block type that holds its values, or densely where it is dense, whether float16 rounded a scale).

    UsageError, with the setting that would make it fit, for a grid that no type has.
    """
    refuse_beyond_codes(name, record, LABEL)
    base = record.base
    if isinstance(base, DenseWeight):
        return DenseWeight(record.dense(base.weight.dtype)), False
    if isinstance(base, GgmlWeight):
        return _masked(name, base, record.mask_OI()), False
    if isinstance(base, NormalFloatWeight):
        refuse_other_grid(name, base, LABEL)
    return _on_blocks(name, base, record.mask_OI())


def _on_blocks(name: str, base: UniformWeight, mask_OI: Tensor | None) -> tuple[GgmlWeight, bool]:
    rows, columns = base.shape
    if base.group_index is not None:
        raise UsageError(
            f"{name}: its groups are scattered over the columns, ggml's blocks are {BLOCK} neighbours; set act_order to static or false"
        )
    if columns % BLOCK or (columns // base.groups) % BLOCK:
        raise UsageError(
            f"{name}: groups of {columns // base.groups} of {columns} columns, ggml's blocks have {BLOCK}; "
            f"--set quantize.group_size={BLOCK} (or a multiple) fits, --format dense carries it as it is"
        )
    scales_OG, rounded = half_scales(name, base.scales, LABEL)
    zeros_OG, per_group = base.zeros_OG(), columns // base.groups
    levels = base.codes_OI().float().view(rows, base.groups, per_group) - zeros_OG.unsqueeze(-1)
    if mask_OI is not None:
        levels = levels.where(mask_OI.view_as(levels), 0)
    scales_OB = scales_OG.repeat_interleave(per_group // BLOCK, dim=1)
    minima_OG = scales_OG.float() * zeros_OG
    tries: dict[bool, Callable[[GgmlName], GgmlWeight | None]] = {
        False: lambda type: _symmetric(levels, scales_OB, type),
        True: lambda type: _with_minimum(levels, zeros_OG, minima_OG, scales_OB, type),
    }
    for type in LEGACY:
        made = tries[GGML_TYPES[type].minima](type)
        if made is not None:
            return made, rounded
    whole = torch.equal(levels, levels.round())
    kind = f"zero points that are no whole numbers ({zeros_OG.min():g}…{zeros_OG.max():g})" if not whole else "levels"
    raise UsageError(
        f"{name}: {kind} {'with minima that are no float16' if not whole else f'{levels.min():g}…{levels.max():g}'}, which none of "
        f"{', '.join(LEGACY).upper()} holds exactly; --set quantize.symmetric=true or quantize.grid=q4_k fits, --format dense carries it as it is"
    )


def _symmetric(levels_OGS: Tensor, scales_OB: Tensor, type: GgmlName) -> GgmlWeight | None:
    """d·(code − zero); None where a level is a fraction or out of reach."""
    layout, rows = GGML_TYPES[type], len(levels_OGS)
    codes = levels_OGS + layout.zero
    if not torch.equal(codes, codes.round()) or codes.min() < 0 or codes.max() >= 1 << layout.bits:
        return None
    return GgmlWeight.from_codes(codes.view(rows, -1).to(torch.uint8), scales_OB, None, None, type)


def _with_minimum(levels_OGS: Tensor, zeros_OG: Tensor, minima_OG: Tensor, scales_OB: Tensor, type: GgmlName) -> GgmlWeight | None:
    """d·code − m; None where scale · zero is no float16, or a code is out of reach."""
    layout, rows = GGML_TYPES[type], len(levels_OGS)
    codes = levels_OGS + zeros_OG.unsqueeze(-1)
    exact = torch.equal(minima_OG.half().float(), minima_OG) and torch.equal(codes, codes.round())
    if not exact or codes.min() < 0 or codes.max() >= 1 << layout.bits:
        return None
    minima_OB = minima_OG.repeat_interleave(scales_OB.shape[1] // minima_OG.shape[1], dim=1)
    return GgmlWeight.from_codes(codes.view(rows, -1).to(torch.uint8), scales_OB, minima_OB, None, type)


def _masked(name: str, base: GgmlWeight, mask_OI: Tensor | None) -> GgmlWeight:
    """A mask's zeros are codes of their own where 0 is on the grid, whatever the codes beneath it were."""
    if mask_OI is None:
        return base
    if base.layout.minima:
        raise UsageError(
            f"{name}: {base.type} has minima, and no code of it is 0 for the weights that the mask removes; --format dense carries it"
        )
    codes = base.codes_OI().where(mask_OI, torch.tensor(base.layout.zero, dtype=torch.uint8))
    small = base.small_codes_OG()[0] + base.layout.scale_zero if base.small_codes is not None else None
    small_OBK = None if small is None else small.to(torch.uint8).view(base.shape[0], -1, base.layout.small_codes)
    return GgmlWeight.from_codes(codes, base.super_scales, None, small_OBK, base.type)


def float_type(tensor: Tensor) -> str:
    """The narrowest of FLOATS that holds a tensor exactly; vectors are F32, as llama.cpp wants its norms and biases."""
    if tensor.dim() < 2:
        return "F32"
    return next((n for n, dtype in FLOATS.items() if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)), "F32")
