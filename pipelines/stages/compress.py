"""The compression stages (prune, quantize, decompose): block by block, statistics in, records out.

For each block: collect what the method needs from the hidden states that the already compressed model below hands in, compress its
matrices, write them, and run the block *as written* to get the next hidden states. Peak memory is one block and the hidden states.
Knows the walk and the bookkeeping; the maths is `compress/methods`.
Legend: N windows, T tokens, D model width, O out, I in.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...compress.methods import BlockProblem, Method
from ...compress.statistics import Fisher, InputStatistics, LayerStatistics
from ...compress.weights import DenseWeight, StoredWeight
from ..artifact import Artifact, ArtifactWriter, shards_of
from ..blocks import StreamedModel
from ..collecting import collecting
from ..errors import InputError, UsageError
from ..logs import bar
from ..models import Site, tied_names
from ..perplexity import batches
from ..stage_settings import StageSpec, methods
from .context import Context, Outcome, check_stop
from .fisher import fisher_diagonal


@dataclass
class _Stage:
    """One compression stage under way."""

    parent: Artifact
    writer: ArtifactWriter
    spec: StageSpec
    row: Method
    context: Context
    model: StreamedModel
    dense: StreamedModel | None
    needs: frozenset[str]
    hidden: list[Tensor] = field(default_factory=list)
    dense_hidden: list[Tensor] = field(default_factory=list)
    fisher: Mapping[str, Fisher] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def propagates(self) -> bool:
        return bool(self.needs - {"fisher"}) or self.row.scope == "block"


def compress(parent: Artifact, writer: ArtifactWriter, spec: StageSpec, context: Context) -> Outcome:
    """Run one of the compression stages; resumes behind the blocks that `writer` finds finished."""
    row: Method = methods(spec.name)[spec.method]
    model = StreamedModel(parent, context.device, context.dtype, virtual=False)
    chosen = [s for s in model.structure.sites if (s.block is not None or spec.include_head) and not spec.skips(s.name)]
    if not chosen:
        raise UsageError(f"{spec.address}: `ignore` leaves no linear layer to compress; name fewer")
    needs = frozenset().union(*(row.needs(spec.config_for(site.name)) for site in chosen))
    wants_dense = row.inputs == "dense" or "cross_moment" in needs or row.scope == "block"
    stage = _Stage(parent, writer, spec, row, context, model, None, needs)
    if (wants_dense and parent.key != context.baseline.key) or "cross_moment" in needs or row.scope == "block":
        stage.dense = StreamedModel(context.baseline, context.device, context.dtype)
    if "fisher" in needs:
        stage.fisher = fisher_diagonal(context)
    if stage.propagates:
        _embed(stage, context.inputs.calibration())
    with bar(f"{spec.address} {spec.method}, blocks", model.structure.blocks) as shown:
        for index in range(model.structure.blocks):
            _block(stage, index, [s for s in chosen if s.block == index])
            shown.advance()
            check_stop(context)
    _rest(stage, [s for s in chosen if s.block is None])
    notes = [f"left alone: {name} ({reason})" for name, reason in _left_alone(stage, chosen).items()]
    return Outcome(stage.layers, {"calibration_tokens": _tokens(stage)}, notes)


def _embed(stage: _Stage, ids_NT: Tensor) -> None:
    parts = list(batches(*ids_NT.shape))
    stage.hidden = [stage.model.embed(ids_NT[part]) for part in parts]
    if stage.dense is not None:
        stage.dense_hidden = [stage.dense.embed(ids_NT[part]) for part in parts]


def _block(stage: _Stage, index: int, sites: list[Site]) -> None:
    part = f"block-{index:05d}"
    marker = stage.writer.finished.get(part)
    if marker is not None:
        stage.layers += marker["extra"]["layers"]
        if stage.propagates:
            stage.model.load_block(index)
            if stage.dense is not None:
                stage.dense.load_block(index)
            for site in sites:
                stage.model.put(site, stage.writer.stored(part, site.name))
            _advance(stage, index)
        return
    stage.model.load_block(index)
    if stage.dense is not None:
        stage.dense.load_block(index)
    with torch.no_grad():
        statistics = _statistics(stage, index, sites)
    if stage.row.scope == "block":
        records, layers = _solve_block(stage, index, sites, statistics)
    else:
        records, layers = {}, []
        for site in sites:
            records[site.name], layer = _solve(stage, site, statistics)
            layers.append(layer)
    _write(stage, index, part, records, layers)
    stage.layers += layers
    if stage.propagates:
        for site in sites:
            stage.model.put(site, stage.writer.stored(part, site.name))
        _advance(stage, index)
    else:
        stage.model.unload_block(index)


def _advance(stage: _Stage, index: int) -> None:
    """Hidden states of the next block, from the block as it was written."""
    with torch.no_grad():
        stage.hidden = [stage.model.run_block(index, h) for h in stage.hidden]
        if stage.dense is not None:
            stage.dense_hidden = [stage.dense.run_block(index, h) for h in stage.dense_hidden]
            stage.dense.unload_block(index)
    stage.model.unload_block(index)


def _statistics(stage: _Stage, index: int, sites: list[Site]) -> dict[str, InputStatistics]:
    """Statistics of every site's input. A site no token reached (an idle expert) gets empty ones."""
    needs = stage.needs - {"fisher"}
    statistics: dict[str, InputStatistics] = {}
    if needs:
        source, hidden = (
            (stage.dense, stage.dense_hidden) if stage.row.inputs == "dense" and stage.dense is not None else (stage.model, stage.hidden)
        )
        paired = _dense_inputs(stage, index, sites) if "cross_moment" in needs else None
        with collecting(source, sites, needs, statistics, paired):
            for h in hidden:
                source.run_block(index, h)
    for site in sites:
        found = statistics.setdefault(site.name, InputStatistics(site.shape[1], needs, stage.context.device))
        bad = found.non_finite()
        if bad is not None:
            raise InputError(
                f"{site.name}: {bad} of its inputs holds NaN or Inf; the layer below it overflows, or the checkpoint is damaged"
            )
    return statistics


