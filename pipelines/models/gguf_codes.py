"""Which matrices of a GGUF file keep their codes when it is imported: those whose blocks, rows put in the model's order, are the loaded matrix.

transformers loads the file and knows what every family changes; a matrix is kept as blocks only where these stand for the very numbers that it
made. Legend: O out, I in.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...compress.ggml_types import GGML_TYPES
from ...compress.weights import GgmlWeight
from ..demo import imported
from ..formats import ggml_folder
from ..formats.ggml_blocks import unpack
from .structure import Site, inspect, tied_names

log = logging.getLogger("bitmend")


def import_gguf(path: Path) -> Path:
    """`imported.import_gguf`, matrices in the blocks that the file has."""
    return imported.import_gguf(path, _save, "-codes")


def _save(model: Any, gguf: Path, directory: Path) -> None:
    """Write the model as it is, but for the matrices whose codes are kept."""
    records = kept_codes(model, gguf)
    if not records:
        imported.save_dense(model, gguf, directory)
        return
    sites, tied = {site.name: site for site in _sites(model)}, tied_names(model)
    instead = {f"{sites[name].module}.{sites[name].parameter}" for name in records}
    plain = {n: t.contiguous() for n, t in model.state_dict().items() if n not in instead and n not in tied}
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    ggml_folder.write(records, plain, directory)
    counts = ", ".join(f"{count} {kind}" for kind, count in Counter(record.type for record in records.values()).items())
    log.info("%s: %d matrices keep their codes (%s)", gguf.name, len(records), counts)


def kept_codes(model: Any, gguf: Path) -> dict[str, GgmlWeight]:
    """Record by the name of the matrix."""
    from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

    reader = GGUFReader(gguf)
    family = reader.fields["general.architecture"].contents()
    known = next((architecture for architecture, name in MODEL_ARCH_NAMES.items() if name == family), None)
    quantized = {t.name: t for t in reader.tensors if t.tensor_type.name.lower() in GGML_TYPES and len(t.shape) == 2}
    if known is None or not quantized:
        return {}
    names, found = get_tensor_name_map(known, inspect(model).blocks), dict[str, GgmlWeight]()
    tied = tied_names(model)
    for site in _sites(model):
        parameter = f"{site.module}.{site.parameter}"
        theirs = names.get_name(parameter, try_suffixes=(".weight",))
        if site.expert is None and parameter not in tied and theirs in quantized:
            tensor = quantized[theirs]
            blocks = torch.from_numpy(tensor.data.copy())
            record = _matching(blocks, tensor.tensor_type.name.lower(), site.read(model.get_parameter(parameter).detach()), model.config)
            if record is None:
                log.warning("%s: %s is changed by its family and is imported densely", gguf.name, theirs)
            else:
                found[site.name] = record
    return found


def _sites(model: Any) -> list[Site]:
    structure = inspect(model, include_head=True)
    return [*structure.sites, *([structure.embeddings] if structure.embeddings is not None else [])]


def _matching(blocks: Tensor, kind: Any, weight_OI: Tensor, config: Any) -> GgmlWeight | None:
    """The blocks as they lie, or with the rows of Llama's query and key heads put back."""
    rows, columns = weight_OI.shape
    if blocks.ndim != 2 or len(blocks) != rows or blocks.shape[1] * 8 * GGML_TYPES[kind].columns != columns * GGML_TYPES[kind].block_bits:
        return None
    for order in _orders(rows, config):
        record = unpack(blocks if order is None else blocks[order], kind, (rows, columns))
        if torch.equal(record.dense(), weight_OI):
            return record
    return None


def _orders(rows: int, config: Any) -> Iterator[Tensor | None]:
    """Of the file's rows: as they are; with the two channels of every rotary pair, which lie side by side in the file, half a head apart."""
    yield None
    for heads in dict.fromkeys((config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads)):
        if rows % (2 * heads) == 0:
            yield torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)
