"""bitsandbytes' 4-bit NormalFloat checkpoints, with and without double quantization; transformers and PEFT load them.

Per linear: weight uint8 [O·I/2, 1], two codes a byte, the first in the high nibble; weight.absmax (float32 [O·G], or uint8 codes with
weight.nested_absmax and weight.nested_quant_map); weight.quant_map float32 [16]; weight.quant_state.bitsandbytes__nf4, JSON as uint8.
Knows this layout and not the package of that name, which is not imported.
Legend: O out, I in, G blocks in a row.
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...compress import normal_float
from ...compress.normal_float import NESTED_BLOCK
from ...compress.packing import pack_codes
from ...compress.weights import DenseWeight, GgmlWeight, NormalFloatWeight, StoredWeight, UniformWeight
from ..errors import InputError, UsageError
from .biases import with_room_for_biases
from .checkpoint import Checkpoint, Lazy, config_dtype, masked_note, refuse_beyond_codes, refuse_other_grid, untie_compressed
from .folder import read_config, write_folder
from .fusing import to_memory
from .naming import expert_parameter, to_file
from .shards import SHARD_BYTES, Stored, fresh_directory, open_directory, write_shards
from .untouched import dense_linears

LABEL = "bitsandbytes"
STATE = "weight.quant_state.bitsandbytes__nf4"
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
HOW_TO_LOAD = (
    "from transformers import AutoModelForCausalLM  # with bitsandbytes installed\n\n"
    'model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")'
)


def write(checkpoint: Checkpoint, directory: Path, shard_bytes: int = SHARD_BYTES) -> list[str]:
    """What to tell the user about the export. UsageError when something has no place in the format."""
    checkpoint, notes = untie_compressed(with_room_for_biases(checkpoint))
    experts = next((name for name in checkpoint.linears if expert_parameter(name) is not None), None)
    if experts is not None:
        raise UsageError(f"{experts}: bitsandbytes quantizes linears, not fused experts; use --format gptq, compressed-tensors or dense")
    skipped, dtype = dense_linears(checkpoint), config_dtype(checkpoint)
    checkpoint = to_file(checkpoint)
    pruned: list[str] = []
    double: list[bool] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, record in checkpoint.linears.items():
            pruned.extend([name] if record.mask is not None else [])
            if isinstance(record.base, DenseWeight):
                refuse_beyond_codes(name, record, LABEL)
                weight = record.dense(record.base.weight.dtype)
                yield f"{name}.weight", weight.t() if name in checkpoint.transposed else weight
                continue
            for part, tensor in pack(name, record, dtype).items():
                double.append(part == "weight.nested_absmax")
                yield f"{name}.{part}", tensor
        yield from checkpoint.tensors.items()

    with fresh_directory(directory) as scratch:
        write_shards(scratch, tensors(), shard_bytes)
        if not double:
            raise UsageError("no linear of this model is NormalFloat4, so bitsandbytes has nothing to hold; choose --format gptq or dense")
        if pruned:
            notes.append(masked_note(len(pruned), LABEL))
        write_folder(checkpoint, scratch, _config(dtype, any(double), skipped), notes, HOW_TO_LOAD)
    return notes


def pack(name: str, record: StoredWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one linear by their last names. `dtype` is what bitsandbytes dequantizes to."""
    base = _normal_float(name, record)
    codes, mask = base.codes_OI(), record.mask_OI()
    if mask is not None:
        codes = codes.where(mask, int((normal_float.code_book(4) == 0).nonzero()))
    flat = codes.reshape(-1, 2)
    state: dict[str, object] = {
        "quant_type": "nf4",
        "blocksize": base.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(base.shape),
    }
    out = {"weight": ((flat[:, 0] << 4) | flat[:, 1]).unsqueeze(1), "weight.quant_map": normal_float.code_book(4).clone()}
    if base.absmax is not None:
        out["weight.absmax"] = base.absmax.float().reshape(-1)
    else:
        assert base.absmax_codes is not None and base.absmax_scales is not None and base.absmax_offset is not None
        out["weight.absmax"] = base.absmax_codes.reshape(-1)
        out["weight.nested_absmax"] = base.absmax_scales.float()
        out["weight.nested_quant_map"] = normal_float.dynamic_map().clone()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": base.absmax_offset.item()}
    out[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return out


def _normal_float(name: str, record: StoredWeight) -> NormalFloatWeight:
    refuse_beyond_codes(name, record, LABEL)
    base = record.base
    if isinstance(base, GgmlWeight):
        refuse_other_grid(name, base, LABEL)
    if isinstance(base, UniformWeight):
        raise UsageError(
            f"{name}: bitsandbytes holds NormalFloat4, not uniform {base.bits}-bit grids; use --format gptq or compressed-tensors"
        )
    assert isinstance(base, NormalFloatWeight)
    if base.bits != 4:
        raise UsageError(f"{name}: bitsandbytes holds NormalFloat4, not NormalFloat{base.bits}; use --format dense")
    if base.block_size not in BLOCK_SIZES:
        raise UsageError(
            f"{name}: bitsandbytes has blocks of {', '.join(map(str, BLOCK_SIZES))} weights, not {base.block_size}; "
            "quantize with one of them or use --format dense"
        )
    return base


def _config(dtype: torch.dtype, double: bool, skipped: list[str]) -> dict[str, object]:
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True, "_load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double, "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."), "llm_int8_skip_modules": skipped, "llm_int8_threshold": 6.0,
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
    }  # fmt: skip


