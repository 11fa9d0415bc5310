"""compressed-tensors `pack-quantized` checkpoints: vLLM's own format, which transformers loads too.

Per linear: weight_packed int32 [O, ⌈I·bits/32⌉] (code − 2^(bits−1), stored with that offset added back); weight_scale [O, G];
weight_zero_point int32 [⌈O·bits/32⌉, G], packed along the output with the same offset, absent when symmetric; weight_shape int64 [2].
Knows this layout and not the package of that name, which is not imported.
Legend: O out, I in, G groups.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...compress.packing import pack_codes, packed_words, unpack_codes
from ...compress.ranges import is_regex
from ...compress.weights import DenseWeight, StoredWeight, UniformWeight
from ..errors import InputError, UsageError
from .biases import with_room_for_biases
from .checkpoint import BITS, Checkpoint, Lazy, in_bytes, masked_note, refuse_beyond_codes, uniform_codes, untie_compressed
from .folder import read_config, write_folder
from .fusing import to_memory
from .naming import expert_parameter, to_file
from .shards import SHARD_BYTES, Stored, fresh_directory, open_directory, write_shards
from .untouched import dense_linears, routers

LABEL = "compressed-tensors"
FORMAT = "pack-quantized"
Scheme = tuple[int, int, bool]  # bits, group size (-1: one group per row), symmetric
HOW_TO_LOAD = (
    "from transformers import AutoModelForCausalLM  # with compressed-tensors installed\n\n"
    'model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")'
)


def write(checkpoint: Checkpoint, directory: Path, shard_bytes: int = SHARD_BYTES) -> list[str]:
    """What to tell the user about the export. UsageError when something has no place in the format."""
    if checkpoint.transposed & set(checkpoint.linears):
        name = sorted(checkpoint.transposed & set(checkpoint.linears))[0]
        raise UsageError(f"{name} is a Conv1D, which compressed-tensors programs do not compress; use --format gptq, bnb or dense")
    checkpoint, notes = untie_compressed(with_room_for_biases(checkpoint))
    checkpoint, widened = in_bytes(checkpoint, LABEL)
    notes += widened
    _refuse_experts(checkpoint)
    ignored = [*dense_linears(checkpoint), *routers(checkpoint)]
    checkpoint = to_file(checkpoint)
    schemes: dict[Scheme, dict[str, int]] = {}
    pruned: list[str] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, record in checkpoint.linears.items():
            pruned.extend([name] if record.mask is not None else [])
            if isinstance(record.base, DenseWeight):
                refuse_beyond_codes(name, record, LABEL)
                yield f"{name}.weight", record.dense(record.base.weight.dtype)
                continue
            parts, scheme = pack(name, record)
            schemes.setdefault(scheme, {})[name] = record.shape[1]
            for part, tensor in parts.items():
                yield f"{name}.{part}", tensor
        yield from checkpoint.tensors.items()

    with fresh_directory(directory) as scratch:
        write_shards(scratch, tensors(), shard_bytes)
        if not schemes:
            raise UsageError(
                "no linear of this model is on a uniform grid, so compressed-tensors has nothing to hold; choose --format dense or bnb"
            )
        schemes = merged(schemes)
        if pruned:
            notes.append(masked_note(len(pruned), LABEL))
        if len(schemes) > 1 and not all(symmetric for _, _, symmetric in schemes):
            notes.append(
                "several settings with zero points: transformers 5.24 does not read that (it does with symmetric grids or a single setting)"
            )
        write_folder(checkpoint, scratch, quantization_config(schemes, ignored), notes, HOW_TO_LOAD)
    return notes


def _refuse_experts(checkpoint: Checkpoint) -> None:
    """Readers decode all experts by one scheme, without zero points."""
    result: set[tuple[int, int]] = set()
    for name, record in checkpoint.linears.items():
        if expert_parameter(name) is None or not isinstance(record.base, UniformWeight):
            continue
        if not record.base.symmetric:
            raise UsageError(
                f"{name}: programs read compressed-tensors experts without zero points; quantize symmetrically or use --format gptq"
            )
        result.add((record.base.bits, record.base.group_size))
        if len(result) > 1:
            raise UsageError(
                f"{name}: compressed-tensors experts share one setting; these have several bits or group sizes, use --format gptq"
            )


def pack(name: str, record: StoredWeight) -> tuple[dict[str, Tensor], Scheme]:
    """(the tensors of one linear by their last names, its scheme)."""
    base, codes, zeros = uniform_codes(name, record, LABEL)
    if base.group_index is not None:
        raise UsageError(
            f"{name}: compressed-tensors has dropped reordered groups (g_idx); use --format gptq, or act-order within static groups"
        )
    rows, columns = base.shape
    parts = {
        "weight_packed": pack_codes(codes, base.bits),
        "weight_scale": base.scales,
        "weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }
    if not base.symmetric:
        parts["weight_zero_point"] = pack_codes(zeros.t().contiguous(), base.bits).t().contiguous()
    return parts, (base.bits, -1 if base.groups == 1 else columns // base.groups, base.symmetric)


def merged(schemes: Mapping[Scheme, Mapping[str, int]]) -> dict[Scheme, dict[str, int]]:
    """Scheme → its linears and their inputs; one group over a whole row joins the scheme whose group size that row has."""
    out = {scheme: dict(linears) for scheme, linears in schemes.items()}
    for (bits, group_size, symmetric), linears in schemes.items():
        for name, columns in linears.items() if group_size == -1 else ():
            if (bits, columns, symmetric) in schemes:
                out[bits, columns, symmetric][name] = out[bits, -1, symmetric].pop(name)
    return {scheme: linears for scheme, linears in out.items() if linears}


def quantization_config(schemes: Mapping[Scheme, Mapping[str, int]], ignored: list[str]) -> dict[str, object]:
    """One scheme goes by the class of module, several by the modules' names."""
    groups = {}
    for number, ((bits, group_size, symmetric), names) in enumerate(schemes.items()):
        weights = {
            "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "channel" if group_size == -1 else "group",
            "group_size": None if group_size == -1 else group_size, "dynamic": False, "actorder": None, "block_structure": None,
            "observer": "minmax", "observer_kwargs": {},
        }  # fmt: skip
        targets = ["Linear"] if len(schemes) == 1 else [f"re:^{re.escape(name)}$" for name in names]
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
    out = {
        "quant_method": LABEL, "format": FORMAT, "quantization_status": "compressed", "config_groups": groups, "ignore": ignored,
        "kv_cache_scheme": None, "global_compression_ratio": None,
    }  # fmt: skip
    # transformers 5.24 keeps no room for packed zero points unless it dequantizes while loading, which knows one scheme only
    return {**out, "dequantize": True} if [symmetric for _, _, symmetric in schemes] == [False] else out


