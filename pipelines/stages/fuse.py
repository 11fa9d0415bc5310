"""The fuse stage: every compressed linear on the fastest kernel the device has, smoothing folded into the norms before it.

The artifact keeps device-neutral tensors, hard-linked to its parent's where nothing was folded; which kernel runs is chosen when it
is opened, and kept in a cache of the device. Knows parts of an artifact; what a fold is is `folding`, how records become modules
`binding`.
"""

from typing import Any

import torch

from ..devices.compute import free_bytes
from ..evaluation.speed import resident_bytes, tokens_per_second
from ..models.binding import KernelBinder
from ..models.blocks import StreamedModel
from ..models.folding import fold_block
from ..models.loading import whole_model
from ..models.rounded_inputs import raw_inputs
from ..models.source import positions
from ..recipes.stage_settings import StageSpec
from ..store.artifact import Artifact, ArtifactWriter, shards_of
from .context import Context, Outcome, check_stop

PROMPT_TOKENS = 16
ROOM = 1.5  # a model is loaded whole to be timed where its weights on disk take this much less than the memory that is free


def fuse(parent: Artifact, writer: ArtifactWriter, spec: StageSpec, context: Context) -> Outcome:
    """Fold what can be folded, take the rest of the parent over, and let the whole model write a few tokens through the kernels, so that
    what cannot run is refused now."""
    notes: list[str] = []
    if any("smooth" in description for description in parent.linears.values()):
        notes += _fold(parent, writer, context)
    for file in sorted(name for name in parent.manifest["files"] if name.endswith(".safetensors")):
        part = file.split(".")[0]
        if part not in writer.finished:
            writer.copy_part(part)
    binder = KernelBinder(spec.config.backend, context.device)
    speed, kept = _write_a_little(parent, binder, context)
    if speed is None:
        notes.append(f"speed not measured: {parent.total_bytes() / 1e9:.1f} GB of weights leave too little of this machine's memory")
    notes += [f"{name}: {reason}" for name, reason in sorted(binder.reasons.items())][:10]
    return Outcome(metrics={"backends": dict(binder.backends), "resident_bytes": kept}, notes=notes, tokens_per_second=speed)


def _fold(parent: Artifact, writer: ArtifactWriter, context: Context) -> list[str]:
    """Parts of the blocks in which a norm took a smoothing vector up. Proven in float32, on whatever the first tokens' embeddings are."""
    model = StreamedModel(parent, context.device, torch.float32)
    vocabulary = model.model.get_input_embeddings().num_embeddings
    hidden = model.embed(torch.arange(PROMPT_TOKENS).remainder(vocabulary).view(1, -1))
    notes: list[str] = []
    folds = 0
    for index in range(model.structure.blocks):
        check_stop(context)
        part, prefix = f"block-{index:05d}", f"{model.structure.prefix}.{index}."
        if part in writer.finished:
            notes += writer.finished[part]["extra"].get("notes", [])
            folds += writer.finished[part]["extra"].get("folds", 0)
            continue
        block = model.load_block(index)
        for module in block.modules():
            raw_inputs(module)
        linears = {name: parent.stored(name).to(context.device) for name in parent.linears if name.startswith(prefix)}
        folded = fold_block(block, prefix, linears, hidden, lambda h, index=index: model.run_block(index, h))
        model.unload_block(index)
        linears |= folded.records
        tensors = {**parent.plain(prefix), **folded.tensors}
        vectors = sum(name.endswith(".weight") for name in folded.tensors)
        writer.write_part(part, shards_of(tensors, linears), linears, {"notes": list(folded.notes), "folds": vectors})
        notes += folded.notes
        folds += vectors
    return [f"{folds} smoothing vectors folded into the norms before them", *notes]


def _write_a_little(parent: Artifact, binder: KernelBinder, context: Context) -> tuple[float | None, int | None]:
    """(tokens a second, bytes its weights keep) of the whole model on the kernels; its first block alone where memory is short."""
    free = free_bytes(context.device)
    if free is not None and parent.total_bytes() * ROOM > free:
        model = StreamedModel(parent, context.device, context.dtype, binder)
        hidden = model.embed(torch.zeros(1, PROMPT_TOKENS, dtype=torch.long))
        model.load_block(0)
        model.run_block(0, hidden)
        return None, None
    model: Any = whole_model(parent, context.device, context.dtype, binder).model
    model.config.use_cache = True
    room = positions(model.config) or 4 * PROMPT_TOKENS
    prompt = torch.zeros(1, min(PROMPT_TOKENS, room // 2), dtype=torch.long)
    return tokens_per_second(model, prompt, min(16, room // 2)), resident_bytes(model)
