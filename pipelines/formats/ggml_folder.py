"""Directories whose matrices are stored as ggml's blocks: the imported form of a GGUF file, its codes bit for bit.

`quantization_config` has quant_method "ggml" and `types`, the block type of every matrix; `<matrix>.blocks` uint8 [O, bytes of a row] are the
file's own blocks, rows in the model's order. Read by the baseline alone, written by the import alone. Knows no GGUF files.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import cast

from torch import Tensor

from ...compress.ggml_types import GGML_TYPES, GgmlName
from ...compress.weights import GgmlWeight, StoredWeight
from ..errors import InputError
from ..store.files import read_json
from .checkpoint import Checkpoint, Lazy
from .folder import read_config
from .ggml_blocks import pack, unpack
from .shards import Stored, open_directory, write_json, write_shards

METHOD = "ggml"
_BLOCKS = "blocks"


def write(records: Mapping[str, GgmlWeight], tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Weights, and the types into the config.json that is there."""
    blocks = ((f"{name}.{_BLOCKS}", pack(record)) for name, record in records.items())
    write_shards(directory, [*tensors.items(), *blocks])
    types = {name: record.type for name, record in records.items()}
    config = read_json(directory / "config.json")
    write_json(directory / "config.json", {**config, "quantization_config": {"quant_method": METHOD, "types": types}})


def read(directory: Path) -> Checkpoint:
    """InputError for a type that is none of ggml's here, and for blocks that are missing or of another size."""
    config, quantization = read_config(directory)
    stored, types = open_directory(directory), (quantization or {}).get("types") or {}
    checked = {name: _checked(directory, stored, name, kind) for name, kind in types.items()}
    linears = {name: partial(_record, stored[f"{name}.{_BLOCKS}"], *result) for name, result in checked.items()}
    plain = {name: entry.load for name, entry in stored.items() if name.removesuffix(f".{_BLOCKS}") not in types}
    return Checkpoint(config, Lazy(linears), Lazy(plain), files=directory)


def _checked(directory: Path, stored: Mapping[str, Stored], name: str, kind: str) -> tuple[GgmlName, tuple[int, int]]:
    """(type, shape) of a matrix."""
    entry, layout = stored.get(f"{name}.{_BLOCKS}"), GGML_TYPES.get(kind)
    if layout is None:
        raise InputError(f"{directory}: {name} is of type {kind!r}; read are {', '.join(GGML_TYPES)}")
    size = layout.block_bits // 8
    if entry is None or entry.dtype != "U8" or len(entry.shape) != 2 or entry.shape[1] % size:
        held = "nothing" if entry is None else f"{entry.dtype} {list(entry.shape)}"
        raise InputError(
            f"{directory}: {name}.{_BLOCKS} holds {held}, not rows of {size}-byte blocks of {kind}; import the GGUF file again"
        )
    return cast(GgmlName, kind), (entry.shape[0], entry.shape[1] // size * layout.columns)


def _record(entry: Stored, kind: GgmlName, shape: tuple[int, int]) -> StoredWeight:
    return StoredWeight(unpack(entry.load(), kind, shape))
