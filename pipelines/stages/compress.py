"""The compression stages (prune, quantize, decompose): block by block, statistics in, records out.

For each block: collect what the method needs from the hidden states that the already compressed model below hands in, compress its
matrices, write them, and run the block *as written* to get the next hidden states. Peak memory is one block and the hidden states.
Knows the walk and the bookkeeping; one matrix is `matrices`' business, what lies outside the blocks `outside_blocks`'.
Legend: N windows, T tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...compress.methods import Method
from ...compress.statistics import InputStatistics
from ...compress.weights import StoredWeight
from ..errors import InputError
from ..logs import bar
from ..models.blocks import StreamedModel
from ..models.collecting import Alongside, DenseInputs, collect, collect_head, dense_inputs_of, input_groups, through_head
from ..models.hidden import Room
from ..models.reading import BlockReader, BlockTensors
from ..models.replay import Replay
from ..models.sizes import fallback_notes, guided_groups
from ..models.state_checkpoints import Checkpoints
from ..models.structure import Site
from ..recipes.stage_settings import StageSpec, methods
from ..store.artifact import Artifact, ArtifactWriter, shards_of
from .context import Context, Outcome, check_stop
from .fisher import fisher_diagonal
from .guidance import Guidance
from .matrices import Stage, calibration, looks_at_inputs
from .outside_blocks import outside_notes, write_rest
from .shared_inputs import solve_all
from .sparsity_shares import shared_sparsity
from .walked import States, entering, share_of
from .whole_blocks import solve_block
from .writing import by_reason


def compress(parent: Artifact, writer: ArtifactWriter, spec: StageSpec, context: Context) -> Outcome:
    """Run one of the compression stages; resumes behind the blocks that `writer` finds finished."""
    row: Method = methods(spec.name)[spec.method]
    if context.device.type == "cuda":
        from ...kernels import column_sweep  # imports Triton, which no run on a CPU needs

        column_sweep.use_on_cards()
    model = StreamedModel(parent, context.device, context.dtype, virtual=False, reader=BlockReader(parent, keeps=True))
    chosen = [s for s in model.structure.sites if (s.block is not None or spec.include_head) and not spec.skips(s.name)]
    needs = frozenset().union(*(row.needs(spec.config_for(site.name)) for site in chosen))
    targets = model.reader if parent.key == context.baseline.key else BlockReader(context.baseline, keeps=True)
    sparsity = shared_sparsity(spec, chosen, context)
    room = Room.measured(context.device, context.scratch, context.ranks.size)
    dense, fisher = None, {}
    wants_dense = row.inputs == "dense" and parent.key != context.baseline.key
    if wants_dense or "cross_moment" in needs or row.dense_outputs:
        dense = StreamedModel(context.baseline, context.device, context.dtype, reader=targets)
    if "fisher" in needs:
        fisher = {name: result.to(context.device) for name, result in fisher_diagonal(context).items()}
    groups = {site.name: count for site in chosen if (count := guided_groups(spec, site))}
    guidance = Guidance.of(context, groups) if groups else None
    share = share_of(calibration(context, looks_at_inputs(needs, row)), context.ranks)
    stage = Stage(parent, writer, spec, row, context, model, targets, dense, needs, room, share, sparsity, fisher, guidance)
    checkpoints = Checkpoints(context.scratch, dict.fromkeys(("hidden",) if dense is None else ("hidden", "dense"), share))
    begun, states = _begun(stage, checkpoints)
    layers = [layer for index in range(begun) for layer in writer.finished[_part(index)]["extra"]["layers"]]
    blocks, behind = model.structure.blocks, any(site.block is None for site in chosen)
    with bar(f"{spec.address} {spec.method}, blocks", blocks) as shown:
        shown.advance(begun)
        for index in range(begun, blocks):
            followed = behind or index + 1 < blocks
            layers += _block(stage, states, index, [s for s in chosen if s.block == index], followed)
            if followed:
                checkpoints.keep(index + 1, states.named())
            shown.advance()
            check_stop(context)
    layers += write_rest(stage, [s for s in chosen if s.block is None], lambda site: _head_statistics(stage, states, site))
    return Outcome(layers, _measured(stage, states, layers), _notes(stage, chosen))


def _begun(stage: Stage, checkpoints: Checkpoints) -> tuple[int, States]:
    """How many blocks are done and need not be run again, and what enters the one behind them."""
    blocks, ids_NT = stage.model.structure.blocks, stage.calibration()
    done = next((index for index in range(blocks) if _part(index) not in stage.writer.finished), blocks)
    if begun := checkpoints.latest(done):
        return begun, States(**checkpoints.load(begun, stage.room))
    dense = None if stage.dense is None else entering(stage.dense, ids_NT, stage.room, stage.share)
    return 0, States(entering(stage.model, ids_NT, stage.room, stage.share), dense)


def _part(index: int) -> str:
    return f"block-{index:05d}"


def _block(stage: Stage, states: States, index: int, sites: list[Site], followed: bool) -> list[dict[str, object]]:
    """Compress and write one block, unless that was done before, and pass its outputs on where a later block reads them (`followed`); its
    matrices' rows of the report."""
    part = _part(index)
    marker = stage.writer.finished.get(part)
    stage.model.load_block(index)
    if stage.dense is not None:
        stage.dense.load_block(index)
    _expect(stage, index + 1)
    with nullcontext() if marker is not None else _replayed(stage, states, index, sites) as replay:
        if marker is None:
            records, layers = _solved(stage, states, index, sites, replay)
            _write(stage, index, part, records, layers)
            marker = stage.writer.finished[part]
        if followed:
            written = BlockTensors.read(stage.writer.view(part), stage.model.prefix(index))
            for site in sites:
                stage.model.put(site, written.stored(site.name))
            _advance(stage, states, index, replay)
    for model in (stage.model, stage.dense):
        if model is not None:
            model.unload_block(index)
    for reader in (stage.model.reader, stage.targets):
        reader.drop(stage.model.prefix(index))
    return marker["extra"]["layers"]


