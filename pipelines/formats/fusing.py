"""Renames and fuses tensors from the names in an architecture's files to those it has in memory, for a checkpoint that a format has read.

The way there is `naming`'s, read backwards: where a row's number goes on writing, its codes come from on reading.
Legend: O out, I in, E experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ...compress.weights import StoredWeight
from ..errors import InputError
from .checkpoint import Checkpoint, Lazy
from .naming import Names, targets
from .rows import stack_rows, take_rows


def to_memory(checkpoint: Checkpoint) -> Checkpoint:
    """The inverse of `to_file` for what a format has read: renamed, experts fused, tied weights once, every shape held against the config's.

    InputError for a weight that is missing, of another shape or cannot be fused.
    """
    names = Names.of(checkpoint.config)
    checkpoint = _without_idle_biases(checkpoint, names)
    if not names.same:
        checkpoint = _fused(checkpoint, names)
    checkpoint = _tied_once(checkpoint, names)
    linears = {name: partial(_checked_linear, checkpoint, name, names.shape_of(name)) for name in checkpoint.linears}
    tensors = {name: partial(_checked_tensor, checkpoint, name, names.shapes.get(name)) for name in checkpoint.tensors}
    return replace(checkpoint, linears=Lazy(linears), tensors=Lazy(tensors), transposed=names.transposed)


def _fused(checkpoint: Checkpoint, names: Names) -> Checkpoint:
    needed = {name for name, _ in names.model.named_parameters()}
    linears: dict[str, Callable[[], StoredWeight]] = {}
    tensors: dict[str, Callable[[], Tensor]] = {}
    claimed: set[str] = set()
    for name, shape in names.shapes.items():
        parts = _sources(names, name, shape)
        claimed |= set(parts)
        modules = {target.removesuffix(".weight"): ids for target, ids in parts.items()}
        if all(module in checkpoint.linears for module in modules):
            for target, pieces in _by_expert(name, shape, modules).items():
                linears[target] = partial(_join, name, checkpoint.linears, pieces)
        elif all(target in checkpoint.tensors for target in parts):
            tensors[name] = partial(_assembled, names, name, shape, checkpoint.tensors, parts)
        elif name in needed:
            absent = next(t for t in parts if t not in checkpoint.tensors and t.removesuffix(".weight") not in checkpoint.linears)
            raise InputError(f"{checkpoint.files}: no tensor {absent}, which {name} is made of")
    tensors |= {name: partial(checkpoint.tensors.__getitem__, name) for name in checkpoint.tensors if name not in claimed}
    return replace(checkpoint, linears=Lazy(linears), tensors=Lazy(tensors))


def _tied_once(checkpoint: Checkpoint, names: Names) -> Checkpoint:
    """Both copies of a tied weight are in GPTQ files; equal ones become one again, unequal ones mean it is not tied after all."""
    config, tied = checkpoint.config, {}
    for alias, source in names.tied.items():
        absent = alias not in checkpoint.tensors and alias.removesuffix(".weight") not in checkpoint.linears
        both = alias in checkpoint.tensors and source in checkpoint.tensors
        if absent or (both and torch.equal(checkpoint.tensors[alias], checkpoint.tensors[source])):
            tied[alias] = source
        else:
            config = {**config, "tie_word_embeddings": False}
    kept = {name: partial(checkpoint.tensors.__getitem__, name) for name in checkpoint.tensors if name not in tied}
    return replace(checkpoint, config=config, tensors=Lazy(kept), tied=tied)


def _checked_linear(checkpoint: Checkpoint, name: str, shape: tuple[int, ...] | None) -> StoredWeight:
    record = checkpoint.linears[name]
    if shape is not None and record.shape != shape:
        raise InputError(
            f"{checkpoint.files}: {name} is {record.shape[0]} × {record.shape[1]}; by config.json it is {shape[0]} × {shape[1]}"
        )
    return record


def _checked_tensor(checkpoint: Checkpoint, name: str, shape: torch.Size | None) -> Tensor:
    tensor = checkpoint.tensors[name]
    if shape is not None and tensor.shape != shape:
        raise InputError(f"{checkpoint.files}: {name} has shape {list(tensor.shape)}; by config.json it has {list(shape)}")
    return tensor


def _sources(names: Names, name: str, shape: torch.Size) -> dict[str, Tensor]:
    """File tensor → the numbers (int64) of the rows of `name` it holds; the rows of a fused parameter count through its experts."""
    if len(shape) not in (2, 3):
        return {target: torch.arange(shape[0] if shape else 1) for target in names.convert({name: torch.empty(shape, device="meta")})}
    rows = torch.arange(shape[:-1].numel()).view(*shape[:-1], 1)
    return {target: ids.reshape(-1) for target, ids in names.convert({name: rows}).items()}


def _by_expert(name: str, shape: torch.Size, parts: Mapping[str, Tensor]) -> dict[str, list[tuple[str, Tensor]]]:
    """In-memory linear → [(file linear, the rows it fills)]."""
    if len(shape) == 2:
        return {name.removesuffix(".weight"): list(parts.items())}
    rows = shape[1]
    out: dict[str, list[tuple[str, Tensor]]] = {}
    for source, ids in parts.items():
        expert = int(ids[0]) // rows
        if not bool((ids // rows == expert).all()):
            raise InputError(f"{source} holds rows of several experts of {name}; only one each can be read")
        out.setdefault(f"{name}.{expert}", []).append((source, ids % rows))
    return out


def _join(name: str, linears: Mapping[str, StoredWeight], pieces: Sequence[tuple[str, Tensor]]) -> StoredWeight:
    records = [linears[source] for source, _ in pieces]
    order = torch.cat([ids for _, ids in pieces])
    try:
        joined = records[0] if len(records) == 1 else stack_rows(records)
    except ValueError as error:
        raise InputError(f"{', '.join(source for source, _ in pieces)}: they belong into {name}, but {error}") from error
    if joined.shape[0] != order.numel():
        raise InputError(f"{pieces[0][0]}: {joined.shape[0]} rows, {name} has room for {order.numel()}")
    return joined if torch.equal(order, torch.arange(order.numel())) else take_rows(joined, order.argsort())


def _assembled(names: Names, name: str, shape: torch.Size, tensors: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> Tensor:
    """A dense tensor assembled from the file's, verified by splitting it again."""
    result = {target: tensors[target] for target in parts}
    if list(result) == [name]:
        return result[name]
    flat = torch.empty(shape, dtype=next(iter(result.values())).dtype).reshape(-1, shape[-1] if len(shape) > 1 else 1)
    for target, ids in parts.items():
        piece = result[target].reshape(ids.numel(), -1)
        if piece.shape[1] != flat.shape[1]:
            raise InputError(f"{target} has shape {list(result[target].shape)}, which does not fit into {name} {list(shape)}")
        flat[ids] = piece
    whole = flat.view(shape)
    for target, tensor in names.convert({name: whole}).items():
        if not torch.equal(tensor, result[target]):
            raise InputError(
                f"{target}: this architecture's conversion to {name} is not understood; load and save it with transformers first"
            )
    return whole


def _without_idle_biases(checkpoint: Checkpoint, names: Names) -> Checkpoint:
    """auto-gptq gives every linear it saves a bias of zeros; the ones the architecture has no place for go."""
    known = set(names.shapes) | ({target for name in names.shapes for target in targets(names, name)} if not names.same else set())
    spare = [f"{linear}.bias" for linear in checkpoint.linears if f"{linear}.bias" in checkpoint.tensors and f"{linear}.bias" not in known]
    idle = {name for name in spare if not checkpoint.tensors[name].count_nonzero()}
    kept = {name: partial(checkpoint.tensors.__getitem__, name) for name in checkpoint.tensors if name not in idle}
    return replace(checkpoint, tensors=Lazy(kept)) if idle else checkpoint