def _dense_inputs(stage: _Stage, index: int, sites: list[Site]) -> dict[str, list[Tensor]]:
    """Site name → its inputs in the dense model, batch by batch; sites that share a tensor share the list's tensors."""
    assert stage.dense is not None
    out: dict[str, list[Tensor]] = {s.name: [] for s in sites}
    handles = []
    for site in sites:
        if site.expert is None:
            module = stage.dense.model.get_submodule(site.module)
            handles.append(module.register_forward_pre_hook(lambda m, args, name=site.name: out[name].append(args[0])))
    try:
        for h in stage.dense_hidden:
            stage.dense.run_block(index, h)
    finally:
        for handle in handles:
            handle.remove()
    return out


def _current(stage: _Stage, site: Site) -> StoredWeight:
    """The site's record in the parent; a plain weight becomes a dense record in its own dtype."""
    if site.name in stage.parent.linears:
        return stage.parent.stored(site.name)
    return StoredWeight(DenseWeight(site.read(stage.parent.tensor(f"{site.module}.{site.parameter}")).contiguous()))


def _target(stage: _Stage, site: Site) -> Tensor:
    """The baseline's float32 [O, I] matrix."""
    baseline = stage.context.baseline
    if site.name in baseline.linears:
        return baseline.stored(site.name).dense().to(stage.context.device)
    return site.read(baseline.tensor(f"{site.module}.{site.parameter}")).to(stage.context.device, torch.float32).contiguous()


