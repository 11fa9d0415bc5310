"""The recover stage: train what the method names on the whole model, everything else frozen, and write it back as records.

The teacher streams block by block a few batches ahead, so only its last hidden states are held. Knows artifacts, text and the
training state's file; what trains and how is `recover/`.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ...recover.activations import training_activation_bytes
from ...recover.adamw import TrainState
from ...recover.compressed_model import cache_dense, compressed_linears
from ...recover.losses import Objective
from ...recover.memory import COPIES, training_memory
from ...recover.merge import stored_loss
from ...recover.peers import ReplicasDiffer
from ...recover.rate_search import found, try_steps
from ...recover.recovery_methods import RECOVER, Gradients, attach, refusal
from ...recover.sharded import local, shard, whole
from ...recover.site import kinds
from ...recover.student import Batch, Student, student_of
from ...recover.train import Hooks, Progress, TrainingDiverged, TrainingText, TrainResult, batch_loss, train
from ...recover.trainable import Attached
from ...recover.training_run import TrainConfig
from ..devices.compute import free_bytes
from ..errors import InputError, UsageError
from ..logs import bar
from ..models.blocks import StreamedModel
from ..models.loading import whole_model
from ..models.source import load_config
from ..models.structure import inspect, skeleton
from ..ranks.exchange import LostRank, Ranks
from ..recipes.stage_settings import StageSpec
from ..store.artifact import Artifact, ArtifactWriter
from ..store.kept import is_whole, keep, kept
from ..store.rundir import TRAINING_STATE
from .block_reconstruction import reconstruct_blocks
from .context import Context, Outcome
from .requantize_trained import requantize_trained
from .sharded_state import keep_parts, kept_parts
from .teacher import streamed_teacher
from .writing import SLACK, InPlace, Trained, as_stored_before, audited, dense_cache_bytes, trained, untouched, write_model

SMALL_STATE_BYTES = 200e6
ROOM = 0.8
"""The share of the free memory that a training step may take without recomputing its blocks."""
log = logging.getLogger("bitmend")


def recover(parent: Artifact, writer: ArtifactWriter, spec: StageSpec, context: Context) -> Outcome:
    """Run a recovery method. UsageError when it cannot serve this model, before any work; QualityError when its audit fails."""
    if RECOVER[spec.method].by_block:
        return reconstruct_blocks(parent, writer, spec, context)
    config = spec.config
    notes: list[str] = []
    if context.teacher is None and config.loss != "cross_entropy":
        config = replace(config, loss="cross_entropy")
        notes += ["trained on next-token cross-entropy: the model came quantized and no --teacher was given to imitate"]
    _check_teacher(parent, context)
    batches, held_out = _texts(context, config)

    bare = skeleton(load_config(parent.directory))
    notes += untouched(config, bare, inspect(bare))
    streamed, student, attached = _student(parent, spec, batches, context)
    parts = _parts(config, context)
    dense_bytes = cache_dense(compressed_linears(streamed.model), 0 if parts else _cache_budget(config, context.device))
    config = replace(config, gradient_checkpointing=checkpoints(parent, config, attached, context, dense_bytes))
    memory = training_memory(streamed.model, attached)
    if parts:
        shard(streamed.model, attached, context.ranks.mesh(context.device.type))
        memory["trainable_bytes"] = COPIES * 4 * sum(local(t.parameter).numel() for t in attached.trainables.values())
    result, speed = _train(spec, streamed.model, student, attached, batches, held_out, config, context)
    if not result.finished:
        raise KeyboardInterrupt
    if parts:
        values = {name: whole(t.parameter.detach()).clone() for name, t in attached.trainables.items()}
        del streamed, student, attached
        streamed, student, attached = _student(parent, spec, batches, context)
        with torch.no_grad():
            for name, trainable in attached.trainables.items():
                trainable.parameter.copy_(values.pop(name))
    model = streamed.model
    if attached.unrounded and result.improved:
        requantize_trained(parent, streamed, attached.unrounded, spec.address, context)
    kept, remarks = _as_kept(model, student, attached, held_out, result, spec)
    results = trained(model, attached.plain) if kept is not None else Trained()
    write_model(parent, writer, streamed, results)
    if kept is not None and attached.extra_modules is not None:
        writer.write_extra_modules(attached.extra_modules())
    audited(parent, writer, spec.address, codes_move=not RECOVER[spec.method].grid_safe)
    layers = [{"name": n, "metrics": {}, "output_error": None} for n in results.records if n in parent.linears]
    metrics = _metrics(result) | {
        "held_out_loss_kept": result.start_loss if kept is None else kept,
        "memory": memory,
        "tokens_per_second": speed,
    }
    return Outcome(layers, metrics, notes + remarks, attached.count())


def _student(
    parent: Artifact, spec: StageSpec, batches: Callable[[int], Batch], context: Context
) -> tuple[StreamedModel, Student, Attached]:
    """The whole model, with the method on it."""
    structure = inspect(skeleton(load_config(parent.directory)))
    streamed = whole_model(parent, context.device, context.dtype, InPlace(parent, structure, context.device, context.dtype))
    student = student_of(streamed.model.requires_grad_(False))
    gradients = Gradients(batches, lambda batch: batch_loss(student, batch, None, Objective("cross_entropy", 1.0)))
    attached = _attached(parent, spec, streamed, context.seed, gradients)
    return streamed, attached.run or student, attached


def _parts(config: object, context: Context) -> bool:
    """Whether ranks hold parts of what trains."""
    return getattr(config, "shard", False) and context.ranks.size > 1


def _attached(parent: Artifact, spec: StageSpec, streamed: StreamedModel, seed: int, gradients: Gradients) -> Attached:
    """The method on the model. UsageError when it cannot be."""
    results = [kinds(linear.stored) for linear in compressed_linears(streamed.model).values()]
    reason = refusal(spec.method, results, spec.config)
    if reason is not None:
        raise UsageError(f"{spec.address}: {reason}")
    try:
        attached = attach(spec.method, streamed.model, spec.config, seed=seed, gradients=gradients)
    except ValueError as error:
        raise UsageError(f"{spec.address}: {error}") from error
    if attached.run is not None and streamed.tokens is not None:
        raise UsageError(
            f"{spec.address}: {spec.method} trains virtual tokens, and an earlier stage has put some in front: use one of them"
        )
    for name in attached.plain:
        if name not in parent.index:
            raise UsageError(
                f"{spec.address}: {name} is compressed and cannot train as a plain tensor; set head and embeddings to false, or compress without include_head"
            )
    as_stored_before(attached, parent)
    return attached


def _check_teacher(parent: Artifact, context: Context) -> None:
    """A teacher must speak the same vocabulary."""
    if context.teacher is None or context.teacher.key == context.baseline.key:
        return
    ours, theirs = (load_config(a.directory).get_text_config().vocab_size for a in (parent, context.teacher))
    if ours != theirs:
        raise InputError(
            f"--teacher: its vocabulary has {theirs} tokens, the model's has {ours}; give the dense model that this one was made from"
        )


def checkpoints(parent: Artifact, config: TrainConfig, attached: Attached, context: Context, dense_bytes: int) -> bool:
    """Whether blocks are recomputed in backward, as set; auto: where what a step holds in addition to the weights would not fit into most of
    the memory that is free now, without the dense matrices to come. The bits are the same either way."""
    free = free_bytes(context.device)
    if config.gradient_checkpointing != "auto":
        return config.gradient_checkpointing
    if attached.run is not None:  # a prefix's cache grows in forward and cannot be recomputed
        return False
    room = ROOM * free - attached.count() * 4 * (COPIES - 1) - dense_bytes
    if _far_below(parent, config, room):
        return False
    try:
        held = training_activation_bytes(skeleton(load_config(parent.directory)), config.batch_size, config.seq_len, context.dtype, False)
    except ValueError as error:
        log.info("%s; blocks are recomputed in backward where memory is short: gradient_checkpointing=true", error)
        return False
    return held > room


def _far_below(parent: Artifact, config: TrainConfig, room: float) -> bool:
    """Whether several times all that linears read and write, and the logits, fit: then nothing has to be predicted, which takes a second."""
    model = skeleton(load_config(parent.directory))
    features = sum(sum(site.shape) for site in inspect(model).sites)
    vocabulary = model.config.get_text_config().vocab_size
    return config.batch_size * config.seq_len * 4 * (8 * features + 6 * vocabulary) < room


def _cache_budget(config: TrainConfig, device: torch.device) -> float:
    """Bytes that rebuilt dense weights may take: a third of what is free now, or all that is needed."""
    if config.cache_dense == "never":
        return 0
    if config.cache_dense == "always":
        return float("inf")
    return dense_cache_bytes(device)


# -- text ------------------------------------------------------------------------------------------------------------------------


def _texts(context: Context, config: TrainConfig) -> tuple[Callable[[int], Batch], list[Batch]]:
    """Micro-batches by number, and the held-out batches, all where the model is."""
    draw = context.inputs.training(config.seq_len, config.batch_size)

    held_out = [batch.to(context.device) for batch in context.inputs.held_out(config.seq_len, config.batch_size)]
    return (lambda index: draw(index).to(context.device)), held_out


# -- training --------------------------------------------------------------------------------------------------------------------


def _train(
    spec: StageSpec,
    model: nn.Module,
    student: Student,
    attached: Attached,
    batches: Callable[[int], Batch],
    held_out: list[Batch],
    config: TrainConfig,
    context: Context,
) -> tuple[TrainResult, float]:
    """What training came to, and its tokens a second since this process took it up."""
    path = context.scratch / TRAINING_STATE

    ranks, parts = context.ranks, _parts(spec.config, context)

    def save(state: TrainState) -> None:
        if parts:
            keep_parts(context.scratch, state, ranks)
        elif ranks.leads:
            keep(path, state.tensors, {"meta": json.dumps(state.meta)})

    every = saved_every(attached.count())
    with bar(f"{spec.address} {spec.method}, steps", config.steps) as shown:
        seen, speed = 0, 0.0

        def progress(now: Progress) -> None:
            nonlocal seen, speed
            shown.advance(now.step - seen, loss=now.loss, held_out=now.held_out_perplexity, tokens_s=round(now.tokens_per_second))
            seen, speed = now.step, now.tokens_per_second

        def tried(factor: float, loss: float) -> None:
            log.info("%s: held-out loss %.4f behind %d steps at %g times the default rate", spec.address, loss, try_steps(config.steps), factor)

        teacher = None if config.loss == "cross_entropy" else streamed_teacher(context, batches, own_batches(config, ranks))
        try:
            result = train(
                model, attached, TrainingText(batches, held_out, teacher), config, student=student,
                main=RECOVER[spec.method].main, resume=kept_parts(context.scratch, attached, ranks) if parts else _saved(path, ranks),
                hooks=Hooks(save, every, progress, tried, context.stop, replace(context.peers, even=parts)),
            )  # fmt: skip
            return result, speed
        except TrainingDiverged as error:
            raise InputError(
                f"{spec.address}: {error}; the artifact before it is intact, try a smaller {spec.address}.learning_rate"
            ) from error
        except ReplicasDiffer as error:
            raise InputError(f"{spec.address}: {error}") from error
        except RuntimeError as error:
            if not parts or isinstance(error, torch.OutOfMemoryError):
                raise
            raise LostRank(f"the ranks lost one another ({str(error).strip().splitlines()[0]})") from error


def saved_every(trained: float) -> int:
    """Steps from one saved state to the next, where so many numbers train."""
    return 5 if trained * 4 * 5 < SMALL_STATE_BYTES else 50


def own_batches(config: TrainConfig, ranks: Ranks) -> Sequence[int]:
    """The numbers of the micro-batches that this rank has: of every update each size-th."""
    if ranks.size == 1:
        return range(config.steps * config.accumulation)
    own = range(ranks.rank, config.accumulation, ranks.size)
    return [step * config.accumulation + k for step in range(config.steps) for k in own]


def _saved(path: Path, ranks: Ranks) -> TrainState | None:
    """None for one that is torn, too: training starts again from its first step, which gives the same result."""
    results = kept(path) if ranks.broadcast(ranks.leads and is_whole(path)) else None
    return None if results is None else TrainState(results[0], json.loads(results[1]["meta"]))


# -- what is kept ----------------------------------------------------------------------------------------------------------------


def _as_kept(
    model: nn.Module, student: Student, attached: Attached, held_out: list[Batch], result: TrainResult, spec: StageSpec
) -> tuple[float | None, list[str]]:
    """Held-out loss of the very records that go to disk, pruned where that is set; None when the model stays as it was, since
    that would be worse. And the notes of the report."""
    notes = [f"rolled back: {text}" for text in result.rollbacks]
    notes += [f"went back to the best values, at half the rate: {text}" for text in result.restored]
    if result.tried:
        losses = ", ".join(f"{loss:.4f} at × {factor:g}" for factor, loss in result.tried)
        notes.append(f"learning rate: the default × {found(result.tried):g}; held-out loss behind short runs: {losses}")
    if not result.improved:
        as_before = "the model is as it was before this stage"
        return None, [*notes, f"{spec.method} could not improve the held-out loss {result.start_loss:.4f}; {as_before}"]
    limit, loss = result.start_loss + SLACK, stored_loss(model, student, held_out)
    if not loss <= limit:
        lost = f"rounded to what is stored, the held-out loss is {loss:.4f}, above the {result.start_loss:.4f} of the start"
        return None, [*notes, f"{lost}; the model is as it was before this stage"]
    if attached.prune is None:
        return loss, notes
    left = attached.prune(True)
    pruned = stored_loss(model, student, held_out)
    if not pruned <= limit:
        attached.prune(False)
        return loss, [*notes, f"nothing was pruned from the adapters: the held-out loss {loss:.4f} would have become {pruned:.4f}"]
    empty = sum(count == 0 for count in left.values())
    return pruned, [
        *notes,
        f"adapters pruned to {sum(left.values())} ranks or units ({empty} modules to none): held-out loss {loss:.4f} → {pruned:.4f}",
    ]


def _metrics(result: TrainResult) -> dict[str, object]:
    metrics: dict[str, object] = {
        "held_out_loss_start": result.start_loss,
        "held_out_loss_best": result.best_loss,
        "best_step": result.best_step,
        "steps": result.step,
        "tokens": result.tokens,
        "history": result.history,
    }
    if result.tried:
        metrics["rates_tried"] = [{"factor": factor, "held_out_loss": loss} for factor, loss in result.tried]
    if result.restored:
        metrics["times_restored"] = len(result.restored)
    return metrics
