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
from ...kernels.linear import bind
from ..artifact import Artifact, ArtifactWriter
from ..blocks import Binder, StreamedModel
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
    ids = torch.zeros(1, 128, dtype=torch.long)
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
    return Outcome(metrics={"backends": dict(backends), "block_tokens_per_second": 128 / seconds}, notes=notes)


def _documents(parent: Artifact) -> list[str]:
    return [name for name in parent.manifest["files"] if not name.endswith(".safetensors")]


def kernel_binder(
    backend: Any, device: torch.device, backends: Counter[str] | None = None, reasons: dict[str, str] | None = None
) -> Binder:
    """Replaces a block's compressed linears by kernel-bound ones; counts the backends and keeps the reasons of what was not bound."""

    def bind_block(model: nn.Module, prefix: str, records: dict[str, StoredWeight]) -> None:
        for name, record in records.items():
            owner_name, _, leaf = name.rpartition(".")
            owner = model.get_submodule(owner_name)
            old: Any = getattr(owner, leaf, None)
            if not isinstance(old, nn.Module):
                continue  # an expert inside a fused parameter: already dense
            bias: Any = old.bias
            dtype = next((p.dtype for p in model.parameters() if not p.is_meta), torch.float32)
            fused = bind(record, bias.data if bias is not None else None, device=device, dtype=dtype, backend=backend)
            setattr(owner, leaf, fused)
            if backends is not None:
                backends[fused.backend] += 1
            if reasons is not None and fused.backend == "reference":
                reasons[name] = fused.reason

    return bind_block
