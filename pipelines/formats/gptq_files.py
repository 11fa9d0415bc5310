"""GPTQ checkpoints, versions 1 (`gptq`: auto-gptq, GPTQModel, vLLM, transformers) and 2 (`gptq_v2`: GPTQModel).

Per linear: qweight int32 [I·bits/32, O] packed along the input; qzeros int32 [G, O·bits/32]; scales float16 [G, O];
g_idx int32 [I]. Version 1 stores zero − 1. Reading follows auto-gptq 0.7.1 to the letter, also where it is odd.
Legend: O out, I in, G groups.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...compress.packing import pack_codes, unpack_codes
from ...compress.weights import DenseWeight, StoredWeight, UniformWeight
from ..errors import InputError, UsageError
from .biases import with_room_for_biases
from .checkpoint import BITS, Checkpoint, Lazy, half_scales, in_bytes, masked_note, refuse_beyond_codes, uniform_codes, untie_compressed
from .folder import read_config, write_folder
from .fusing import to_memory
from .gptq_settings import CHECKPOINT_FORMATS, Settings
from .naming import to_file
from .shards import SHARD_BYTES, Stored, fresh_directory, open_directory, write_json, write_shards

PARTS = ("qweight", "qzeros", "scales", "g_idx")
MULTIPLE = 32  # auto-gptq and GPTQModel unpack whole 32-bit words along both sides

HOW_TO_LOAD = {
    1: "from transformers import AutoModelForCausalLM  # with gptqmodel installed, which nobody here has tried\n\n"
    'model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")',
    2: 'from gptqmodel import GPTQModel\n\nmodel = GPTQModel.load("THIS_DIRECTORY")',
}  # fmt: skip


def write(checkpoint: Checkpoint, directory: Path, version: int = 1, shard_bytes: int = SHARD_BYTES) -> list[str]:
    """What to tell the user about the export. UsageError when something has no place in the format."""
    checkpoint, notes = untie_compressed(with_room_for_biases(checkpoint))
    label = f"GPTQ version {version}"
    checkpoint, widened = in_bytes(to_file(checkpoint), label)
    settings = Settings.of(checkpoint)
    notes += settings.notes() + widened
    rounded: list[str] = []
    pruned: list[str] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, record in checkpoint.linears.items():
            if isinstance(record.base, DenseWeight):
                yield from _dense(name, record, checkpoint, label)
                continue
            parts, lossy = pack(name, record, version)
            rounded.extend([name] if lossy else [])
            pruned.extend([name] if record.mask is not None else [])
            for part, tensor in parts.items():
                yield f"{name}.{part}", tensor
        yield from checkpoint.tensors.items()
        for alias, source in checkpoint.tied.items() if version == 1 else ():
            yield alias, checkpoint.tensors[source]

    with fresh_directory(directory) as scratch:
        write_shards(scratch, tensors(), shard_bytes)
        if pruned:
            notes.append(masked_note(len(pruned), label))
        if rounded:
            notes.append(f"{len(rounded)} linears had scales finer than float16, which is what {label} stores; they are rounded")
        for alias, source in checkpoint.tied.items() if version == 1 else ():
            notes.append(f"{alias} is stored as well as {source} although they are tied: auto-gptq leaves the embedding at zero otherwise")
        config = settings.config(version)
        write_folder(checkpoint, scratch, config, notes, HOW_TO_LOAD[version])
        if version == 1:  # auto-gptq would read version 2 as version 1; without this file it refuses
            old = {**config, "model_name_or_path": None, "model_file_base_name": "model", "is_marlin_format": False}
            write_json(scratch / "quantize_config.json", old)
    return notes


def pack(name: str, record: StoredWeight, version: int) -> tuple[dict[str, Tensor], bool]:
    """(the tensors of one linear by their last name, whether float16 rounded a scale)."""
    label = f"GPTQ version {version}"
    base, codes, zeros = uniform_codes(name, record, label)
    rows, columns = base.shape
    if rows % MULTIPLE or columns % MULTIPLE:
        raise UsageError(
            f"{name}: GPTQ readers need in and out features that are multiples of {MULTIPLE}; this linear has {columns} and {rows}: use --format compressed-tensors"
        )
    if base.group_index is not None and base.groups != -(-columns // base.group_size):
        raise UsageError(
            f"{name}: {base.groups} groups of {base.group_size} do not cover {columns} inputs as GPTQ counts them; use --format dense"
        )
    if version == 1:
        wrapping = int((zeros == 0).sum())
        if wrapping:
            raise UsageError(
                f"{name}: {wrapping} zero points are 0; version 1 stores zero − 1, and its readers disagree on what −1 means. Use --format gptq-v2, which stores the zero itself"
            )
        zeros = zeros - 1
    scales, lossy = half_scales(name, base.scales, label)
    index = base.group_index
    if index is None:
        index = torch.arange(columns, dtype=torch.int32) // (columns // base.groups)
    return {
        "qweight": pack_codes(codes, base.bits).t().contiguous(),
        "qzeros": pack_codes(zeros.t().contiguous(), base.bits),
        "scales": scales.t().contiguous(),
        "g_idx": index.to(torch.int32),
    }, lossy


def read(directory: Path) -> Checkpoint:
    """A GPTQ directory of either version. InputError, with tensor and file, for inconsistent tensors."""
    config, quantization = _settings(directory)
    stored = open_directory(directory)
    linears = {name.removesuffix(".qweight"): entry for name, entry in stored.items() if name.endswith(".qweight")}
    if not linears:
        raise InputError(f"{directory}: config.json says gptq, but no tensor ends in .qweight")
    loaders = {}
    taken: set[str] = set()
    for name in linears:
        parts = {part: _part(stored, name, part, directory) for part in PARTS if part != "g_idx" or f"{name}.g_idx" in stored}
        _check_shapes(name, parts, quantization)
        loaders[name] = partial(_load, name, parts, quantization)
        taken |= {f"{name}.{part}" for part in parts}
    tensors = {name: entry.load for name, entry in stored.items() if name not in taken}
    return to_memory(Checkpoint(config, Lazy(loaders), Lazy(tensors), files=directory))


def _settings(directory: Path) -> tuple[dict[str, object], dict[str, object]]:
    """(config.json without it, the quantization settings). InputError for what is not read here."""
    config, quantization = read_config(directory)
    quantization = quantization or {}
    if quantization.get("quant_method", "gptq") != "gptq":
        raise InputError(f"{directory}: quant_method is {quantization['quant_method']!r}, not gptq")
    kind = quantization.get("checkpoint_format") or "gptq"
    if kind not in CHECKPOINT_FORMATS.values() or quantization.get("is_marlin_format"):
        raise InputError(
            f"{directory}: checkpoint_format {kind!r} is not known; {' and '.join(CHECKPOINT_FORMATS.values())} are. Convert it with GPTQModel first"
        )
    if quantization.get("bits") not in BITS:
        raise InputError(f"{directory}: {quantization.get('bits')} bits; GPTQ checkpoints of {', '.join(map(str, BITS))} bits are read")
    return config, quantization


def _load(name: str, parts: Mapping[str, Stored], quantization: Mapping[str, object]) -> StoredWeight:
    tensors = {part: entry.load() for part, entry in parts.items()}
    groups, rows = tensors["scales"].shape
    columns, bits = _columns_and_bits(name, parts, quantization)
    group_size = columns if groups == 1 else _group_size(name, columns, groups, quantization)
    index = _scattered(tensors.get("g_idx"), columns, group_size)
    if index is not None and "g_idx" in parts:
        if int(index.min()) < 0 or int(index.max()) >= groups:
            raise InputError(f"{parts['g_idx'].file}: {name}.g_idx names groups {int(index.min())}…{int(index.max())}; there are {groups}")
        if columns % group_size == 0 and not quantization.get("desc_act", False):
            raise InputError(
                f"{parts['g_idx'].file}: {name}.g_idx is reordered, but desc_act is false; readers disagree on that, so fix the config or the file"
            )
    stored_zeros = unpack_codes(tensors["qzeros"], bits, rows).t().to(torch.int64)
    zeros = _true_zeros(stored_zeros, bits, quantization)
    if quantization.get("sym", False) and bool((zeros == 1 << (bits - 1)).all()):
        zeros = None
    elif int(zeros.max()) >= 1 << bits:
        zeros = zeros.float()
    codes = unpack_codes(tensors["qweight"].t().contiguous(), bits, columns)
    return StoredWeight(UniformWeight.from_codes(codes, tensors["scales"].t().contiguous(), zeros, bits, group_size, index))


def _true_zeros(stored: Tensor, bits: int, quantization: Mapping[str, object]) -> Tensor:
    """int64, like `stored`. In version 1 a stored 2^bits − 1 is 0 or 2^bits, by which of its two paths auto-gptq takes."""
    if quantization.get("checkpoint_format") == CHECKPOINT_FORMATS[2]:
        return stored
    reordered = quantization.get("desc_act", False) and quantization.get("group_size") != -1
    if bits == 3 or reordered:
        return stored + 1
    return (stored + 1) & ((1 << bits) - 1)


def _scattered(index: Tensor | None, columns: int, group_size: int) -> Tensor | None:
    """The group index, or None when it only counts contiguous groups."""
    counted = torch.arange(columns) // group_size
    if index is None or torch.equal(index.long(), counted):
        return None if columns % group_size == 0 else counted.to(torch.int32)
    return index.to(torch.int32)


def _group_size(name: str, columns: int, groups: int, quantization: Mapping[str, Any]) -> int:
    size = quantization.get("group_size", -1)
    if size > 0 and -(-columns // size) == groups:
        return size
    if columns % groups:
        raise InputError(f"{name}: {groups} groups cannot share {columns} inputs (config.json says group_size {size})")
    return columns // groups


def _part(stored: Mapping[str, Stored], name: str, part: str, directory: Path) -> Stored:
    if f"{name}.{part}" not in stored:
        raise InputError(f"{stored[f'{name}.qweight'].file}: {name}.qweight is there, {name}.{part} is not in {directory}")
    return stored[f"{name}.{part}"]


def _columns_and_bits(name: str, parts: Mapping[str, Stored], quantization: Mapping[str, Any]) -> tuple[int, int]:
    words = parts["qweight"].shape[0]
    if "g_idx" in parts:
        columns = parts["g_idx"].shape[0]
        bits = words * 32 // max(columns, 1)
    else:
        bits = quantization["bits"]
        columns = words * 32 // bits
    if bits not in BITS or columns * bits != words * 32:
        raise InputError(
            f"{parts['qweight'].file}: {name}.qweight has {words} rows of 32 bits for {columns} inputs, which is no whole 2, 3, 4 or 8 bits each"
        )
    return columns, bits


def _check_shapes(name: str, parts: Mapping[str, Stored], quantization: Mapping[str, object]) -> None:
    for part, rank in (("qweight", 2), ("qzeros", 2), ("scales", 2), ("g_idx", 1)):
        if part in parts and len(parts[part].shape) != rank:
            raise InputError(f"{parts[part].file}: {name}.{part} has shape {list(parts[part].shape)}; {rank} dimensions were expected")
    columns, bits = _columns_and_bits(name, parts, quantization)
    if bits != quantization["bits"] and not quantization.get("dynamic"):
        raise InputError(
            f"{parts['qweight'].file}: {name}.qweight holds {bits} bits for each of {columns} inputs; config.json says {quantization['bits']}"
        )
    rows, groups = parts["qweight"].shape[1], parts["scales"].shape[0]
    for part, shape in (("scales", (groups, rows)), ("qzeros", (groups, rows * bits // 32))):
        if parts[part].shape != shape:
            raise InputError(
                f"{parts[part].file}: {name}.{part} has shape {list(parts[part].shape)}; {columns} × {rows} weights of {bits} bits need {list(shape)}"
            )
    for part, kinds in (("qweight", ("I32",)), ("qzeros", ("I32",)), ("scales", ("F16", "BF16", "F32")), ("g_idx", ("I32", "I64"))):
        if part in parts and parts[part].dtype not in kinds:
            raise InputError(f"{parts[part].file}: {name}.{part} is {parts[part].dtype}; {' or '.join(kinds)} was expected")


def _dense(name: str, record: StoredWeight, checkpoint: Checkpoint, label: str) -> Iterator[tuple[str, Tensor]]:
    """A linear that was left (or pruned) in floating point, under its own name and layout."""
    refuse_beyond_codes(name, record, label)
    base = record.base
    assert isinstance(base, DenseWeight)
    weight = record.dense(base.weight.dtype)
    yield f"{name}.weight", weight.t() if name in checkpoint.transposed else weight