def _solve(stage: _Stage, site: Site, statistics: Mapping[str, InputStatistics]) -> tuple[StoredWeight, dict[str, Any]]:
    target_OI, current = _target(stage, site), _current(stage, site).to(stage.context.device)
    if not bool(torch.isfinite(target_OI).all()):
        raise InputError(f"{site.name}.{site.parameter} holds NaN or Inf; repair the checkpoint or give another one")
    config = stage.spec.config_for(site.name)
    try:
        record, metrics = stage.row.function(
            current, target_OI, LayerStatistics(statistics[site.name], stage.fisher.get(site.name)), config
        )
    except ValueError as error:
        raise InputError(f"{site.name}: {error}") from error
    return record, _layer(site, record, target_OI, statistics[site.name], metrics)


def _solve_block(
    stage: _Stage, index: int, sites: list[Site], statistics: dict[str, InputStatistics]
) -> tuple[dict[str, StoredWeight], list[dict[str, Any]]]:
    """Hand the whole block to a method that trains it."""
    assert stage.dense is not None
    targets = {s.name: _target(stage, s) for s in sites}
    sample = torch.cat([h[:0] for h in stage.hidden]) if not stage.hidden else torch.cat(stage.hidden)
    with torch.no_grad():
        outputs = torch.cat([stage.dense.run_block(index, h) for h in stage.dense_hidden])
    layers = {s.name: LayerStatistics(statistics[s.name], stage.fisher.get(s.name)) for s in sites}
    problem = BlockProblem(
        {s.name: _current(stage, s) for s in sites},
        targets,
        _block_function(stage, index, sites),
        sample,
        outputs,
        layers,
        stage.context.seed + index,
    )
    records, metrics = stage.row.function(problem, {s.name: stage.spec.config_for(s.name) for s in sites})
    return records, [_layer(s, records[s.name], targets[s.name], statistics[s.name], metrics.get(s.name, {})) for s in sites]


def _block_function(stage: _Stage, index: int, sites: list[Site]) -> Any:
    """(matrices by site name, hidden [B, T, D]) → hidden: the block with those effective weights, differentiable in both."""
    block, prefix = stage.model.layers[index], f"{stage.model.structure.prefix}.{index}."

    def forward(matrices: dict[str, Tensor], hidden_BTD: Tensor) -> Tensor:
        parameters: dict[str, Tensor] = {}
        fused: dict[str, list[Tensor]] = {}
        for site in sites:
            matrix = matrices[site.name].T if site.transposed else matrices[site.name]
            name = f"{site.module}.{site.parameter}".removeprefix(prefix)
            if site.expert is None:
                parameters[name] = matrix
            else:
                fused.setdefault(name, []).append(matrix)
        parameters |= {name: torch.stack(parts) for name, parts in fused.items()}
        args, kwargs = stage.model.call_of(index, hidden_BTD)
        out = torch.func.functional_call(block, parameters, (hidden_BTD, *args), kwargs)
        return out[0] if isinstance(out, tuple) else out

    return forward


def _layer(site: Site, record: StoredWeight, target_OI: Tensor, statistics: InputStatistics, metrics: Mapping[str, Any]) -> dict[str, Any]:
    rank = record.low_rank.rank if record.low_rank is not None else None
    return {
        "name": site.name,
        "block": site.block,
        "relative_output_error": relative_output_error(record.dense().to(target_OI), target_OI, statistics),
        "bits_per_weight": record.bits_per_weight(),
        "rank": rank,
        "sparsity": record.sparsity(),
        "weights": site.shape[0] * site.shape[1],
        "metrics": dict(metrics),
    }


def relative_output_error(weight_OI: Tensor, target_OI: Tensor, statistics: InputStatistics) -> float:
    """√(E‖(W − Ŵ)x‖² / E‖Wx‖²) under the best second moment that was collected: full, diagonal, or none."""
    difference = target_OI - weight_OI
    if statistics.moment_sum_II is not None and statistics.tokens:
        moment = statistics.second_moment_II
        lost, whole = ((m @ moment).mul_(m).sum().double() for m in (difference, target_OI))
    elif statistics.tokens:
        squares = statistics.norm_I.square()
        lost, whole = ((m.square() * squares).sum().double() for m in (difference, target_OI))
    else:
        lost, whole = (m.square().sum().double() for m in (difference, target_OI))
    return float((lost.clamp(min=0) / whole).sqrt()) if whole > 0 else 0.0


