"""The recover stage block by block: each block learns to do what the dense one does to the hidden states that the blocks below, already
recovered, hand in. Memory is one block, its dense twin and the hidden states, whatever the depth.

A finished block is run as it was written, so a resumed stage goes on with the same bits. Of a training batch window w is of slot w % SLOTS, whose
windows are computed together; slots and held-out batches belong to ranks, and so do their hidden states. Knows the walk; the fitting is `recover/reconstruct`.
Legend: B batch, T tokens, D model width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...compress.weights import DenseWeight, StoredWeight
from ...recover.compressed_linear import CompressedLinear
from ...recover.compressed_model import cache_dense, compressed_linears
from ...recover.peers import ReplicasDiffer
from ...recover.reconstruct import Block, Fitted, Reconstruct, reconstruct
from ...recover.recovery_methods import attach
from ...recover.selection import where
from ...recover.student import Batch
from ..errors import InputError, UsageError
from ..logs import bar
from ..models.blocks import StreamedModel
from ..models.hidden import HiddenStates, Room
from ..models.source import load_config
from ..models.structure import Site, skeleton
from ..ranks.exchange import SLOTS
from ..recipes.stage_settings import StageSpec
from ..store.artifact import Artifact, ArtifactWriter
from ..store.files import read_json, write_json
from .context import Context, Outcome, check_stop
from .writing import SLACK, InPlace, Trained, as_stored_before, audited, dense_cache_bytes, trained, untouched, write_block, write_rest

UNDONE = "undone.json"
"""In a scratch directory: the whole had become worse (held-out losses before and after), and its parts are being written as the parent has
them. A stage that is killed meanwhile goes on with that."""


@dataclass(frozen=True)
class _Text:
    """What is trained on and judged by, and which of it is here. `units`: token ids of a slot of a batch, by number; `batches` names those of each;
    `held_out` by number."""

    units: dict[int, Tensor]
    batches: list[list[int]]
    held_out: dict[int, Batch]
    tokens: int
    shapes: list[Tensor]
    """Ids of every shape that there is, here or elsewhere."""

    @classmethod
    def of(cls, config: Reconstruct, context: Context) -> "_Text":
        draw, ranks = context.inputs.training(config.seq_len, config.batch_size), context.ranks
        drawn = [draw(i).ids for i in range(-(-config.samples // config.batch_size))]
        held_out = context.inputs.held_out(config.seq_len, config.batch_size)
        slots = min(SLOTS, config.batch_size)
        units = {i * slots + slot: ids[slot::slots] for i, ids in enumerate(drawn) for slot in range(slots)}
        shapes = {tuple(ids.shape): ids for ids in (*units.values(), *(batch.ids for batch in held_out))}
        return cls(
            {number: ids for number, ids in units.items() if ranks.owns(number % slots)},
            [list(range(i * slots, (i + 1) * slots)) for i in range(len(drawn))],
            {number: batch for number, batch in enumerate(held_out) if ranks.owns(number)},
            sum(ids.numel() for ids in drawn),
            list(shapes.values()),
        )


@dataclass
class _Walk:
    """The stage under way: hidden states of the training windows, and of the held-out ones in the model as it was and as it becomes."""

    parent: Artifact
    writer: ArtifactWriter
    spec: StageSpec
    context: Context
    model: StreamedModel
    dense: StreamedModel
    text: "_Text"
    hidden: HiddenStates
    start: HiddenStates
    now: HiddenStates
    reports: list[dict[str, Any]] = field(default_factory=list)

    @property
    def config(self) -> Reconstruct:
        return self.spec.config


def reconstruct_blocks(parent: Artifact, writer: ArtifactWriter, spec: StageSpec, context: Context) -> Outcome:
    """Run it; resumes behind the blocks that `writer` finds finished. UsageError without a dense model; QualityError when the audit fails."""
    if context.teacher is None:
        raise UsageError(
            f"{spec.address}: reconstruct imitates dense blocks, and the model came quantized: give the dense one with --teacher"
        )
    config: Reconstruct = spec.config
    model = StreamedModel(parent, context.device, context.dtype, virtual=False)
    dense = StreamedModel(context.teacher, context.device, context.dtype, virtual=False)
    text = _Text.of(config, context)
    for some in text.shapes:
        for each in (model, dense):
            each.embed(some)  # what its blocks are called with, learnt while none of them is loaded
    room, held_out = Room.measured(context.device, context.scratch, context.ranks.size), [batch.ids for batch in text.held_out.values()]
    hidden, start, now = (HiddenStates.of(map(model.embed, some), room) for some in (text.units.values(), held_out, held_out))
    walk = _Walk(parent, writer, spec, context, model, dense, text, hidden, start, now)
    with bar(f"{spec.address} reconstruct, blocks", model.structure.blocks) as shown:
        for index in range(model.structure.blocks):
            _block(walk, index)
            shown.advance()
            check_stop(context)
    undone, ranks = writer.scratch / UNDONE, context.ranks
    if losses := ranks.broadcast(read_json(undone)["losses"] if ranks.leads and undone.is_file() else None):
        before, after = losses
    else:
        before, after = _loss(walk, walk.start), _loss(walk, walk.now)
    worse = not after <= before + SLACK
    if worse and ranks.leads:
        write_json(undone, {"losses": [before, after]})
    if worse:
        _undo(walk)
    write_rest(parent, writer, model, Trained())
    audited(parent, writer, spec.address, codes_move=False)
    return _outcome(walk, before, after, worse, text.tokens)


def _block(walk: _Walk, index: int) -> None:
    """Fit one block and write it, unless it is written already; then run it on every hidden state."""
    model, part = walk.model, f"block-{index:05d}"
    chosen = index in where(model.model, walk.config.targets, walk.config.layers).blocks
    with torch.no_grad():
        model.load_block(index)
        model.expect(index + 1)
        walk.start.through(partial(model.run_block, index))
        model.unload_block(index)
    if part not in walk.writer.finished:
        changed, report = _fitted(walk, index) if chosen else (Trained(), {})
        write_block(walk.parent, walk.writer, model.structure, index, changed, report)
    extra = walk.writer.finished[part]["extra"]
    walk.reports += [extra["reconstruct"]] if "reconstruct" in extra else []
    with torch.no_grad():
        model.load_block(index, walk.writer.view(part))
        for states in (walk.hidden, walk.now):
            states.through(partial(model.run_block, index))
        model.unload_block(index)


def _fitted(walk: _Walk, index: int) -> tuple[Trained, dict[str, Any]]:
    """What training changed in a block, and its entry for the report."""
    model, dense, context = walk.model, walk.dense, walk.context
    with torch.no_grad():
        dense.load_block(index)
        here = (walk.hidden, walk.text.units), (walk.now, walk.text.held_out)
        pairs, checks = (states.paired(partial(dense.run_block, index), list(numbers)) for states, numbers in here)
    model.load_block(index, bind=InPlace(walk.parent, model.structure, context.device, context.dtype))
    model.model.requires_grad_(False)
    twins = {s.name: _dense_twin(dense, s, context.dtype) for s in model.structure.of_block(index)}
    chosen = {n for n in compressed_linears(model.model) if where(model.model, walk.config.targets, walk.config.layers).linear(n)}

    def attached(targets: tuple[str, ...]) -> Any:
        made = attach(walk.spec.method, model.model, replace(walk.config, targets=targets, layers=(index,)), seed=context.seed)
        as_stored_before(made, walk.parent)
        cache_dense(compressed_linears(model.model), dense_cache_bytes(context.device))  # each slot of a step would rebuild them
        return made

    block = Block(
        model.model, lambda h: model.run_block(index, h), pairs, walk.text.batches, checks, twins,
        frozenset(chosen), attached, context.seed + index, context.stop, context.peers,
    )  # fmt: skip
    try:
        fitted = reconstruct(block, walk.config)
    except ValueError as error:
        raise UsageError(f"{walk.spec.address}: {error}") from error
    except ReplicasDiffer as error:
        raise InputError(f"{walk.spec.address}: {error}") from error
    changed = trained(model.model, fitted.plain) if fitted.improved else Trained()
    model.unload_block(index)
    dense.unload_block(index)
    return changed, {"reconstruct": _report(index, fitted, sorted(changed.records))}


def _dense_twin(dense: StreamedModel, site: Site, dtype: torch.dtype) -> nn.Module:
    """What a linear is in the dense block; an expert of a fused parameter as a linear of its own."""
    if site.expert is None:
        return dense.model.get_submodule(site.module)
    return CompressedLinear(StoredWeight(DenseWeight(dense.matrix(site))), None, dtype)


def _report(index: int, fitted: Fitted, names: list[str]) -> dict[str, Any]:
    errors = {"block_error_before": fitted.error_before, "block_error_after": fitted.error_after}
    return {"block": index, "linears": names, "count": fitted.count, "diverged": list(fitted.diverged), **errors}


def _loss(walk: _Walk, hidden: HiddenStates) -> float:
    """Mean negative log-likelihood of the held-out tokens that count."""
    sums: dict[int, tuple[float, int]] = {}
    for states, (number, batch) in zip(hidden, walk.text.held_out.items(), strict=True):
        targets = batch.targets().to(states.device)
        with torch.no_grad():
            log_p = batch.predictions(walk.model.logits(states)).float().log_softmax(-1)
        sums[number] = float(log_p.gather(-1, targets.unsqueeze(-1)).double().sum()), len(targets)
    total, count = 0.0, 0
    for loss, tokens in walk.context.ranks.in_order(sums).values():
        total, count = total - loss, count + tokens
    return total / max(1, count)


def _undo(walk: _Walk) -> None:
    """Every block as the parent has it."""
    for index in range(walk.model.structure.blocks):
        extra: Mapping[str, Any] = walk.writer.finished[f"block-{index:05d}"]["extra"]
        write_block(
            walk.parent, walk.writer, walk.model.structure, index, Trained(), {k: v for k, v in extra.items() if k == "reconstruct"}
        )


def _outcome(walk: _Walk, before: float, after: float, worse: bool, tokens: int) -> Outcome:
    notes = untouched(walk.config, skeleton(load_config(walk.parent.directory)), walk.model.structure)
    notes += [f"block {report['block']}: {text}" for report in walk.reports for text in report["diverged"]]
    better = sum(report["block_error_after"] < report["block_error_before"] for report in walk.reports)
    if worse:
        lost = f"the blocks came nearer to the dense ones, but the held-out loss went from {before:.4f} to {after:.4f}"
        notes.append(f"{lost}; the model is as it was before this stage")
    elif better < len(walk.reports):
        notes.append(f"{len(walk.reports) - better} of {len(walk.reports)} blocks could not be improved and are as they were")
    layers = [
        {"name": n, "output_error": None, "metrics": {k: report[k] for k in ("block_error_before", "block_error_after")}}
        for report in walk.reports for n in report["linears"] if n in walk.parent.linears
    ]  # fmt: skip
    metrics = {
        "held_out_loss_start": before,
        "held_out_loss_best": after,
        "held_out_loss_kept": before if worse else after,
        "tokens": tokens,
    }
    metrics["blocks"] = [{k: report[k] for k in ("block", "block_error_before", "block_error_after")} for report in walk.reports]
    return Outcome(layers, metrics, notes, sum(report["count"] for report in walk.reports))