def _expect(stage: Stage, index: int) -> None:
    """Let a block be read while the one before it is computed on, where it will be needed."""
    unsolved = _part(index) not in stage.writer.finished
    stage.model.expect(index)
    if index < stage.model.structure.blocks and (unsolved or stage.dense is not None):
        stage.targets.expect(stage.model.prefix(index))


@contextmanager
def _replayed(stage: Stage, states: States, index: int, sites: list[Site]) -> Iterator[Replay | None]:
    """A block whose groups are solved one after the other runs as often, and once more; None where it is solved at once."""
    if not stage.true_sequential or not sites:
        yield None
        return
    with torch.no_grad():
        groups = _groups(stage, states, index, sites)
    with Replay.of(stage.model, index, groups, stage.room) as replay:
        yield replay


def _solved(
    stage: Stage, states: States, index: int, sites: list[Site], replay: Replay | None
) -> tuple[dict[str, StoredWeight], list[dict[str, Any]]]:
    """The block's new records and their rows of the report. Truly sequential: group by group, each seeing what those before it became."""
    if not sites:
        return {}, []
    if stage.row.scope == "block":
        with torch.no_grad():
            statistics = _statistics(stage, states, index, sites, None)
        return solve_block(stage, states, index, sites, statistics)
    records: dict[str, StoredWeight] = {}
    layers: dict[str, dict[str, object]] = {}
    with torch.no_grad():
        for group in [sites] if replay is None else replay.groups:
            statistics = _statistics(stage, states, index, group, replay)
            result, rows = solve_all(stage, group, statistics)
            records, layers = records | result, layers | rows
            if replay is not None:
                replay.solved += 1
                for site in group if replay.solved < len(replay.groups) else ():
                    stage.model.put(site, records[site.name].to("cpu"))  # as it will be read back
    return {s.name: records[s.name] for s in sites}, [layers[s.name] for s in sites]


def _groups(stage: Stage, states: States, index: int, sites: list[Site]) -> list[list[Site]]:
    """The sites that are solved before others see what became of them; of the first batch, which rank 0 has."""
    ranks, by_name = stage.context.ranks, {site.name: site for site in sites}
    result = input_groups(stage.model, index, sites, states.hidden[0]) if ranks.leads else []
    return [[by_name[name] for name in names] for names in ranks.broadcast([[site.name for site in group] for group in result])]


def _advance(stage: Stage, states: States, index: int, replay: Replay | None) -> None:
    """Hidden states of the next block, from the block as it was written."""
    with torch.no_grad():
        for place, hidden_NTD in enumerate(states.hidden):
            with nullcontext() if replay is None else replay.at(place, last=True):
                states.hidden.put(place, stage.model.run_block(index, hidden_NTD))
        if stage.dense is not None and states.dense is not None:
            states.dense.through(partial(stage.dense.run_block, index))


