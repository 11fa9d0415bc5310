"""The recover stage: train what the method names on the whole model, everything else frozen, and write it back as records.

The teacher streams block by block a few batches ahead, so only its last hidden states are held. Knows artifacts, text and the
training state's file; what trains and how is `recover/`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ...compress.weights import DenseWeight, StoredWeight
from ...recover.linear import CompressedLinear, cache_dense, compressed_linears, install
from ...recover.methods import RECOVER, Gradients, attach, refusal, split
from ...recover.run import TrainConfig
from ...recover.site import kinds
from ...recover.state import TrainState
from ...recover.student import Batch, Teacher, student_of
from ...recover.train import Progress, TrainingDiverged, TrainResult, batch_loss, train
from ..artifact import Artifact, ArtifactWriter, shards_of, write_bytes
from ..blocks import StreamedModel
from ..errors import InputError, UsageError
from ..loading import whole_model
from ..logs import bar
from ..models import Site, load_config, tied_names
from ..stage_settings import StageSpec
from .context import Context, Outcome

STATE = "training.safetensors"
TEACHER_TOKENS = 16384
SMALL_STATE_BYTES = 200e6


def recover(parent: Artifact, writer: ArtifactWriter, spec: StageSpec, context: Context) -> Outcome:
    """Run a recovery method. UsageError when it cannot serve this model, before any work."""
    config, _ = split(spec.method, spec.config)
    if RECOVER[spec.method].ways.stored_as == "adapter beside the model":
        fitting = [name for name, row in RECOVER.items() if row.ways.stored_as != "adapter beside the model"]
        raise UsageError(
            f"{spec.address}: {spec.method} keeps its parameters beside the model, and artifacts have no place for them yet; choose one of {', '.join(fitting)}"
        )
    notes = []
    if context.teacher is None and config.loss != "cross_entropy":
        config = replace(config, loss="cross_entropy")
        notes = ["trained on next-token cross-entropy: the model came quantized and no --teacher was given to imitate"]
    _check_teacher(parent, context)
    records = _records(parent, context)
    reason = refusal(spec.method, [kinds(r) for r in records.values()], spec.config)
    if reason is not None:
        raise UsageError(f"{spec.address}: {reason}")
    batches, held_out = _texts(context, config)

    def put_in_place(model: nn.Module, prefix: str, stored: dict[str, StoredWeight]) -> None:
        install(model, {n: r for n, r in records.items() if n.startswith(f"{prefix}.")}, context.dtype)

    streamed = whole_model(parent, context.device, context.dtype, put_in_place)
    model = streamed.model.requires_grad_(False)
    gradients = Gradients(batches, lambda batch: batch_loss(student_of(model, probe=False), batch, None, _cross_entropy()))
    try:
        attached = attach(spec.method, model, spec.config, seed=context.seed, gradients=gradients)
    except ValueError as error:
        raise UsageError(f"{spec.address}: {error}") from error
    for name in attached.plain:
        if name not in parent.index:
            raise UsageError(
                f"{spec.address}: {name} is compressed and cannot train as a plain tensor; set head and embeddings to false, or compress without include_head"
            )
    cache_dense(compressed_linears(model), _cache_budget(config))
    result = _train(spec, model, attached, batches, held_out, config, context)
    if not result.finished:
        raise KeyboardInterrupt
    layers = _write(parent, writer, streamed, records, attached)
    return Outcome(layers, _metrics(result, attached), notes + _notes(result, spec), attached.count())


def _check_teacher(parent: Artifact, context: Context) -> None:
    """A teacher must speak the same vocabulary."""
    if context.teacher is None or context.teacher.key == context.baseline.key:
        return
    ours, theirs = (load_config(a.directory).get_text_config().vocab_size for a in (parent, context.teacher))
    if ours != theirs:
        raise InputError(
            f"--teacher: its vocabulary has {theirs} tokens, the model's has {ours}; give the dense model that this one was made from"
        )


def _cross_entropy() -> Any:
    from ...recover.losses import Objective

    return Objective("cross_entropy", 1.0)


def _cache_budget(config: TrainConfig) -> float:
    """Bytes that rebuilt dense weights may take: a third of what is free now, or all that is asked for."""
    if config.cache_dense == "never":
        return 0
    if config.cache_dense == "always":
        return float("inf")
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0
    return min(free / 3, 2e9)


def _records(parent: Artifact, context: Context) -> dict[str, StoredWeight]:
    """The record of every plain linear in the decoder; a weight that was never compressed is a dense one."""
    structure = StreamedModel(parent, torch.device("cpu")).structure
    out = {}
    for site in structure.sites:
        if site.block is None or site.expert is not None:
            continue
        if site.name in parent.linears:
            out[site.name] = parent.stored(site.name)
        else:
            out[site.name] = StoredWeight(DenseWeight(site.read(parent.tensor(f"{site.module}.{site.parameter}")).contiguous()))
    return {name: record.to(context.device) for name, record in out.items()}


# -- text ------------------------------------------------------------------------------------------------------------------------


def _texts(context: Context, config: TrainConfig) -> tuple[Callable[[int], Batch], list[Batch]]:
    """Micro-batches by number, and the held-out batches."""
    draw = context.inputs.training(config.seq_len, config.batch_size)

    def batches(index: int) -> Batch:
        ids, mask = draw(index)
        return Batch(ids, mask)

    held_out = [Batch(ids, mask) for ids, mask in context.inputs.held_out(config.seq_len, config.batch_size)]
    return batches, held_out


@dataclass
class StreamedTeacher:
    """The teacher's last hidden states, computed block by block for a run of micro-batches at a time, each micro-batch by itself, so
    that what a batch gets does not depend on where a run began."""

    model: StreamedModel
    batches: Callable[[int], Batch]
    last: int
    position: int = 0
    kept: dict[bytes, Tensor] = field(default_factory=dict)

    def hidden(self, ids_BT: Tensor) -> Tensor:
        key = ids_BT.cpu().numpy().tobytes()
        if key not in self.kept:
            self._look_ahead(ids_BT)
        return self.kept[key]

    def _look_ahead(self, ids_BT: Tensor) -> None:
        self.kept.clear()
        wanted = [ids_BT.cpu()]
        index = next((i for i in range(self.position, self.last) if torch.equal(self.batches(i).ids, wanted[0])), None)
        if index is not None:
            count = max(1, TEACHER_TOKENS // ids_BT.numel())
            wanted = [self.batches(i).ids for i in range(index, min(index + count, self.last))]
            self.position = index
        with torch.no_grad():
            hidden = [self.model.embed(ids) for ids in wanted]
            for block in range(self.model.structure.blocks):
                self.model.load_block(block)
                hidden = [self.model.run_block(block, h) for h in hidden]
                self.model.unload_block(block)
        self.kept = {ids.numpy().tobytes(): h for ids, h in zip(wanted, hidden, strict=True)}

    def logits(self, hidden_ND: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model.logits(hidden_ND.unsqueeze(0))[0]


def _teacher(config: TrainConfig, batches: Callable[[int], Batch], context: Context) -> Teacher | None:
    if config.loss == "cross_entropy":
        return None
    assert context.teacher is not None
    streamed = StreamedTeacher(StreamedModel(context.teacher, context.device, context.dtype), batches, config.steps * config.accumulation)
    return Teacher(streamed.hidden, streamed.logits)


# -- training --------------------------------------------------------------------------------------------------------------------


def _train(
    spec: StageSpec,
    model: nn.Module,
    attached: Any,
    batches: Callable[[int], Batch],
    held_out: list[Batch],
    config: TrainConfig,
    context: Context,
) -> TrainResult:
    path = context.scratch / STATE

    def keep(state: TrainState) -> None:
        write_bytes(
            path, save({n: t.detach().cpu().contiguous() for n, t in state.tensors.items()}, metadata={"meta": json.dumps(state.meta)})
        )

    every = 5 if attached.count() * 4 * 5 < SMALL_STATE_BYTES else 50
    with bar(f"{spec.address} {spec.method}, steps", config.steps) as shown:
        seen = 0

        def progress(now: Progress) -> None:
            nonlocal seen
            shown.advance(now.step - seen, loss=now.loss, held_out=now.held_out_perplexity, tokens_s=round(now.tokens_per_second))
            seen = now.step

        try:
            return train(
                model, attached, batches, held_out, _teacher(config, batches, context), config,
                main=RECOVER[spec.method].main, resume=_saved(path), save=keep, save_every=every, progress=progress, stop=context.stop,
            )  # fmt: skip
        except TrainingDiverged as error:
            raise InputError(
                f"{spec.address}: {error}; the artifact before it is intact, try a smaller {spec.address}.learning_rate"
            ) from error


def _saved(path: Any) -> TrainState | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["meta"])
            return TrainState({n: file.get_tensor(n).clone() for n in file.keys()}, meta)  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError):
        return None  # torn by a full disk or a failing one: training starts again from its first step, which gives the same result


# -- writing back ----------------------------------------------------------------------------------------------------------------


def _write(
    parent: Artifact, writer: ArtifactWriter, streamed: StreamedModel, records: dict[str, StoredWeight], attached: Any
) -> list[dict[str, Any]]:
    model, structure = streamed.model, streamed.structure
    trained: dict[str, StoredWeight] = {}
    biases: dict[str, Tensor] = {}
    for name, linear in compressed_linears(model).items():
        trained[name], bias = linear.to_stored()
        if bias is not None:
            biases[f"{name}.bias"] = bias
    plain = {n: model.get_parameter(n).detach().to(dtype) for n, dtype in attached.plain.items()}
    sites = {s.name: s for s in structure.sites}
    for index in range(structure.blocks):
        _write_block(parent, writer, structure.prefix, index, sites, trained, plain | biases)
    blocks = f"{structure.prefix}."
    rest = {n: plain.get(n, parent.tensor(n)) for n in parent.index if not n.startswith(blocks) and not _of_record(n, parent)}
    kept = {n: parent.stored(n) for n in parent.linears if not n.startswith(blocks)}
    known = set(model.state_dict()) - tied_names(model).keys()
    writer.write_part("rest", {"tensors": {n: t for n, t in rest.items() if n in known}, **shards_of({}, kept)}, kept)
    return [{"name": n, "metrics": {}, "relative_output_error": None} for n in trained if n in parent.linears]


def _write_block(
    parent: Artifact,
    writer: ArtifactWriter,
    prefix: str,
    index: int,
    sites: dict[str, Site],
    trained: dict[str, StoredWeight],
    changed: dict[str, Tensor],
) -> None:
    """A linear that was plain and still is one stays a plain tensor."""
    start = f"{prefix}.{index}."
    linears: dict[str, StoredWeight] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in parent.tensors(start).items():
        if not _of_record(name, parent):
            tensors[name] = changed.get(name, tensor)
    for name, bias in changed.items():
        if name.startswith(start):
            tensors[name] = bias
    for name in [n for n in parent.linears if n.startswith(start)]:
        linears[name] = trained.get(name) or parent.stored(name)
    for name, record in trained.items():
        if name.startswith(start) and name not in linears:
            site = sites[name]
            parameter = f"{site.module}.{site.parameter}"
            if _is_plain(record):
                dense = record.base.dense(tensors[parameter].dtype)
                tensors[parameter] = dense.T.contiguous() if site.transposed else dense
            else:
                linears[name] = record
                tensors.pop(parameter)
    writer.write_part(f"block-{index:05d}", shards_of(tensors, linears), linears, {"layers": []})


def _is_plain(record: StoredWeight) -> bool:
    return isinstance(record.base, DenseWeight) and record == StoredWeight(record.base)


def _of_record(name: str, parent: Artifact) -> bool:
    parts = name.split(".")
    owners = {".".join(parts[:i]) for i in range(1, len(parts))}
    return bool(owners & parent.linears.keys()) and not name.endswith(".bias")


def _metrics(result: TrainResult, attached: Any) -> dict[str, Any]:
    return {
        "held_out_loss_start": result.start_loss,
        "held_out_loss_best": result.best_loss,
        "best_step": result.best_step,
        "steps": result.step,
        "tokens": result.tokens,
        "history": result.history,
        "trained_bytes": sum(t.parameter.numel() * 4 for t in attached.trainables.values()),
    }


def _notes(result: TrainResult, spec: StageSpec) -> list[str]:
    notes = [f"rolled back: {text}" for text in result.rollbacks]
    if not result.improved:
        notes.append(f"{spec.method} could not improve the held-out loss {result.start_loss:.4f}; the model is as it was before this stage")
    return notes


__all__ = ["CompressedLinear", "recover"]
