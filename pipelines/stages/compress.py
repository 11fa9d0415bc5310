"""The compression stages (prune, quantize, decompose): block by block, statistics in, records out.

For each block: collect what the method needs from the hidden states that the already compressed model below hands in, compress its
matrices, write them, and run the block *as written* to get the next hidden states. Peak memory is one block and the hidden states.
Knows the walk and the bookkeeping; one matrix is `matrices`' business, what lies outside the blocks `rest`'s.
Legend: N windows, T tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...compress.methods import Method
from ...compress.statistics import InputStatistics
from ...compress.weights import StoredWeight
from ..artifact import Artifact, ArtifactWriter, shards_of
from ..blocks import StreamedModel
from ..collecting import collect, collecting, input_groups
from ..errors import InputError, UsageError
from ..logs import bar
from ..models import Site
from ..perplexity import batches
from ..stage_settings import StageSpec, methods
from .context import Context, Outcome, check_stop
from .fisher import fisher_diagonal
from .matrices import Stage
from .rest import said_of_rest, write_rest
from .shares import shared_sparsity
from .together import solve_all
from .whole_blocks import solve_block

FEW = 4
"""Matrices that a note names one by one."""


def compress(parent: Artifact, writer: ArtifactWriter, spec: StageSpec, context: Context) -> Outcome:
    """Run one of the compression stages; resumes behind the blocks that `writer` finds finished."""
    row: Method = methods(spec.name)[spec.method]
    model = StreamedModel(parent, context.device, context.dtype, virtual=False)
    chosen = [s for s in model.structure.sites if (s.block is not None or spec.include_head) and not spec.skips(s.name)]
    if not chosen:
        raise UsageError(f"{spec.address}: `ignore` leaves no linear layer to compress; name fewer")
    needs = frozenset().union(*(row.needs(spec.config_for(site.name)) for site in chosen))
    stage = Stage(parent, writer, spec, row, context, model, None, needs, shared_sparsity(spec, chosen, context))
    wants_dense = row.inputs == "dense" and parent.key != context.baseline.key
    if wants_dense or "cross_moment" in needs or row.scope == "block":
        stage.dense = StreamedModel(context.baseline, context.device, context.dtype)
    if "fisher" in needs:
        stage.fisher = {name: found.to(context.device) for name, found in fisher_diagonal(context).items()}
    if stage.propagates:
        _embed(stage, context.inputs.calibration())
    blocks, behind = model.structure.blocks, any(site.block is None for site in chosen)
    with bar(f"{spec.address} {spec.method}, blocks", blocks) as shown:
        for index in range(blocks):
            _block(stage, index, [s for s in chosen if s.block == index], behind or index + 1 < blocks)
            shown.advance()
            check_stop(context)
    write_rest(stage, [s for s in chosen if s.block is None], lambda site: _head_statistics(stage, site))
    return Outcome(stage.layers, _measured(stage), _notes(stage, chosen))


def _embed(stage: Stage, ids_NT: Tensor) -> None:
    parts = list(batches(*ids_NT.shape))
    stage.hidden = [stage.model.embed(ids_NT[part]) for part in parts]
    if stage.dense is not None:
        stage.dense_hidden = [stage.dense.embed(ids_NT[part]) for part in parts]


def _block(stage: Stage, index: int, sites: list[Site], followed: bool) -> None:
    """Compress and write one block, unless that was done before, and hand its outputs on where somebody follows who reads them."""
    part = f"block-{index:05d}"
    marker = stage.writer.finished.get(part)
    if marker is None or stage.propagates:
        stage.model.load_block(index)
        if stage.dense is not None:
            stage.dense.load_block(index)
    if marker is None:
        records, layers = _solved(stage, index, sites)
        _write(stage, index, part, records, layers)
        marker = stage.writer.finished[part]
    stage.layers += marker["extra"]["layers"]
    if stage.propagates and followed:
        for site in sites:
            stage.model.put(site, stage.writer.stored(part, site.name))
        _advance(stage, index)
    for model in (stage.model, stage.dense):
        if model is not None:
            model.unload_block(index)


def _solved(stage: Stage, index: int, sites: list[Site]) -> tuple[dict[str, StoredWeight], list[dict[str, Any]]]:
    """The block's new records and what is said of each. Truly sequential: group by group, each seeing what those before it became."""
    if stage.row.scope == "block":
        with torch.no_grad():
            statistics = _statistics(stage, index, sites)
        return solve_block(stage, index, sites, statistics)
    records: dict[str, StoredWeight] = {}
    layers: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        groups = input_groups(stage.model, index, sites, stage.hidden[0]) if stage.true_sequential and sites else [sites]
        for number, group in enumerate(groups, 1):
            statistics = _statistics(stage, index, group)
            found, told = solve_all(stage, group, statistics)
            records, layers = records | found, layers | told
            if number < len(groups):
                for site in group:
                    stage.model.put(site, records[site.name].to("cpu"))  # as it will be read back
    return {s.name: records[s.name] for s in sites}, [layers[s.name] for s in sites]


