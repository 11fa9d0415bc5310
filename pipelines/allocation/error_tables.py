"""The table of errors that a budget is spent by: every matrix under every setting, on the calibration text, block by block.

Inputs are those of the artifact before the first stage that the budget chooses for. One file a block; a table that was stopped goes on behind the
blocks that are there. Knows artifacts and the walk; errors of one matrix are `compress/options`, the choice is `choosing`.
Legend: O out, I in, K settings, V views of an error (as it is; its rows weighed by the mean squares of the loss's gradient), M matrices.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...compress.gptq import GptqConfig
from ...compress.lowrank import WeightedError
from ...compress.methods import DECOMPOSE, QUANTIZE, Method
from ...compress.metrics import gradient_squares, metric_of
from ...compress.options import Grid, Setting, error_table, mask_on, overrides
from ...compress.statistics import Fisher, InputStatistics, LayerStatistics
from ...compress.weights import StoredWeight
from ..errors import InputError
from ..evaluation.perplexity import embedded
from ..logs import bar
from ..models.blocks import StreamedModel
from ..models.collecting import collect
from ..models.hidden import HiddenStates, Room
from ..models.reading import BlockReader
from ..models.structure import Site
from ..recipes.budget import AllocationSettings
from ..recipes.stage_settings import StageSpec
from ..stages.context import Context, check_stop
from ..stages.fisher import fisher_diagonal, nats_per_square
from ..store.artifact import Artifact
from ..store.kept import keep, kept
from .spending import Spent

VERSION = 2
"""Rises when a fix changes a table."""


def table_key(
    parent_key: str, calibration: str, stages: Spent, settings: list[Setting], allocation: AllocationSettings, compute: Mapping[str, Any]
) -> str:
    """Whatever decides the table: another budget has the same one."""
    row: Method = QUANTIZE[stages.quantize.method]
    chosen = {"bits", "group_size", "block_size", "double_quantize"}
    kept = {key: value for key, value in stages.quantize.settings().items() if key not in chosen}
    names = [row.version, kept, allocation.weighting == "fisher"]
    if (solver := _solver(stages, allocation)) is not None:
        names += [DECOMPOSE[solver.method].version, {k: v for k, v in solver.settings().items() if k not in ("rank", "factor_bits")}]
    identity = [VERSION, parent_key, calibration, *names, [asdict(setting) for setting in settings], *([compute] if compute else [])]
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def _solver(stages: Spent, allocation: AllocationSettings) -> StageSpec | None:
    """The decompose stage whose own method makes the errors of settings with a rank; None where a spectrum tells them."""
    return stages.decompose if allocation.errors == "iterates" else None


@dataclass(frozen=True)
class ErrorTable:
    """Squared errors as shares of the matrix's squared output, float64 [M, V, K], inf where a setting does not fit; and that squared
    output, [M, V], 0 where no token reached a matrix (its errors are then shares of the squared weight)."""

    relative_MVK: NDArray[np.float64]
    energy_MV: NDArray[np.float64]
    seconds: float


def build(
    directory: Path, parent: Artifact, stages: Spent, settings: list[Setting], allocation: AllocationSettings, context: Context
) -> ErrorTable:
    """Go on with the table in `directory` until it is whole. KeyboardInterrupt between two blocks when the user asks to end."""
    reader = BlockReader(parent, keeps=True)
    targets = reader if parent.key == context.baseline.key else BlockReader(context.baseline, keeps=True)
    solver = _solver(stages, allocation)
    walk = _Walk(targets, stages, settings, context, StreamedModel(parent, context.device, context.dtype, reader=reader), solver)
    files = [directory / f"block-{index:05d}.safetensors" for index in range(walk.model.structure.blocks)]
    sites = [stages.sites(walk.model.structure.of_block(index)) for index in range(len(files))]
    if any(_read(file, block) is None for file, block in zip(files, sites, strict=True)):
        directory.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        by_fisher = allocation.weighting == "fisher" or (solver is not None and "fisher" in _needs(solver))
        found = fisher_diagonal(context) if by_fisher else {}
        fisher = {name: sums.to(context.device) for name, sums in found.items()}
        ids_NT = context.inputs.calibration()
        hidden = embedded(walk.model, ids_NT, Room.measured(context.device, directory))
        with torch.no_grad(), bar("allocation: table of errors, blocks", len(files)) as shown:
            for index in walk.model.walk():
                targets.expect(walk.model.prefix(index))
                if _read(files[index], sites[index]) is None:
                    tensors = walk.block(index, sites[index], hidden, fisher)
                    keep(files[index], tensors, {"seconds": str(time.monotonic() - began)})
                if index < len(files) - 1:
                    hidden.through(partial(walk.model.run_block, index))
                for read in (reader, targets):
                    read.drop(walk.model.prefix(index))
                began = time.monotonic()
                shown.advance()
                check_stop(context)
    parts = [part for file, block in zip(files, sites, strict=True) if (part := _read(file, block)) is not None]
    errors = [tensor.numpy() for found, _, _ in parts for tensor in found.values()]
    energies = [tensor.numpy() for _, found, _ in parts for tensor in found.values()]
    return ErrorTable(np.stack(errors), np.stack(energies), sum(seconds for _, _, seconds in parts))


def _read(path: Path, sites: list[Site]) -> tuple[dict[str, Tensor], dict[str, Tensor], float] | None:
    """Errors [V, K] and energies [V] by site, and the seconds they took; None where the file is not there or not whole."""
    found = kept(path)
    if found is None:
        return None
    errors, energies = ({site.name: found[0][f"{site.name}.{kind}"] for site in sites} for kind in ("errors", "energy"))
    return errors, energies, float(found[1]["seconds"])


def _needs(solver: StageSpec) -> frozenset[str]:
    return DECOMPOSE[solver.method].needs(solver.config)


@dataclass(frozen=True)
class _Walk:
    """`targets` reads the baseline's blocks; `solver` makes the errors of settings with a rank, where a spectrum does not."""

    targets: BlockReader
    stages: Spent
    settings: list[Setting]
    context: Context
    model: StreamedModel
    solver: StageSpec | None = None

    def block(self, index: int, sites: list[Site], hidden: HiddenStates, fisher: Mapping[str, Fisher]) -> dict[str, Tensor]:
        """Errors and energies of a loaded block's matrices."""
        row: Method = QUANTIZE[self.stages.quantize.method]
        needs = frozenset({"second_moment"}).union(*(row.needs(self.stages.quantize.config_for(s.name)) for s in sites))
        needs |= frozenset() if self.solver is None else _needs(self.solver)
        statistics: dict[str, InputStatistics] = {}
        collect(self.model, index, hidden, sites, needs - {"cross_moment", "fisher"}, statistics)
        out: dict[str, Tensor] = {}
        for site in sites:
            inputs = statistics.get(site.name) or InputStatistics(site.shape[1], frozenset({"second_moment"}), self.context.device)
            bad = inputs.non_finite()
            if bad is not None:
                raise InputError(
                    f"{site.name}: {bad} of its inputs holds NaN or Inf; the layer below it overflows, or the checkpoint is damaged"
                )
            out[f"{site.name}.errors"], out[f"{site.name}.energy"] = self.errors(site, LayerStatistics(inputs, fisher.get(site.name)))
        return out

    def errors(self, site: Site, known: LayerStatistics) -> tuple[Tensor, Tensor]:
        target_OI = self._matrix(self.targets, site).dense().contiguous()
        metric, notes = metric_of(known, "second_moment")
        weights_VO = self.row_weights(known, len(target_OI)).to(target_OI.device)
        try:
            solve = None if self.solver is None else partial(self.solved, site, target_OI, known)
            quantize = partial(self.quantized, site, target_OI, known)
            errors_VK = error_table(target_OI, metric, known, self.settings, quantize, weights_VO, solve)
        except ValueError as error:
            raise InputError(f"{site.name}: {error}") from error
        energy_V = (weights_VO @ WeightedError(target_OI, metric).squared_O).clamp(min=0).cpu()
        relative_VK = errors_VK / energy_V.clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(1)
        for v in range(1, len(energy_V)):  # a matrix that the loss does not feel: its errors as they are
            relative_VK[v] = relative_VK[v] if energy_V[v] > 0 else relative_VK[0]
        return relative_VK, energy_V * 0 if "statistics_zero" in notes else energy_V

    def row_weights(self, known: LayerStatistics, rows: int) -> Tensor:
        """[V, O]: ones; and, where Fisher information is known, half the mean square of a token's gradient at each output: errors are then nats
        per token, to second order."""
        views = [torch.ones(rows, dtype=torch.float64)]
        if known.fisher is not None:
            views.append(gradient_squares(known).cpu() * nats_per_square(self.context.inputs.recipe.calibration) / 2)
        return torch.stack(views)

    def quantized(self, site: Site, target_OI: Tensor, known: LayerStatistics, grid: Grid) -> StoredWeight:
        """What the quantize stage would make of the matrix on this grid, were all below it as it is now."""
        spec = self.stages.quantize
        row: Method = QUANTIZE[spec.method]
        wanted: dict[str, Any] = overrides(Setting(grid))["quantize"]
        config = spec.config_for(site.name)
        if row.scope == "block":  # it starts from GPTQ, and trains what that left
            row, config = QUANTIZE["gptq"], GptqConfig(clip=config.clip)
        changes = wanted | ({"correction": 0.0} if hasattr(config, "correction") else {})
        record = self._matrix(self.model.reader, site)
        if grid.pattern != "dense":
            record = record.with_mask(mask_on(target_OI, known.inputs.norm_I, grid))
        return row.function(replace(record, low_rank=None), target_OI, known, replace(config, **changes))[0]

    def solved(self, site: Site, target_OI: Tensor, known: LayerStatistics, setting: Setting, base: StoredWeight) -> StoredWeight:
        """What the decompose stage would make of such a Q."""
        assert self.solver is not None
        row, config = DECOMPOSE[self.solver.method], self.solver.config_for(site.name)
        return row.function(base, target_OI, known, replace(config, rank=setting.rank, factor_bits=setting.factor_bits))[0]

    def _matrix(self, reader: BlockReader, site: Site) -> StoredWeight:
        assert site.block is not None
        return reader.block(self.model.prefix(site.block)).matrix(site).to(self.context.device)
