"""Audit of an export: read back and compared with what was to be written: zeros of the mask, grid, codes; of a lossless format every
value.

Scales and factors may be rounded by a format; these may not. Knows checkpoints; no format.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...compress.weights import DenseWeight, StoredWeight, UniformWeight
from .. import formats
from ..errors import QualityError
from ..formats.checkpoint import Checkpoint
from ..formats.naming import expert_parameter

OFFSET_ERROR = 2.0**-23
"""What a norm around 0 loses in float32 when a format keeps it around 1."""


def write_audited(format_: str, checkpoint: Checkpoint, output: Path, adapter: bool) -> list[str]:
    """What to tell the user. QualityError when what lies on disk is not what the checkpoint held."""
    notes = formats.write(format_, checkpoint, output, adapter)
    back, whole = formats.read_back(format_, output, checkpoint), formats.FORMATS[format_].whole
    for name, record in checkpoint.linears.items():
        problem = (every_value if whole else difference)(record, _read_back(back, checkpoint, name))
        if problem is not None:
            raise QualityError(f"{output}: {name}: {problem}; do not use it, and report this")
    for name, tensor in checkpoint.tensors.items() if whole else ():
        if not torch.allclose(back.tensors[name].float(), tensor.float(), rtol=0, atol=OFFSET_ERROR):
            raise QualityError(f"{output}: {name} came back with other values; do not use it, and report this")
    return notes


def every_value(record: StoredWeight, back: StoredWeight | Tensor) -> str | None:
    """Of a format that changes none: how many of a linear's values moved, its scales in float16 and what stands on top of them left out."""
    base = replace(record.base, scales=record.base.scales.half()) if isinstance(record.base, UniformWeight) else record.base
    moved = replace(record, base=base).base_dense() != (back.base_dense() if isinstance(back, StoredWeight) else back.float())
    return f"{int(moved.sum())} of {moved.numel()} values changed" if bool(moved.any()) else None


def difference(record: StoredWeight, back: StoredWeight | Tensor) -> str | None:
    """What a linear lost on its way through a format: `back` is its record, or the dense [O, I] matrix that stands for it."""
    mask = record.mask_OI()
    whole = record.low_rank is not None or record.delta is not None
    if mask is not None and (isinstance(back, StoredWeight) or not whole):
        dense = back.base_dense() if isinstance(back, StoredWeight) else back
        filled = int((dense[~mask] != 0).sum())
        if filled:
            return f"{filled} of the {int((~mask).sum())} weights that the mask holds at 0 are not 0"
    if isinstance(back, Tensor) or isinstance(back.base, DenseWeight) or isinstance(record.base, DenseWeight):
        return None
    if (record.base.bits, record.base.groups) != (back.base.bits, back.base.groups):
        return f"its grid of {record.base.bits} bits and {record.base.groups} groups became {back.base.bits} bits and {back.base.groups}"
    moved = record.base.codes_OI() != back.base.codes_OI()
    count = int((moved if mask is None else moved & mask).sum())
    return f"{count} codes changed" if count else None


def _read_back(back: Checkpoint, checkpoint: Checkpoint, name: str) -> StoredWeight | Tensor:
    if name in back.linears:
        return back.linears[name]
    parameter = expert_parameter(name)
    if parameter is not None:
        matrix, transposed = back.tensors[parameter][int(name.rpartition(".")[2])], parameter in checkpoint.transposed
    else:
        stored_as = checkpoint.tied.get(f"{name}.weight", f"{name}.weight")
        matrix, transposed = back.tensors[stored_as], name in checkpoint.transposed
    return matrix.T if transposed else matrix
