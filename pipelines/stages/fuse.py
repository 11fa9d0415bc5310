"""The fuse stage: every compressed linear on the fastest kernel the device has, smoothing folded into the norms before it.

With `integer_scales` it rounds once more: the scales of matrices with rounded inputs to two levels (`compress/integer_scales`), which its own
perplexity measures. The artifact keeps device-neutral tensors, hard-linked to its parent's where nothing was changed; which kernel runs is chosen when it
is opened, and kept in a cache of the device. Knows parts of an artifact; what a fold is is `folding`, how records become modules
`binding`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...compress.integer_scales import refusal, with_integer_scales
from ...compress.weights import StoredWeight, UniformWeight
from ..devices.compute import free_bytes
from ..evaluation.speed import resident_bytes, tokens_per_second
from ..models.binding import KernelBinder
from ..models.blocks import StreamedModel
from ..models.folding import Folded, fold_block
from ..models.loading import whole_model
from ..models.rounded_inputs import raw_inputs
from ..models.source import positions
from ..recipes.stage_settings import StageSpec
from ..store.artifact import Artifact, ArtifactWriter, shards_of
from .context import Context, Outcome, check_stop

PROMPT_TOKENS = 16
ROOM = 1.5  # a model is loaded whole to be timed where its weights on disk take this much less than the memory that is free


def fuse(parent: Artifact, writer: ArtifactWriter, spec: StageSpec, context: Context) -> Outcome:
    """Fold what can be folded, take over everything else of the parent, and generate a few tokens with the whole model through the kernels, so that
    what cannot run is refused now."""
    notes: list[str] = []
    smoothed = any("smooth" in description for description in parent.linears.values())
    if smoothed or spec.config.integer_scales:
        notes += _rewrite(parent, writer, context, smoothed, spec.config.integer_scales)
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


def _rewrite(parent: Artifact, writer: ArtifactWriter, context: Context, smoothed: bool, integer_scales: bool) -> list[str]:
    """Parts of the blocks: norms that took a smoothing vector up, proven in float32 on whatever the first tokens' embeddings are; then scales of
    two levels."""
    model = StreamedModel(parent, context.device, torch.float32)
    vocabulary = model.model.get_input_embeddings().num_embeddings
    hidden = model.embed(torch.arange(PROMPT_TOKENS).remainder(vocabulary).view(1, -1)) if smoothed else None
    made: list[dict[str, Any]] = []
    for index in range(model.structure.blocks):
        check_stop(context)
        part, prefix = f"block-{index:05d}", f"{model.structure.prefix}.{index}."
        if part not in writer.finished:
            linears = {name: parent.stored(name).to(context.device) for name in parent.linears if name.startswith(prefix)}
            folded = Folded({}, {}, ()) if hidden is None else _folded(model, index, prefix, linears, hidden)
            linears |= folded.records
            changed, levels = _two_levels(linears) if integer_scales else ({}, {})
            tensors = {**parent.plain(prefix), **folded.tensors}
            vectors = sum(name.endswith(".weight") for name in folded.tensors)
            records = linears | changed
            writer.write_part(part, shards_of(tensors, records), records, {"notes": list(folded.notes), "folds": vectors, "levels": levels})
        made.append(writer.finished[part]["extra"])
    notes = [f"{sum(extra.get('folds', 0) for extra in made)} smoothing vectors folded into the norms before them"] if smoothed else []
    notes += [note for extra in made for note in extra.get("notes", [])]
    return notes + (_levels_notes(made) if integer_scales else [])


def _folded(model: StreamedModel, index: int, prefix: str, linears: dict[str, StoredWeight], hidden: Tensor) -> Folded:
    block = model.load_block(index)
    for module in block.modules():
        raw_inputs(module)
    folded = fold_block(block, prefix, linears, hidden, lambda h: model.run_block(index, h))
    model.unload_block(index)
    return folded


def _two_levels(linears: dict[str, StoredWeight]) -> tuple[dict[str, StoredWeight], dict[str, float | str]]:
    """(records whose scales are now of two levels, by the name of every matrix with rounded inputs how far its base moved, ‖Δ‖ / ‖base‖, or why it
    stays)."""
    changed: dict[str, StoredWeight] = {}
    changes: dict[str, float | str] = {}
    for name, record in linears.items():
        if record.activations is None:
            continue
        changes[name] = refusal(record.base)
        if isinstance(record.base, UniformWeight) and not changes[name]:
            changed[name] = replace(record, base=with_integer_scales(record.base))
            before = record.base_dense()
            changes[name] = float((changed[name].base_dense() - before).norm() / before.norm().clamp(min=1e-30))
    return changed, changes


def _levels_notes(made: Sequence[dict[str, Any]]) -> list[str]:
    levels = {name: value for extra in made for name, value in extra.get("levels", {}).items()}
    moved = [value for value in levels.values() if not isinstance(value, str)]
    stay = [f"{name}: its scales stay as they are: {value}" for name, value in levels.items() if isinstance(value, str)]
    mean = f", which moved their weights by {sum(moved) / len(moved):.2%} of their norm in the mean" if moved else ""
    return [f"scales of {len(moved)} matrices are whole numbers times one float an output{mean}", *stay[:10]]


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
