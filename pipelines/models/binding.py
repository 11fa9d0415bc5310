"""Binds an artifact's records to the kernels of a device: which modules share an input, and which table is tied to which head.

Knows modules and records; the kernels are `kernels/`, what a block is is `blocks`.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...compress.weights import DenseWeight, StoredWeight
from ...kernels.linear import bind, bind_group
from ...kernels.table import bind_table
from .structure import parameters_are_read, set_parameter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# leaves of a block's modules that read the same input, in the order in which they are called
ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass
class KernelBinder:
    """A `blocks.Binder`: replaces a block's compressed linears by kernel-bound ones, those that read one input as one product, and the
    token embeddings and the head by packed ones. Counts the backends and keeps the reasons of what runs as plain torch."""

    backend: Any
    device: torch.device
    backends: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)
    experts = False

    def __call__(self, model: nn.Module, prefix: str, records: dict[str, StoredWeight]) -> None:
        modules = {name: module for name in records if isinstance(module := _find(model, name), nn.Module)}
        dtype = next((p.dtype for p in model.parameters() if not p.is_meta), torch.float32)
        read = {name for name in modules if parameters_are_read(model, name)}
        self._keep_dense(model, read, records, dtype)
        for names in one_input([name for name in modules if name not in read]):
            members = [(records[name], _bias(modules[name])) for name in names]
            group = bind_group(members, device=self.device, dtype=dtype, backend=self.backend)
            placed = group.parts() if group.joined and len(names) > 1 else group.linears()
            for name, linear in zip(names, placed, strict=True):
                model.set_submodule(name, linear)
                self._note(name, linear)

    def _keep_dense(self, model: nn.Module, names: Collection[str], records: dict[str, StoredWeight], dtype: torch.dtype) -> None:
        """Linears that the model's code does not only call, as Mamba's dt_proj; no stage rounds their inputs."""
        for name in names:
            assert records[name].activations is None, name
            module = model.get_submodule(name)
            dense = records[name].dense().to(self.device, dtype)
            set_parameter(model, f"{name}.weight", dense.T.contiguous() if isinstance(module, Conv1D) else dense)
            self.backends["dense"] += 1
            self.reasons[name] = "the model's code reads its weight, so it stays dense"

    def tables(self, model: Any, records: dict[str, StoredWeight]) -> None:
        """The token embeddings and the head, each named by its parameter. One that is stored plain is kept in 16 bits on a CPU, where
        what memory delivers decides the speed; elsewhere it stays as it is."""
        dtype = next((p.dtype for p in model.parameters() if not p.is_meta), torch.float32)
        for name, record in records.items():
            weight = model.get_parameter(name)
            users = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if getattr(m, "weight", None) is weight]
            stays = isinstance(record.base, DenseWeight) and (self.device.type != "cpu" or self.backend != "auto")
            head = None
            for module in users:
                if stays or (isinstance(module, nn.Embedding) and not self._looks_up(name, module)):
                    if model.get_parameter(name).is_meta:
                        set_parameter(model, name, record.dense().to(self.device, dtype))
                    module.weight = model.get_parameter(name)
                elif isinstance(module, nn.Embedding):
                    table, head = bind_table(record, device=self.device, dtype=dtype, scale=getattr(module, "embed_scale", None))
                    self._put(model, module, table)
                else:
                    shared = head is not None and module.bias is None and record.activations is None
                    self._put(model, module, head if shared and head is not None else self._bind(record, module, dtype))
            if not stays:
                _untie(model)

    def _looks_up(self, name: str, embedding: nn.Embedding) -> bool:
        """Whether an embedding may be replaced: it looks up rows, and at most scales them."""
        if self.backend == "reference":
            return False
        plain = type(embedding).forward is nn.Embedding.forward or hasattr(embedding, "embed_scale")
        if not plain:
            self.reasons[name] = f"{type(embedding).__name__} does more than look up rows, so its table stays dense"
        return plain

    def _bind(self, record: StoredWeight, linear: nn.Module, dtype: torch.dtype) -> nn.Module:
        backend = "reference" if self.backend == "reference" else "auto"
        return bind(record, _bias(linear), device=self.device, dtype=dtype, backend=backend)

    def _put(self, model: "PreTrainedModel", old: nn.Module, new: nn.Module) -> None:
        name = next(n for n, module in model.named_modules() if module is old)
        model.set_submodule(name, new)
        self._note(name, new)

    def _note(self, name: str, module: Any) -> None:
        self.backends[str(module.backend)] += 1
        if module.backend == "reference":
            self.reasons[name] = module.reason


def one_input(names: list[str]) -> list[list[str]]:
    """Names grouped by shared input, every other name by itself."""
    groups: dict[tuple[str, int], list[str]] = {}
    alone: list[list[str]] = []
    for name in names:
        owner, _, leaf = name.rpartition(".")
        place = next((i for i, leaves in enumerate(ONE_INPUT) if leaf in leaves), None)
        if place is None:
            alone.append([name])
        else:
            groups.setdefault((owner, place), []).append(name)
    return [sorted(g, key=lambda n: ONE_INPUT[place].index(n.rpartition(".")[2])) for (_, place), g in groups.items()] + alone


def _find(model: nn.Module, name: str) -> Any:
    """The module of that name; None for an expert inside a fused parameter, which is already dense."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias.data if isinstance(bias, Tensor) else None


def _untie(model: nn.Module) -> None:
    """Bound modules have no parameter that could be tied, and share their memory already."""
    for module in model.modules():
        if getattr(module, "_tied_weights_keys", None):
            module._tied_weights_keys = None  # type: ignore[assignment]
            module.all_tied_weights_keys = {}  # type: ignore[assignment]
