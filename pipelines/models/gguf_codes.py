"""Which matrices of a GGUF file keep their codes when it is imported: those whose blocks, rows put in the model's order, are the loaded matrix.

transformers loads the file and knows what every family changes; a matrix is kept as blocks only where these stand for the very numbers that it
made. Experts are stacked in the file, gate and up apart; in the model an expert's gate rows lie over its up rows, in one matrix.
Legend: E experts, O out, I in.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ...compress.ggml_types import GGML_TYPES, GgmlName
from ...compress.weights import GgmlWeight
from ..demo import imported
from ..formats import ggml_folder
from ..formats.ggml_blocks import unpack
from .structure import Site, inspect, tied_names

if TYPE_CHECKING:
    from gguf.gguf_reader import ReaderTensor
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger("bitmend")


def import_gguf(path: Path) -> Path:
    """`imported.import_gguf`, matrices in the blocks that the file has."""
    return imported.import_gguf(path, _save, "-codes")


def _save(model: "PreTrainedModel", gguf: Path, directory: Path) -> None:
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


def kept_codes(model: "PreTrainedModel", gguf: Path) -> dict[str, GgmlWeight]:
    """Record by the name of the matrix."""
    from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

    reader = GGUFReader(gguf)
    family = reader.fields["general.architecture"].contents()
    known = next((architecture for architecture, name in MODEL_ARCH_NAMES.items() if name == family), None)
    quantized = {t.name: t for t in reader.tensors if t.tensor_type.name.lower() in GGML_TYPES and len(t.shape) in (2, 3)}
    if known is None or not quantized:
        return {}
    names, result = get_tensor_name_map(known, inspect(model).blocks), dict[str, GgmlWeight]()
    tied = tied_names(model)
    for site in _sites(model):
        parameter = f"{site.module}.{site.parameter}"
        theirs = [names.get_name(parameter, try_suffixes=(".weight",))] if site.expert is None else _stacked(site)
        if parameter not in tied and all(name in quantized for name in theirs):
            record = _record_of([quantized[str(name)] for name in theirs], site, model)
            if record is not None:
                result[site.name] = record
            elif site.expert in (None, 0):
                why = (
                    "is changed by its family"
                    if site.expert is None
                    else "holds experts whose gate and up are of two types, or that its family changes"
                )
                log.warning("%s: %s %s and is imported densely", gguf.name, " with ".join(map(str, theirs)), why)
    return _whole(result, model)


def _stacked(site: Site) -> list[str]:
    """The tensors of the file that a fused parameter's experts lie in."""
    parts = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.get(site.parameter, ())
    return [f"blk.{site.block}.ffn_{part}_exps.weight" for part in parts] or [f"no tensor for {site.parameter}"]


def _record_of(tensors: "list[ReaderTensor]", site: Site, model: Any) -> GgmlWeight | None:
    """None where the blocks are not the loaded matrix: of more than one type, for one."""
    kinds = {tensor.tensor_type.name.lower() for tensor in tensors}
    if len(kinds) > 1:
        return None
    arrays = [tensor.data if site.expert is None else tensor.data[site.expert] for tensor in tensors]
    blocks = torch.cat([torch.from_numpy(array.copy()) for array in arrays])
    weight_OI = site.read(model.get_parameter(f"{site.module}.{site.parameter}").detach())
    return _matching(blocks, cast(GgmlName, kinds.pop()), weight_OI, model.config)


def _whole(result: dict[str, GgmlWeight], model: "PreTrainedModel") -> dict[str, GgmlWeight]:
    """Without those experts whose parameter holds others that keep no codes."""
    lacking = {(s.module, s.parameter) for s in _sites(model) if s.expert is not None and s.name not in result}
    dense = {s.name for s in _sites(model) if (s.module, s.parameter) in lacking}
    return {name: record for name, record in result.items() if name not in dense}


def _sites(model: "PreTrainedModel") -> list[Site]:
    structure = inspect(model, include_head=True)
    return [*structure.sites, *([structure.embeddings] if structure.embeddings is not None else [])]


def _matching(blocks: Tensor, kind: GgmlName, weight_OI: Tensor, config: "PreTrainedConfig") -> GgmlWeight | None:
    """The blocks as they lie, or with the rows of Llama's query and key heads put back."""
    rows, columns = weight_OI.shape
    if blocks.ndim != 2 or len(blocks) != rows or blocks.shape[1] * 8 * GGML_TYPES[kind].columns != columns * GGML_TYPES[kind].block_bits:
        return None
    for order in _orders(rows, config):
        record = unpack(blocks if order is None else blocks[order], kind, (rows, columns))
        if torch.equal(record.dense(), weight_OI):
            return record
    return None


def _orders(rows: int, config: "PreTrainedConfig") -> Iterator[Tensor | None]:
    """Of the file's rows: as they are; with the two channels of every rotary pair, which lie side by side in the file, half a head apart."""
    yield None
    for heads in dict.fromkeys((config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads)):
        if rows % (2 * heads) == 0:
            yield torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)
