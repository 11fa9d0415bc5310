"""Predicted baseline size of a checkpoint that another program quantized, before it is imported.

Knows formats and headers; loads one matrix of each kind (shape, parts and their dtypes), for those of a kind store alike.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...compress.weights import to_tensors
from ..formats import detect, read
from ..formats.shards import Stored, open_directory
from ..models.sizes import Size, Sizes, dense_sizes
from ..models.source import weights_home
from ..models.structure import Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOATS = {"F16": 2, "BF16": 2, "F32": 4}


def imported_sizes(source: Path, model: "PreTrainedModel", structure: Structure) -> Sizes | None:
    """Sizes with every quantized matrix as its record; None for a dense checkpoint."""
    home = weights_home(source)
    if detect(home) == "dense":
        return None
    checkpoint, headers = read(source), open_directory(home)
    parts = {name: _parts(name, headers) for name in checkpoint.linears}
    packed = {f"{name}.{part}" for name, result in parts.items() for part, *_ in result}
    plain = [entry for name, entry in headers.items() if name not in packed and entry.dtype in FLOATS]
    element = FLOATS[max(plain, key=lambda entry: entry.size_bytes).dtype] if plain else 2
    sizes = dense_sizes(model, structure, element)
    known: dict[object, Size] = {}
    table = structure.embeddings
    for name in checkpoint.linears:
        own = str(sizes.embeddings) if table is not None and name == table.name else name
        if own not in sizes.of:
            continue
        kind = (sizes.weights[own], parts[name])
        if home != source or kind not in known or not parts[name]:  # with an adapter, the headers of the base are not everything
            known[kind] = _size(checkpoint.linears[name])
        sizes.of[own] = replace(known[kind])
    return sizes


def _parts(name: str, headers: dict[str, Stored]) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    own = f"{name}."
    return tuple(sorted((n.removeprefix(own), entry.shape, entry.dtype) for n, entry in headers.items() if n.startswith(own)))


def _size(record: Any) -> Size:
    low_rank = 0 if record.low_rank is None else record.low_rank.stored_bits()
    mask = 0 if record.mask is None else 8 * record.mask.numel()
    return Size(
        record.stored_bits() - low_rank - mask, mask, low_rank, tuple(f"base.{part}" for part in to_tensors(record.base)), compressed=True
    )