def read(directory: Path) -> Checkpoint:
    """A pack-quantized directory. InputError for the other layouts of that package and for inconsistent tensors."""
    config, quantization = read_config(directory)
    _check_config(directory, quantization := quantization or {})
    stored = open_directory(directory)
    linears, taken = {}, set()
    for entry in [name for name in stored if name.endswith(".weight_packed")]:
        name = entry.removesuffix(".weight_packed")
        parts = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.weight_")}
        linears[name] = partial(_load, name, parts, _bits(name, parts, quantization["config_groups"]))
        taken |= {f"{name}.{part}" for part in parts}
    if not linears:
        raise InputError(f"{directory}: config.json says {FORMAT}, but no tensor ends in .weight_packed")
    tensors = Lazy({name: entry.load for name, entry in stored.items() if name not in taken})
    return to_memory(Checkpoint(config, Lazy(linears), tensors, files=directory))


def _check_config(directory: Path, quantization: Mapping[str, Any]) -> None:
    kinds = {quantization.get("format")} | {g.get("format") or FORMAT for g in (quantization.get("config_groups") or {}).values()}
    if kinds != {FORMAT}:
        raise InputError(
            f"{directory}: compressed-tensors format {', '.join(sorted(map(str, kinds - {FORMAT})))} is not read; only {FORMAT} is"
        )
    for entry in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if quantization.get(entry):
            raise InputError(f"{directory}: quantization_config has a {entry}, which changes what the model computes and is not read")
    if not quantization.get("config_groups"):
        raise InputError(f"{directory}: quantization_config has no config_groups, which say how many bits the weights have")
    for group in quantization["config_groups"].values():
        weights = group.get("weights") or {}
        if weights.get("type", "int") != "int" or weights.get("num_bits") not in BITS:
            raise InputError(
                f"{directory}: weights of {weights.get('num_bits')} bits of type {weights.get('type')}; integers of {BITS} bits are read"
            )
        for target in group.get("targets") or []:
            if not isinstance(target, str) or (target.startswith("re:") and not is_regex(target.removeprefix("re:"))):
                raise InputError(f"{directory}: config group target {target!r} is no name of modules, nor re: and a pattern")
        for side in ("input_activations", "output_activations"):
            if group.get(side):
                raise InputError(f"{directory}: the checkpoint quantizes {side.replace('_', ' ')} too, which is not read; only weights are")


