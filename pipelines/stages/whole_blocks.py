"""Runs methods that solve a whole decoder block, given its matrices, its inputs, the dense block's outputs, and the block as a function.

Knows the model's blocks; the training is `compress/block_training` and `compress/smooth`.
Legend: B windows, T tokens, D model width.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...compress.block import BlockShare
from ...compress.methods import BlockProblem
from ...compress.statistics import InputStatistics
from ...compress.weights import StoredWeight, to_tensors
from ...recover.peers import ReplicasDiffer
from ..errors import InputError
from ..evaluation.perplexity import batches
from ..models.blocks import StreamedModel
from ..models.hidden import HiddenStates
from ..models.sharding import windows_by_slot
from ..models.structure import Site
from ..ranks.exchange import OrderedSum
from .context import check_stop
from .matrices import Stage, current, described, target
from .shared_inputs import spread
from .walked import States


def solve_block(
    stage: Stage, states: States, index: int, sites: list[Site], statistics: dict[str, InputStatistics]
) -> tuple[dict[str, StoredWeight], list[dict[str, Any]]]:
    """Hand the whole block to a method that trains it. Several ranks share the work: each has the windows of its slots."""
    ranks, parts = stage.context.ranks, [*batches(*stage.calibration().shape)]
    share = BlockShare(
        windows_by_slot(parts), ranks.rank, ranks.size, ranks.gathered, partial(OrderedSum, ranks), lambda costs: spread(costs, ranks.size)
    )
    own = stage.share.windows(parts)
    targets = {s.name: target(stage, s) for s in sites}
    behind = _behind(stage, index)
    outputs = _dense_outputs(stage, states, [index, *behind])
    layers = {s.name: stage.known(s, statistics) for s in sites}
    problem = BlockProblem(
        {s.name: current(stage, s).to(stage.context.device) for s in sites},
        targets,
        _block_function(stage, index, sites, behind),
        states.hidden.rows(own),
        outputs.rows(own if len(outputs) else []),
        layers,
        stage.context.seed + index,
        _parts(stage, index, sites),
        lambda kept: HiddenStates.of(kept, stage.room).rows(own),
        lambda: check_stop(stage.context),
        share,
    )
    records, metrics = stage.row.function(problem, {s.name: stage.config_for(s) for s in sites})
    try:
        stage.context.peers.check({f"{name}.{part}": tensor for name, record in records.items() for part, tensor in to_tensors(record).items()})
    except ReplicasDiffer as error:
        raise InputError(f"{stage.spec.address}: {error}") from error
    for model in (stage.model, stage.dense):
        if model is not None:
            for number in behind:
                model.unload_block(number)
    return records, [described(s, records[s.name], targets[s.name], statistics[s.name].samples_TI, metrics.get(s.name, {})) for s in sites]


def _dense_outputs(stage: Stage, states: States, blocks: list[int]) -> HiddenStates:
    """What the method trains towards; nothing for one that solves its matrices by their inputs alone."""
    if not stage.row.dense_outputs:
        return HiddenStates(stage.room)
    assert stage.dense is not None and states.dense is not None
    with torch.no_grad():
        return HiddenStates.of((_through(stage.dense, blocks, h) for h in states.dense), stage.room)


def _behind(stage: Stage, index: int) -> list[int]:
    """The blocks after this one through which the error is measured: the next one with window two_blocks, loaded in both models."""
    wanted = getattr(stage.spec.config, "window", "block") == "two_blocks" and index + 1 < stage.model.structure.blocks
    for model in (stage.model, stage.dense) if wanted else ():
        assert model is not None
        model.load_block(index + 1)
    return [index + 1] if wanted else []


def _through(model: StreamedModel, blocks: list[int], hidden_BTD: Tensor) -> Tensor:
    for index in blocks:
        hidden_BTD = model.run_block(index, hidden_BTD)
    return hidden_BTD


def _parts(stage: Stage, index: int, sites: list[Site]) -> tuple[tuple[str, ...], ...]:
    """The block's sub-blocks in the order they run in: matrices under one child of the block (its attention, its MLP) are one, and those
    that are children themselves are one."""
    prefix, parts = f"{stage.model.structure.prefix}.{index}.", dict[str, tuple[str, ...]]()
    for site in sites:
        child, _, below = site.module.removeprefix(prefix).partition(".")
        key = child if below else ""
        parts[key] = (*parts.get(key, ()), site.name)
    return tuple(parts.values())


def _block_function(stage: Stage, index: int, sites: list[Site], behind: list[int]) -> Any:
    """(matrices by site name, hidden [B, T, D]) → hidden: the block with those effective weights and the blocks `behind` it, differentiable
    in both."""
    block, prefix = stage.model.layers[index], f"{stage.model.structure.prefix}.{index}."

    def forward(matrices: dict[str, Tensor], hidden_BTD: Tensor) -> Tensor:
        parameters: dict[str, Tensor] = {}
        fused: dict[str, list[Tensor]] = {}
        for site in sites:
            matrix = matrices[site.name].to(hidden_BTD.dtype)
            matrix = matrix.T if site.transposed else matrix
            name = f"{site.module}.{site.parameter}".removeprefix(prefix)
            if site.expert is None:
                parameters[name] = matrix
            else:
                fused.setdefault(name, list(block.get_parameter(name).unbind()))[site.expert] = matrix
        parameters |= {name: torch.stack(parts) for name, parts in fused.items()}
        args, kwargs = stage.model.call_of(index, hidden_BTD)
        out = torch.func.functional_call(block, parameters, (hidden_BTD, *args), kwargs)
        return _through(stage.model, behind, out[0] if isinstance(out, tuple) else out)

    return forward