def _advance(stage: Stage, index: int) -> None:
    """Hidden states of the next block, from the block as it was written."""
    with torch.no_grad():
        stage.hidden = [stage.model.run_block(index, h) for h in stage.hidden]
        if stage.dense is not None:
            stage.dense_hidden = [stage.dense.run_block(index, h) for h in stage.dense_hidden]


def _statistics(stage: Stage, index: int, sites: list[Site]) -> dict[str, InputStatistics]:
    """Statistics of every site's input. A site no token reached (an idle expert) gets empty ones."""
    needs = stage.needs - {"fisher"}
    statistics: dict[str, InputStatistics] = {}
    if needs:
        source, hidden = (
            (stage.dense, stage.dense_hidden) if stage.row.inputs == "dense" and stage.dense is not None else (stage.model, stage.hidden)
        )
        paired = _dense_inputs(stage, sites, lambda dense, h: dense.run_block(index, h)) if "cross_moment" in needs else None
        collect(source, index, hidden, sites, needs, statistics, paired)
    for site in sites:
        found = statistics.setdefault(site.name, InputStatistics(site.shape[1], needs, stage.context.device))
        bad = found.non_finite()
        if bad is not None:
            raise InputError(
                f"{site.name}: {bad} of its inputs holds NaN or Inf; the layer below it overflows, or the checkpoint is damaged"
            )
    return statistics


def _dense_inputs(stage: Stage, sites: list[Site], run: Callable[[StreamedModel, Tensor], Any]) -> dict[str, list[Tensor]]:
    """Site name → its inputs while the dense model's states `run`, batch by batch; sites that share a tensor share the list's tensors."""
    assert stage.dense is not None
    out: dict[str, list[Tensor]] = {s.name: [] for s in sites}
    handles = []
    for site in sites:
        if site.expert is None:
            module = stage.dense.model.get_submodule(site.module)
            handles.append(module.register_forward_pre_hook(lambda m, args, name=site.name: out[name].append(args[0])))
    try:
        for h in stage.dense_hidden:
            run(stage.dense, h)
    finally:
        for handle in handles:
            handle.remove()
    return out


def _head_statistics(stage: Stage, site: Site) -> InputStatistics:
    statistics: dict[str, InputStatistics] = {}
    needs = stage.needs - {"fisher"}
    if needs:
        with torch.no_grad():
            paired = _dense_inputs(stage, [site], _window_by_window) if "cross_moment" in needs else None
            with collecting(stage.model, [site], needs, statistics, paired):
                for h in stage.hidden:
                    _window_by_window(stage.model, h)
    return statistics.get(site.name) or InputStatistics(site.shape[1], needs, stage.context.device)


def _window_by_window(model: StreamedModel, hidden_NTD: Tensor) -> None:
    """Through the head, whose logits are too many for all windows at once."""
    for row in hidden_NTD.split(1):
        model.logits(row)


def _write(stage: Stage, index: int, part: str, records: Mapping[str, StoredWeight], layers: list[dict[str, Any]]) -> None:
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


def _measured(stage: Stage) -> dict[str, Any]:
    found: dict[str, Any] = {"calibration_tokens": sum(h.shape[0] * h.shape[1] for h in stage.hidden)}
    return found | ({"block_sparsity": _by_block(stage)} if stage.sparsity else {})


def _by_block(stage: Stage) -> list[float]:
    """What share of each block's weights was dropped, matrices with a sparsity of their own included."""
    totals: dict[int, list[float]] = {}
    for layer in stage.layers:
        if layer["block"] is not None:
            sums = totals.setdefault(layer["block"], [0.0, 0.0])
            sums[0], sums[1] = sums[0] + layer["sparsity"] * layer["weights"], sums[1] + layer["weights"]
    return [dropped / weights for dropped, weights in totals.values()]


def _notes(stage: Stage, chosen: list[Site]) -> list[str]:
    """What was left alone and why, and what a reader of the numbers should know."""
    names = {site.name for site in chosen}
    left = {s.name: s.reason for s in stage.model.structure.skipped}
    left |= {s.name: "matched by `ignore`" for s in stage.model.structure.sites if s.name not in names and s.block is not None}
    notes = _by_reason(left)
    notes += said_of_rest(stage, [site for site in chosen if site.block is None])
    grid = getattr(stage.spec.config, "activations", None)
    if grid is not None:
        notes.append(
            f"inputs are rounded to {grid.bits} bits, per token in groups of {grid.group_size}: simulated in every perplexity, carried by no export"
        )
    return notes


def _by_reason(left: Mapping[str, str]) -> list[str]:
    """One note for each matrix; of many with one reason the first is named, the others are counted."""
    names: dict[str, list[str]] = {}
    for name, reason in left.items():
        names.setdefault(reason, []).append(name)
    single = [f"left alone: {name} ({reason})" for reason, found in names.items() if len(found) <= FEW for name in found]
    return single + [f"left alone: {found[0]} and {len(found) - 1} more ({reason})" for reason, found in names.items() if len(found) > FEW]
