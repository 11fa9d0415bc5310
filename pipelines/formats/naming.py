"""Maps the names a model has in memory to those of its files, by transformers' own conversions.

In memory a mixture of experts holds one fused tensor per layer; its files hold a matrix per expert. Compressed matrices cannot go
through the conversion as values, so the numbers of their rows do: where a row's number arrives, its codes belong.
Legend: O out, I in, E experts.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ...compress.weights import StoredWeight
from ..errors import UsageError, as_input_error
from .checkpoint import Checkpoint, Lazy
from .rows import take_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def empty_model(config: Mapping[str, object]) -> "PreTrainedModel":
    """The architecture without memory behind it. InputError when transformers does not know it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {name: value for name, value in config.items() if name not in ("model_type", "quantization_config", "torch_dtype")}
    with as_input_error(f"transformers makes no causal language model of model_type {config.get('model_type')!r}"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(str(config.get("model_type", "")), **settings))


@dataclass(frozen=True)
class Cut:
    """A matrix of the file: rows (int64 [O]) of the linear `source` in memory."""

    source: str
    rows: Tensor


@dataclass(frozen=True)
class Names:
    """How one architecture's state dict becomes the tensors of its files."""

    model: "PreTrainedModel"

    @staticmethod
    def of(config: Mapping[str, object]) -> "Names":
        return _names(json.dumps(config, sort_keys=True, default=str))

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self.model.state_dict().items()}

    @cached_property
    def transposed(self) -> frozenset[str]:
        """Modules that keep their weight as [I, O]."""
        return frozenset(name for name, module in self.model.named_modules() if isinstance(module, Conv1D))

    @cached_property
    def tied(self) -> dict[str, str]:
        """alias → source, for parameters that the architecture shares."""
        first: dict[int, str] = {}
        pairs = [(name, first.setdefault(id(p), name)) for name, p in self.model.named_parameters(remove_duplicate=False)]
        return {name: source for name, source in pairs if name != source}

    def shape_of(self, linear: str) -> tuple[int, ...] | None:
        """[O, I] of a linear or of one expert's matrix; None for what the architecture does not have."""
        shape = self.shapes.get(f"{linear}.weight")
        if shape is None and expert_parameter(linear) is not None:
            shape = self.shapes.get(expert_parameter(linear) or "", torch.Size())[1:]
        return None if not shape else tuple(shape[::-1] if linear in self.transposed else shape)

    @cached_property
    def same(self) -> bool:
        """No conversion at all: the files use the names in memory."""
        probe = {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}
        return self.convert(probe) is probe

    def convert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.model, tensors)

    def renamed(self, name: str) -> str:
        """A tensor that is only renamed. UsageError when it is cut or fused instead."""
        shape = self.shapes.get(name, torch.Size([1]))
        names = list(self.convert({name: torch.empty(shape, device="meta")}))
        if len(names) != 1:
            raise UsageError(f"{name} becomes {len(names)} tensors in this architecture's files; one was expected")
        return names[0]


@lru_cache(maxsize=4)
def _names(config: str) -> Names:
    return Names(empty_model(json.loads(config)))


