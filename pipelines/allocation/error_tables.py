"""The table of errors that a budget's allocation is chosen from: every matrix under every setting, on the calibration text, block by block.

Inputs are those of the artifact before the first stage that the budget chooses for. One file a block, and one for the matrices outside the
blocks, where the budget has some; a table that was stopped goes on behind the files that are there. Knows artifacts and the walk; errors of one matrix are `compress/options`, the choice is `choice`.
Legend: O out, I in, K settings, V views of an error (as it is; its rows weighed by the mean squares of the loss's gradient), M matrices.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...compress.gptq import GptqConfig
from ...compress.lowrank import Metric, WeightedError
from ...compress.methods import DECOMPOSE, QUANTIZE, Method
from ...compress.metrics import gradient_squares, metric_of
from ...compress.options import Grid, Setting, error_table, mask_on, overrides
from ...compress.statistics import BY_MATRIX, Fisher, InputStatistics, LayerStatistics
from ...compress.weights import StoredWeight
from ..errors import InputError
from ..evaluation.perplexity import embedded
from ..logs import bar
from ..models.blocks import StreamedModel
from ..models.collecting import collect, collect_head
from ..models.hidden import HiddenStates, Room
from ..models.reading import BlockReader
from ..models.structure import Site
from ..recipes.budget import AllocationSettings
from ..recipes.stage_settings import StageSpec
from ..stages.context import Context, check_stop
from ..stages.fisher import OutputSquares, fisher_diagonal, nats_per_square, output_squares
from ..stages.matrices import matrix_outside
from ..store.artifact import Artifact
from ..store.kept import keep, kept
from ..store.rundir import OUTSIDE
from .outside_errors import Lookup, Product, gain, outside_errors
from .spending import Outside, Spent, all_settings

VERSION = 3
"""Rises when a fix changes a table."""


def table_key(
    parent_key: str,
    calibration: str,
    stages: Spent,
    settings: list[Setting],
    outside: Sequence[Outside],
    allocation: AllocationSettings,
    compute: Mapping[str, object],
) -> str:
    """Whatever decides the table: another budget has the same one, as long as it is spent on the same matrices."""
    row: Method = QUANTIZE[stages.quantize.method]
    chosen = {"bits", "group_size", "block_size", "double_quantize"}
    chosen |= {"grid", "symmetric"} if getattr(stages.quantize.config, "grid", "uniform") != "uniform" else set()
    kept = {key: value for key, value in stages.quantize.settings().items() if key not in chosen}
    names = [row.version, kept, allocation.weighting == "fisher"]
    if (solver := _solver(stages, allocation)) is not None:
        names += [DECOMPOSE[solver.method].version, {k: v for k, v in solver.settings().items() if k not in ("rank", "factor_bits")}]
    identity = [VERSION, parent_key, calibration, *names, [asdict(setting) for setting in settings], *([compute] if compute else [])]
    identity += [[[each.site.name, [asdict(setting) for setting in each.settings]] for each in outside]] if outside else []
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def _solver(stages: Spent, allocation: AllocationSettings) -> StageSpec | None:
    """The decompose stage whose own method makes the errors of settings with a rank; None where a spectrum gives them."""
    return stages.decompose if allocation.errors == "iterates" else None


@dataclass(frozen=True)
class ErrorTable:
    """Squared errors as shares of the matrix's squared output, float64 [M, V, K], inf where a setting does not fit; and that squared
    output, [M, V], 0 where no token reached a matrix (its errors are then shares of the squared weight)."""

    relative_MVK: NDArray[np.float64]
    energy_MV: NDArray[np.float64]
    seconds: float


def build(
    directory: Path,
    parent: Artifact,
    stages: Spent,
    settings: list[Setting],
    outside: Sequence[Outside],
    allocation: AllocationSettings,
    context: Context,
) -> ErrorTable:
    """Go on with the table in `directory` until it is whole; its settings are those of `spending.all_settings`. KeyboardInterrupt between two blocks
    when the user asks to end."""
    reader = BlockReader(parent, keeps=True)
    targets = reader if parent.key == context.baseline.key else BlockReader(context.baseline, keeps=True)
    solver = _solver(stages, allocation)
    walk = _Walk(targets, stages, settings, context, StreamedModel(parent, context.device, context.dtype, reader=reader), solver)
    structure = walk.model.structure
    blocks = [
        _Part(directory / f"block-{index:05d}.safetensors", [(site, settings) for site in stages.sites(structure.of_block(index))])
        for index in range(structure.blocks)
    ]
    last = [_Part(directory / OUTSIDE, [(each.site, each.settings) for each in outside])] if outside else []
    if any(part.read() is None for part in blocks + last):
        directory.mkdir(parents=True, exist_ok=True)
        by_fisher = allocation.weighting == "fisher" or (solver is not None and "fisher" in _needs(solver))
        _complete(walk, blocks, [part for part in last if part.read() is None], outside, by_fisher)
    every = all_settings(settings, outside)
    result = [row for part in blocks + last for row in part.rows(every)]
    seconds = sum(done[1] for part in blocks + last if (done := part.read()) is not None)
    return ErrorTable(np.stack([errors_VK for errors_VK, _ in result]), np.stack([energy_V for _, energy_V in result]), seconds)


def _complete(walk: "_Walk", blocks: list["_Part"], last: list["_Part"], outside: Sequence[Outside], by_fisher: bool) -> None:
    """Write the blocks' parts that are not there, and the last one if it is given. Energies and errors weighed by the loss's gradient come with
    `by_fisher`."""
    context, began = walk.context, time.monotonic()
    fisher = {name: sums.to(context.device) for name, sums in (fisher_diagonal(context) if by_fisher else {}).items()}
    squares = output_squares(context) if by_fisher and last else None
    ids_NT = context.inputs.calibration()
    hidden = embedded(walk.model, ids_NT, Room.measured(context.device, blocks[0].file.parent))
    with torch.no_grad(), bar("allocation: table of errors, blocks", len(blocks)) as shown:
        for index in walk.model.walk():
            walk.targets.expect(walk.model.prefix(index))
            if blocks[index].read() is None:
                blocks[index].write(walk.block(index, blocks[index].sites, hidden, fisher), began)
            if index < len(blocks) - 1 or last:
                hidden.through(partial(walk.model.run_block, index))
            for read in (walk.model.reader, walk.targets):
                read.drop(walk.model.prefix(index))
            began = time.monotonic()
            shown.advance()
            check_stop(context)
        for part in last:
            part.write(walk.outside(outside, ids_NT, hidden, squares), began)


@dataclass(frozen=True)
class _Part:
    """A file of the table: of each of its matrices, whose settings are its own, errors [V, K] and energy [V]."""

    file: Path
    own: list[tuple[Site, list[Setting]]]

    @property
    def sites(self) -> list[Site]:
        return [site for site, _ in self.own]

    def read(self) -> tuple[dict[str, Tensor], float] | None:
        """Tensors by name, and the seconds they took; None where the file is not there or not whole."""
        result = kept(self.file)
        return None if result is None else (result[0], float(result[1]["seconds"]))

    def write(self, tensors: Mapping[str, Tensor], began: float) -> None:
        keep(self.file, tensors, {"seconds": str(time.monotonic() - began)})

    def rows(self, every: list[Setting]) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Errors over all settings, inf where one is not the matrix's own, and energy."""
        result = self.read()
        assert result is not None
        for site, settings in self.own:
            errors_VK = result[0][f"{site.name}.errors"].numpy()
            over_all = np.full((len(errors_VK), len(every)), np.inf)
            over_all[:, [every.index(setting) for setting in settings]] = errors_VK
            yield over_all, result[0][f"{site.name}.energy"].numpy()