def read(directory: Path) -> Checkpoint:
    """A 4-bit directory that bitsandbytes (through transformers) saved, or ours. InputError for int8, FP4 and inconsistent tensors."""
    config, quantization = read_config(directory)
    quantization = quantization or {}
    if quantization.get("quant_method") != "bitsandbytes" or not quantization.get("load_in_4bit", quantization.get("_load_in_4bit")):
        raise InputError(f"{directory}: only bitsandbytes' 4-bit checkpoints are read (load_in_4bit), not its 8-bit ones")
    stored = open_directory(directory)
    foreign = next((name for name in stored if ".quant_state." in name and not name.endswith(f".{STATE}")), None)
    if foreign is not None:
        raise InputError(
            f"{stored[foreign].file}: {foreign}: only NF4 is read, not {foreign.rpartition('__')[2]}; quantize with bnb_4bit_quant_type nf4"
        )
    linears, taken = {}, set()
    for entry in [name for name in stored if name.endswith(f".{STATE}")]:
        name = entry.removesuffix(f".{STATE}")
        parts = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.weight")}
        linears[name] = partial(_load, name, parts, _state(name, parts))
        taken |= {f"{name}.{part}" for part in parts}
    if not linears:
        raise InputError(f"{directory}: config.json says bitsandbytes, but no tensor ends in {STATE}")
    tensors = Lazy({name: entry.load for name, entry in stored.items() if name not in taken})
    return to_memory(Checkpoint(config, Lazy(linears), tensors, files=directory))


def _state(name: str, parts: Mapping[str, Stored]) -> dict[str, object]:
    """The JSON part, with every shape it promises checked against the file's headers."""
    entry = parts[STATE]
    try:
        state = json.loads(bytes(entry.load().tolist()))
        rows, columns = state["shape"]
        block, nested = state["blocksize"], "nested_offset" in state
        outer = state["nested_blocksize"] if nested else 1
        if any(type(size) is not int or size < 1 for size in (rows, columns, block, outer)):
            raise ValueError(f"shape {rows} × {columns} in blocks of {block} and {outer}")
        if nested:
            float(state["nested_offset"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{entry.file}: {name}.{STATE} is not the JSON bitsandbytes writes ({error!r})") from error
    blocks = -(-rows * columns // block)
    needed: dict[str, int | None] = {"weight": None, "weight.absmax": blocks, "weight.quant_map": 16}
    if nested:
        needed |= {"weight.nested_absmax": -(-blocks // outer), "weight.nested_quant_map": 256}
    for part, count in needed.items():
        if part not in parts:
            raise InputError(f"{entry.file}: {name}.{STATE} is there, {name}.{part} is not")
        if count is not None and parts[part].shape != (count,):
            raise InputError(
                f"{parts[part].file}: {name}.{part} has shape {list(parts[part].shape)}; {rows} × {columns} in blocks of {block} need [{count}]"
            )
    result = parts["weight"].size_bytes
    if result != -(-rows * columns // 2):
        raise InputError(
            f"{parts['weight'].file}: {name}.weight holds {result} bytes; {rows} × {columns} weights of 4 bits need {-(-rows * columns // 2)}"
        )
    return state


def _load(name: str, parts: Mapping[str, Stored], state: Mapping[str, Any]) -> StoredWeight:
    """Blocks that run across rows (I no multiple of the block size) come in densely: no record of ours has them."""
    rows, columns = state["shape"]
    tensors = {part: entry.load() for part, entry in parts.items()}
    _check_map(name, parts["weight.quant_map"], tensors["weight.quant_map"], normal_float.code_book(4))
    packed = tensors["weight"].contiguous().reshape(-1).view(torch.uint8)
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).reshape(-1)[: rows * columns]
    nested: tuple[Tensor, Tensor, Tensor] | None = None
    absmax = tensors["weight.absmax"]
    if "nested_offset" in state:
        _check_map(name, parts["weight.nested_quant_map"], tensors["weight.nested_quant_map"], normal_float.dynamic_map())
        absmax, nested = _nested(tensors, state)
    block = int(state["blocksize"])
    if columns % block:
        values = normal_float.code_book(4)[codes.int()] * absmax.repeat_interleave(block)[: rows * columns]
        return StoredWeight(DenseWeight(values.view(rows, columns)))
    packed_codes = pack_codes(codes.view(rows, columns), 4)
    if nested is None:
        return StoredWeight(NormalFloatWeight(packed_codes, 4, block, columns, absmax.float().view(rows, -1)))
    return StoredWeight(NormalFloatWeight(packed_codes, 4, block, columns, None, nested[0].view(rows, -1), *nested[1:]))


def _nested(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """(absmax as numbers, its codes, scales and offset where they have our block size)."""
    codes, scales = tensors["weight.absmax"], tensors["weight.nested_absmax"].float()
    offset, block = torch.tensor([float(state["nested_offset"])]), int(state["nested_blocksize"])
    values = normal_float.dynamic_map()[codes.int()] * scales.repeat_interleave(block)[: codes.numel()] + offset
    return values, (codes, scales, offset) if block == NESTED_BLOCK else None


def _check_map(name: str, entry: Stored, result: Tensor, known: Tensor) -> None:
    if not torch.equal(result.float(), known):
        raise InputError(
            f"{entry.file}: {entry.name} is not the table bitsandbytes uses for NF4; the file is of another version or damaged ({name})"
        )
