"""The fuse stage: every compressed linear on the fastest kernel the device has.

The artifact keeps device-neutral tensors, hard-linked to its parent's; which kernel runs is chosen when it is opened, and kept in a
cache of the device. Knows which modules share an input; the kernels are `kernels/`.
"""

import time
from collections import Counter
from typing import Any

import torch
from torch import nn

from ...compress.weights import StoredWeight
from ...kernels.linear import FusedGroup, bind_group
from ..artifact import Artifact, ArtifactWriter
from ..blocks import Binder, StreamedModel
from ..models import positions
from ..stage_settings import StageSpec
from .context import Context, Outcome


def fuse(parent: Artifact, writer: ArtifactWriter, spec: StageSpec, context: Context) -> Outcome:
    """Take the parent over and try its first block through the kernels, so that what cannot run is said now."""
    for part in sorted(set(parent.manifest["files"]) - set(_documents(parent))):
        name = part.split(".")[0]
        if name not in writer.finished:
            writer.copy_part(name)
    backends: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    binder = kernel_binder(spec.config.backend, context.device, backends, reasons)
    model = StreamedModel(parent, context.device, context.dtype, binder)
    ids = torch.zeros(1, min(128, positions(model.model.config) or 128), dtype=torch.long)
    began = 0.0
    with torch.no_grad():
        hidden = model.embed(ids)
        model.load_block(0)
        model.run_block(0, hidden)
        began = time.monotonic()
        for _ in range(5):
            model.run_block(0, hidden)
    seconds = (time.monotonic() - began) / 5 * model.structure.blocks
    notes = [f"{name}: {reason}" for name, reason in sorted(reasons.items())][:10]
    return Outcome(metrics={"backends": dict(backends), "block_tokens_per_second": ids.numel() / seconds}, notes=notes)


def _documents(parent: Artifact) -> list[str]:
    return [name for name in parent.manifest["files"] if not name.endswith(".safetensors")]


def kernel_binder(
    backend: Any, device: torch.device, backends: Counter[str] | None = None, reasons: dict[str, str] | None = None
) -> Binder:
    """Replaces a block's compressed linears by kernel-bound ones, those that read one input as one product; counts the backends and
    keeps the reasons of what was not bound."""

    def bind_block(model: nn.Module, prefix: str, records: dict[str, StoredWeight]) -> None:
        modules = {name: module for name in records if isinstance(module := _find(model, name), nn.Module)}
        dtype = next((p.dtype for p in model.parameters() if not p.is_meta), torch.float32)
        for names in _groups(list(modules)):
            members = [(records[name], _bias(modules[name])) for name in names]
            group = bind_group(members, device=device, dtype=dtype, backend=backend)
            shared = SharedInput(group) if group.joined and len(names) > 1 else None
            for index, name in enumerate(names):
                linear = group.linears()[0 if group.joined else index]
                model.set_submodule(name, Member(shared, index) if shared is not None else linear)
                if backends is not None:
                    backends[str(linear.backend)] += 1
                if reasons is not None and linear.backend == "reference":
                    reasons[name] = linear.reason

    return bind_block


# leaves of a block's modules that read the same input, in the order in which they are called
ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def _groups(names: list[str]) -> list[list[str]]:
    """Names that share an input together, every other name by itself."""
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


def _bias(module: Any) -> torch.Tensor | None:
    return None if module.bias is None else module.bias.data


class SharedInput:
    """One product for several linears of one input: the first that is called computes all, the others take their part when they are
    handed the very same tensor, else they compute again."""

    def __init__(self, group: FusedGroup) -> None:
        self.group = group
        self.x: torch.Tensor | None = None
        self.parts: list[torch.Tensor | None] = []

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if self.x is not x or self.parts[index] is None:
            self.x, self.parts = x, list(self.group(x))
        out = self.parts[index]
        assert out is not None
        self.parts[index] = None
        if all(part is None for part in self.parts):
            self.x = None
        return out


class Member(nn.Module):
    """One linear of a group, standing where it stood in the model."""

    def __init__(self, shared: SharedInput, index: int) -> None:
        super().__init__()
        self.shared, self.index = shared, index
        if index == 0:
            self.group = shared.group  # registered once, so that parameters and devices are seen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared.part(self.index, x)