def _write(stage: _Stage, index: int, part: str, records: Mapping[str, StoredWeight], layers: list[dict[str, Any]]) -> None:
    """One part: this block's new records, and everything else of it as the parent has it."""
    prefix = f"{stage.model.structure.prefix}.{index}."
    kept = {
        s.name: stage.parent.stored(s.name)
        for s in stage.model.structure.of_block(index)
        if s.name in stage.parent.linears and s.name not in records
    }
    linears = kept | dict(records)
    replaced = {f"{s.module}.{s.parameter}" for s in stage.model.structure.of_block(index) if s.name in records}
    of_record = tuple(f"{name}." for name in stage.parent.linears if name.startswith(prefix))
    tensors = {
        n: t for n, t in stage.parent.tensors(prefix).items() if n not in replaced and (n.endswith(".bias") or not n.startswith(of_record))
    }
    stage.writer.write_part(part, shards_of(tensors, linears), linears, {"layers": layers})


def _rest(stage: _Stage, head: list[Site]) -> None:
    """Embeddings, final norm and head: as they are, or the head compressed when asked (tied weights stay tied)."""
    if "rest" in stage.writer.finished:
        stage.layers += stage.writer.finished["rest"]["extra"].get("layers", [])
        return
    blocks, parent = f"{stage.model.structure.prefix}.", stage.parent
    records: dict[str, StoredWeight] = {n: parent.stored(n) for n in parent.linears if not n.startswith(blocks)}
    tied = tied_names(stage.model.model)
    layers = []
    for site in head:
        name = f"{site.module}.weight"
        stored_as = tied.get(name, name)
        statistics = _head_statistics(stage, site)
        target = stage.context.baseline.tensor(stored_as).float()
        current = records.get(site.name) or StoredWeight(DenseWeight(parent.tensor(stored_as)))
        found = LayerStatistics(statistics, stage.fisher.get(site.name))
        records[site.name], metrics = stage.row.function(current, target, found, stage.spec.config_for(site.name))
        layers.append(_layer(site, records[site.name], target, statistics, metrics))
    replaced = {tied.get(f"{n}.weight", f"{n}.weight") for n in records}
    wanted = [n for n in stage.model.model.state_dict() if not n.startswith(blocks) and n not in tied and n not in replaced]
    tensors = {n: parent.tensor(n) for n in wanted}
    stage.layers += layers
    stage.writer.write_part("rest", {"tensors": tensors, **shards_of({}, records)}, records, {"layers": layers})


def _head_statistics(stage: _Stage, site: Site) -> InputStatistics:
    statistics: dict[str, InputStatistics] = {}
    needs = stage.needs - {"fisher"}
    if needs:
        with collecting(stage.model, [site], needs, statistics), torch.no_grad():
            for h in stage.hidden:
                for row in h.split(1):
                    stage.model.logits(row)
    return statistics.get(site.name) or InputStatistics(site.shape[1], needs, stage.context.device)


def _left_alone(stage: _Stage, chosen: list[Site]) -> dict[str, str]:
    names = {site.name for site in chosen}
    out = {s.name: s.reason for s in stage.model.structure.skipped}
    out |= {s.name: "matched by `ignore`" for s in stage.model.structure.sites if s.name not in names and s.block is not None}
    head = [s.name for s in stage.model.structure.sites if s.block is None and s.name not in names]
    out |= dict.fromkeys(head, "the output head stays as it is unless include_head is set")
    return out


def _tokens(stage: _Stage) -> int:
    return sum(h.shape[0] * h.shape[1] for h in stage.hidden)