def _statistics(stage: Stage, states: States, index: int, sites: list[Site], replay: Replay | None) -> dict[str, InputStatistics]:
    """Statistics of every site's input. A site no token reached (an idle expert) gets empty ones."""
    needs = stage.collected
    statistics: dict[str, InputStatistics] = {}
    source, hidden = stage.model, states.hidden
    if stage.row.inputs == "dense" and stage.dense is not None and states.dense is not None:
        source, hidden, replay = stage.dense, states.dense, None
    if "cross_moment" in needs and stage.dense is not None:
        with dense_inputs_of(stage.dense, sites) as paired:
            dense = DenseInputs(paired, _dense_first(states, paired, partial(stage.dense.run_block, index)))
            statistics = collect(source, index, hidden, sites, needs, stage.share, Alongside(dense, replay=replay))
    elif sites:
        with nullcontext() if stage.guidance is None else stage.guidance.watching(source, sites, stage.share) as watch:
            statistics = collect(source, index, hidden, sites, needs, stage.share, Alongside(watch=watch, replay=replay))
    for site in sites:
        result = statistics.setdefault(site.name, InputStatistics(site.shape[1], needs, stage.context.device))
        bad = result.non_finite() if stage.looks_at_inputs else None
        if bad is not None:
            raise InputError(
                f"{site.name}: {bad} of its inputs holds NaN or Inf; the layer below it overflows, or the checkpoint is damaged"
            )
    return statistics


def _dense_first(states: States, paired: dict[str, list[Tensor]], run: Callable[[Tensor], object]) -> Callable[[int], None]:
    """By the place of a batch: run the dense model's states of the same text, and forget those of the batch before."""
    assert states.dense is not None
    dense = states.dense

    def before(place: int) -> None:
        for inputs in paired.values():
            inputs.clear()  # also those of sites that read what another one reads
        run(dense[place])

    return before


def _head_statistics(stage: Stage, states: States, site: Site) -> InputStatistics:
    needs = stage.collected
    with torch.no_grad():
        if "cross_moment" in needs and stage.dense is not None:
            with dense_inputs_of(stage.dense, [site]) as paired:
                dense = DenseInputs(paired, _dense_first(states, paired, partial(through_head, stage.dense, site)))
                result = collect_head(stage.model, states.hidden, site, needs, stage.share, dense)
        else:
            result = collect_head(stage.model, states.hidden, site, needs, stage.share)
    return result or InputStatistics(site.shape[1], needs, stage.context.device)


def _write(stage: Stage, index: int, part: str, records: Mapping[str, StoredWeight], layers: Sequence[Mapping[str, object]]) -> None:
    """One part: this block's new records, and everything else of it as the parent has it. Experts that share a parameter with a new record
    get dense ones."""
    if not stage.context.ranks.leads:
        stage.writer.write_part(part, {}, {})
        return
    sites, block = stage.model.structure.of_block(index), stage.model.reader.block(stage.model.prefix(index))
    replaced = [s for s in sites if s.name in records]
    tensors, kept = block.others(replaced)
    parameters = {(s.module, s.parameter) for s in replaced}
    kept |= {s.name: block.matrix(s) for s in sites if (s.module, s.parameter) in parameters and s.name not in records and s.name not in kept}
    linears = kept | dict(records)
    stage.writer.write_part(part, shards_of(tensors, linears), linears, {"layers": layers})


def _measured(stage: Stage, states: States, layers: list[dict[str, Any]]) -> dict[str, Any]:
    tokens = sum(stage.context.ranks.gathered(states.hidden.tokens))
    result: dict[str, object] = {"calibration_tokens": tokens if stage.looks_at_inputs else 0}
    return result | ({"block_sparsity": _by_block(layers)} if stage.sparsity else {})


def _by_block(layers: list[dict[str, Any]]) -> list[float]:
    """What share of each block's weights was dropped, matrices with a sparsity of their own included."""
    totals: dict[int, list[float]] = {}
    for layer in layers:
        if layer["block"] is not None:
            sums = totals.setdefault(layer["block"], [0.0, 0.0])
            sums[0], sums[1] = sums[0] + layer["sparsity"] * layer["weights"], sums[1] + layer["weights"]
    return [dropped / weights for dropped, weights in totals.values()]


def _notes(stage: Stage, chosen: list[Site]) -> list[str]:
    """What was left alone and why, and what a reader of the numbers should know."""
    names = {site.name for site in chosen}
    left = {s.name: s.reason for s in stage.model.structure.skipped}
    left |= {s.name: "matched by `ignore`" for s in stage.model.structure.sites if s.name not in names and s.block is not None}
    notes = by_reason(left)
    notes += fallback_notes(stage.spec, chosen)
    unguided = [s.name for s in chosen if getattr(stage.spec.config_for(s.name), "guided", 0) and not stage.guides(s)]
    if unguided:
        more = f" and {len(unguided) - 1} more" if len(unguided) > 1 else ""
        notes.append(f"guided: not every token of the text reaches {unguided[0]}{more} within the blocks, so plain second moments solve them")
    notes += outside_notes(stage, [site for site in chosen if site.block is None])
    grid = getattr(stage.spec.config, "activations", None)
    if grid is not None:
        groups = "" if grid.group_size == -1 else f" in groups of {grid.group_size}"
        notes.append(f"inputs are rounded to {grid.bits} bits, per token{groups}: simulated in every perplexity, carried by no export")
    return notes