def file_tensors(names: Names, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its name in the file, converted a layer at a time so that a layer's worth is held."""
    if names.same:
        yield from tensors.items()
        return
    for layer in by_layer(tensors):
        yield from names.convert({name: tensors[name] for name in layer}).items()


def by_layer(names: Iterable[str]) -> list[list[str]]:
    """Names grouped by what stands before and in their first number (`model.layers.3`), in order of appearance."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        groups.setdefault(name if number is None else ".".join(parts[: number + 1]), []).append(name)
    return list(groups.values())


def trace(names: Names, checkpoint: Checkpoint) -> dict[str, Cut]:
    """File linear → where its rows come from. UsageError for linears that the files keep fused or cut along their inputs."""
    sources: list[str] = []
    offsets: list[int] = []
    probes: dict[str, Tensor] = {}
    experts: dict[str, int] = {}
    total = 0
    for name, record in checkpoint.linears.items():
        rows = record.shape[0]
        sources.append(name)
        offsets.append(total)
        parameter = expert_parameter(name)
        if parameter is None:
            probes[f"{name}.weight"] = _column(torch.arange(total, total + rows), name in checkpoint.transposed)
        else:
            experts[parameter] = experts.get(parameter, 0) + 1
            piece = _column(torch.arange(total, total + rows), parameter in checkpoint.transposed).unsqueeze(0)
            probes[parameter] = piece if parameter not in probes else torch.cat([probes[parameter], piece])
        total += rows
    starts = torch.tensor(offsets)
    out: dict[str, Cut] = {}
    for layer in by_layer(probes):
        for target, ids in names.convert({name: probes[name] for name in layer}).items():
            out |= _cut_of(target, ids, starts, sources)
    return out


def _column(ids: Tensor, transposed: bool) -> Tensor:
    return ids.unsqueeze(0) if transposed else ids.unsqueeze(1)


def _cut_of(target: str, ids: Tensor, starts: Tensor, sources: list[str]) -> dict[str, Cut]:
    if ids.dim() != 2 or not target.endswith(".weight") or 1 not in ids.shape:
        raise UsageError(
            f"{target}: this architecture's files keep it as one tensor of shape {list(ids.shape[:1])}…, which no quantized format holds; "
            "leave these linears out of the compression (overrides) or use --format dense"
        )
    flat = ids.reshape(-1)
    owner = torch.searchsorted(starts, flat, right=True) - 1
    if not bool((owner == owner[0]).all()):
        raise UsageError(f"{target}: this architecture's files mix several linears in it; use --format dense")
    which = int(owner[0])
    return {target.removesuffix(".weight"): Cut(sources[which], flat - starts[which])}


def expert_parameter(name: str) -> str | None:
    """`model.layers.0.mlp.experts.gate_up_proj` for `….gate_up_proj.3`, None for a linear of its own.

    A fused parameter is distinguished from a module in a numbered list by its own name, which is not a number's parent module:
    `experts.3.gate_proj` ends in a word, `experts.gate_up_proj.3` in a number.
    """
    head, _, tail = name.rpartition(".")
    return head if tail.isdigit() else None


def to_file(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint under the names of its files, fused experts taken apart into a linear each."""
    names = Names.of(checkpoint.config)
    if names.same:
        fused = next((name for name in checkpoint.linears if expert_parameter(name)), None)
        if fused is not None:
            raise UsageError(
                f"{fused}: this architecture's files keep its experts fused, which no quantized format holds; use --format dense"
            )
        return checkpoint
    linears: dict[str, Callable[[], StoredWeight]] = {
        target: partial(_take, checkpoint.linears, cut) for target, cut in trace(names, checkpoint).items()
    }
    tensors: dict[str, Callable[[], Tensor]] = {}
    for name in checkpoint.tensors:
        for target in targets(names, name):
            tensors[target] = partial(_converted, names, checkpoint.tensors, name, target)
    transposed = frozenset(target for target, cut in trace(names, checkpoint).items() if cut.source in checkpoint.transposed)
    tied = {names.renamed(alias): names.renamed(source) for alias, source in checkpoint.tied.items()}
    return replace(checkpoint, linears=Lazy(linears), tensors=Lazy(tensors), tied=tied, transposed=transposed)


def targets(names: Names, name: str) -> list[str]:
    return list(names.convert({name: torch.empty(names.shapes.get(name, torch.Size([1])), device="meta")}))


def _converted(names: Names, tensors: Mapping[str, Tensor], name: str, target: str) -> Tensor:
    return names.convert({name: tensors[name]})[target]


def _take(linears: Mapping[str, StoredWeight], cut: Cut) -> StoredWeight:
    record = linears[cut.source]
    if torch.equal(cut.rows, torch.arange(record.shape[0])):
        return record
    try:
        return take_rows(record, cut.rows)
    except ValueError as error:
        raise UsageError(f"{cut.source}: {error}; use --format dense") from error