def _relative(errors_VK: Tensor, energy_V: Tensor) -> Tensor:
    """Squared errors as shares of the squared output."""
    relative_VK = errors_VK / energy_V.clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(1)
    for v in range(1, len(energy_V)):  # a matrix that the loss does not feel: its errors as they are
        relative_VK[v] = relative_VK[v] if energy_V[v] > 0 else relative_VK[0]
    return relative_VK


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
        statistics = collect(self.model, index, hidden, sites, needs - {"cross_moment", *BY_MATRIX})
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
        return _relative(errors_VK, energy_V), energy_V * 0 if "statistics_zero" in notes else energy_V

    def outside(self, rows: Sequence[Outside], ids_NT: Tensor, leaving: HiddenStates, squares: OutputSquares | None) -> dict[str, Tensor]:
        """Errors and energies of matrices outside the blocks, from the hidden states that leave the last block."""
        nats, device = nats_per_square(self.context.inputs.recipe.calibration), self.context.device
        model, structure, out = self.model.model, self.model.structure, dict[str, Tensor]()
        for row in rows:
            uses: list[Lookup | Product] = []
            if row.looked_up:
                counts_O = torch.bincount(ids_NT.flatten().cpu(), minlength=row.site.shape[0]).double() / ids_NT.numel()
                uses.append(Lookup(counts_O.to(device), gain(row.site.shape[1], squares and squares.looked_up_D, nats).to(device)))
            if row.multiplied:
                assert structure.head is not None
                metric = self._head_metric(structure.head, leaving)
                uses.append(Product(metric, gain(row.site.shape[0], squares and squares.logits_V, nats).to(device)))
            target, current = (matrix_outside(model, reader.artifact, row.site) for reader in (self.targets, self.model.reader))
            try:
                errors_VK, energy_V = outside_errors(target, current, row.configs, uses, device)
            except ValueError as error:
                raise InputError(f"{row.site.name}: {error}") from error
            out[f"{row.site.name}.errors"], out[f"{row.site.name}.energy"] = _relative(errors_VK, energy_V), energy_V
        return out

    def _head_metric(self, head: Site, leaving: HiddenStates) -> Metric:
        inputs = collect_head(self.model, leaving, head, frozenset({"second_moment"}))
        if inputs is None:
            raise InputError(
                f"{head.name}: the model's code does not call it, so nothing is known of its inputs; set allocation.embedding_bits to []"
            )
        if (bad := inputs.non_finite()) is not None:
            raise InputError(f"{head.name}: {bad} of its inputs holds NaN or Inf; a layer below it overflows, or the checkpoint is damaged")
        return metric_of(LayerStatistics(inputs), "second_moment")[0]

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
        wanted: dict[str, object] = overrides(Setting(grid))["quantize"]
        config = spec.config_for(site.name)
        if row.scope == "block":  # it starts from GPTQ, and trains what that left
            row, config = QUANTIZE["gptq"], GptqConfig(clip=config.clip)
        changes = wanted | {name: 0 for name in ("correction", "guided") if hasattr(config, name)}
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
