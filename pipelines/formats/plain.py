"""Dense safetensors: every linear as its record's effective weight. Any program reads it.

Masks, smoothing, low-rank terms and sparse deltas are folded into the weight; only activation settings have no place.
Legend: O out, I in, E experts.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UsageError
from ..store.files import read_json
from .biases import with_room_for_biases
from .checkpoint import Checkpoint, Lazy, config_dtype
from .folder import write_folder
from .fusing import to_memory
from .naming import Names, expert_parameter, file_tensors
from .shards import SHARD_BYTES, fresh_directory, open_directory, write_shards

HOW_TO_LOAD = 'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")'


def write(checkpoint: Checkpoint, directory: Path, shard_bytes: int = SHARD_BYTES, dtype: torch.dtype | None = None) -> list[str]:
    """What to tell the user. `dtype` of the weights; None is the config's own, float32 where it says nothing."""
    checkpoint = with_room_for_biases(checkpoint)
    if dtype is None:
        dtype = config_dtype(checkpoint)
    state = dense_state(checkpoint, dtype)
    notes = _notes(checkpoint)
    with fresh_directory(directory) as scratch:
        write_shards(scratch, file_tensors(Names.of(checkpoint.config), state), shard_bytes)
        config = {**checkpoint.config, "dtype": str(dtype).removeprefix("torch.")}
        written = Checkpoint(config, checkpoint.linears, checkpoint.tensors, checkpoint.files, card=checkpoint.card)
        write_folder(written, scratch, None, notes, HOW_TO_LOAD)
    return notes


def _notes(checkpoint: Checkpoint) -> list[str]:
    """What became of masks and low-rank terms."""
    kinds = [(record.mask is not None, record.low_rank is not None) for record in checkpoint.linears.values()]
    pruned, merged, filled = kinds.count((True, False)), sum(low_rank for _, low_rank in kinds), kinds.count((True, True))
    notes = [f"{pruned} pruned linears: their zeros are exact, the masks themselves have no place in a dense checkpoint"] if pruned else []
    if merged:
        notes.append(
            f"one plain model: the low-rank terms of {merged} linears are added into their weights; --adapter keeps base and adapter apart"
        )
    if filled:
        notes.append(f"{filled} pruned linears: the low-rank term fills their zeros; --adapter keeps them")
    return notes


def read(directory: Path) -> Checkpoint:
    """Every tensor under its name in memory, experts fused; which of them are linears only the architecture knows."""
    config = read_json(directory / "config.json")
    stored = open_directory(directory)
    return to_memory(Checkpoint(config, {}, Lazy({name: entry.load for name, entry in stored.items()}), files=directory))


def dense_state(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Lazy[Tensor]:
    """The in-memory state dict without tied aliases; fused experts stacked, `Conv1D` in its own layout."""
    shared = {alias.removesuffix(".weight"): source for alias, source in checkpoint.tied.items()}
    loaders: dict[str, Callable[[], Tensor]] = {name: partial(_cast, checkpoint, name, dtype) for name in checkpoint.tensors}
    fused: dict[str, list[str]] = {}
    for name in checkpoint.linears:
        parameter = expert_parameter(name)
        if parameter is not None:
            fused.setdefault(parameter, []).append(name)
        else:  # a compressed head that is the embedding too is written once, under the embedding's name
            loaders[shared.get(name, f"{name}.weight")] = partial(_weight, checkpoint, name, name in checkpoint.transposed, dtype)
    for parameter, names in fused.items():
        loaders[parameter] = partial(_experts, checkpoint, parameter, sorted(names, key=lambda n: int(n.rpartition(".")[2])), dtype)
    return Lazy(loaders)


def _weight(checkpoint: Checkpoint, name: str, transposed: bool, dtype: torch.dtype | None) -> Tensor:
    record = checkpoint.linears[name]
    if record.activations is not None:
        raise UsageError(
            f"{name}: no checkpoint format here carries the {record.activations.bits}-bit activations of this artifact; "
            "export the stage before the activation quantization, or set activations to none"
        )
    weight = record.dense(dtype or torch.float32)
    return weight.t() if transposed else weight


def _experts(checkpoint: Checkpoint, parameter: str, names: list[str], dtype: torch.dtype | None) -> Tensor:
    """[E, O, I], or [E, I, O] where the architecture multiplies from the left."""
    return torch.stack([_weight(checkpoint, name, parameter in checkpoint.transposed, dtype) for name in names])


def _cast(checkpoint: Checkpoint, name: str, dtype: torch.dtype | None) -> Tensor:
    tensor = checkpoint.tensors[name]
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
