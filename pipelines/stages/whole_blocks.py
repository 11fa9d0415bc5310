"""Methods that train a decoder block as a whole: its matrices, its inputs, what the dense block makes of them, and the block as a function.

Knows the model's blocks; the training is `compress/block_training` and `compress/smooth`.
Legend: B windows, T tokens, D model width.
"""

from typing import Any

import torch
from torch import Tensor

from ...compress.methods import BlockProblem
from ...compress.statistics import InputStatistics, LayerStatistics
from ...compress.weights import StoredWeight
from ..models import Site
from .matrices import Stage, current, described, target


def solve_block(
    stage: Stage, index: int, sites: list[Site], statistics: dict[str, InputStatistics]
) -> tuple[dict[str, StoredWeight], list[dict[str, Any]]]:
    """Hand the whole block to a method that trains it."""
    assert stage.dense is not None
    targets = {s.name: target(stage, s) for s in sites}
    with torch.no_grad():
        outputs = torch.cat([stage.dense.run_block(index, h) for h in stage.dense_hidden])
    layers = {s.name: LayerStatistics(statistics[s.name], stage.fisher.get(s.name)) for s in sites}
    problem = BlockProblem(
        {s.name: current(stage, s) for s in sites},
        targets,
        _block_function(stage, index, sites),
        torch.cat(stage.hidden),
        outputs,
        layers,
        stage.context.seed + index,
    )
    records, metrics = stage.row.function(problem, {s.name: stage.config_for(s) for s in sites})
    return records, [described(s, records[s.name], targets[s.name], statistics[s.name], metrics.get(s.name, {})) for s in sites]


def _block_function(stage: Stage, index: int, sites: list[Site]) -> Any:
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
                fused.setdefault(name, list(block.get_parameter(name).unbind()))[site.expert] = matrix
        parameters |= {name: torch.stack(parts) for name, parts in fused.items()}
        args, kwargs = stage.model.call_of(index, hidden_BTD)
        out = torch.func.functional_call(block, parameters, (hidden_BTD, *args), kwargs)
        return out[0] if isinstance(out, tuple) else out

    return forward