def _configured_bits(name: str, groups: Mapping[str, Any]) -> int | None:
    """What the scheme says whose targets name this linear; one that goes by class (`Linear`) reaches every linear."""
    by_class = None
    for group in groups.values():
        for target in group.get("targets") or ["Linear"]:
            if target == name or (target.startswith("re:") and re.match(target.removeprefix("re:"), name)):
                return group["weights"]["num_bits"]
            if not target.startswith("re:") and "." not in target:
                by_class = group["weights"]["num_bits"]
    return by_class


def _bits(name: str, parts: Mapping[str, Stored], groups: Mapping[str, object]) -> int:
    """Bits of a linear; checks its shapes against them and against each other."""
    packed = parts["weight_packed"]
    bits = _configured_bits(name, groups)
    if bits is None:
        raise InputError(f"{packed.file}: {name}.weight_packed is there, but no config group names {name}")
    for part in ("weight_scale", "weight_shape"):
        if part not in parts:
            raise InputError(f"{packed.file}: {name}.weight_packed is there, {name}.{part} is not")
    if len(packed.shape) != 2 or packed.dtype != "I32":
        raise InputError(
            f"{packed.file}: {name}.weight_packed is {packed.dtype} of shape {list(packed.shape)}; int32 with 2 dimensions was expected"
        )
    shape = parts["weight_shape"].load().reshape(-1).tolist()
    if len(shape) != 2 or shape[0] != packed.shape[0]:
        raise InputError(f"{packed.file}: {name}.weight_packed has {packed.shape[0]} rows, {name}.weight_shape says {shape}")
    rows, columns = shape
    if packed_words(columns, bits) != packed.shape[1]:
        raise InputError(
            f"{packed.file}: {name}.weight_packed has {packed.shape[1]} words a row; {columns} weights of {bits} bits need {packed_words(columns, bits)} "
            "(3-bit files of compressed-tensors before 0.15 leave gaps: save them again with a newer one)"
        )
    scale = parts["weight_scale"]
    if len(scale.shape) != 2 or scale.shape[0] != rows or not scale.shape[1] or columns % scale.shape[1]:
        raise InputError(
            f"{scale.file}: {name}.weight_scale has shape {list(scale.shape)}, which does not divide {rows} × {columns} weights into groups"
        )
    zero = parts.get("weight_zero_point")
    if zero is not None and zero.shape != (packed_words(rows, bits), scale.shape[1]):
        expected = [packed_words(rows, bits), scale.shape[1]]
        raise InputError(
            f"{zero.file}: {name}.weight_zero_point has shape {list(zero.shape)}; {rows} outputs of {bits} bits need {expected}"
        )
    return bits


def _load(name: str, parts: Mapping[str, Stored], bits: int) -> StoredWeight:
    tensors = {part: entry.load() for part, entry in parts.items()}
    rows, columns = (int(n) for n in tensors["weight_shape"].reshape(-1))
    groups = tensors["weight_scale"].shape[1]
    zeros = tensors.get("weight_zero_point")
    if zeros is not None:
        zeros = unpack_codes(zeros.t().clone(memory_format=torch.contiguous_format), bits, rows).t().long().contiguous()
    index = tensors.get("weight_g_idx")
    if index is not None and (index.numel() != columns or int(index.min()) < 0 or int(index.max()) >= groups):
        raise InputError(f"{parts['weight_g_idx'].file}: {name}.weight_g_idx does not give each of {columns} inputs one of {groups} groups")
    codes = unpack_codes(tensors["weight_packed"], bits, columns)
    return StoredWeight(UniformWeight.from_codes(codes, tensors["weight_scale"], zeros, bits, columns // groups, index))
