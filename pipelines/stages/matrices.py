"""A compression stage's work on one matrix: its current record, its target weight, the method's call and its row of the report.

Knows artifacts and the structure of the model; the maths is `compress/methods`, the order of things `compress`.
Legend: O out, I in.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...compress.methods import Method
from ...compress.metrics import output_error
from ...compress.statistics import BY_MATRIX, SAMPLES, Fisher, InputStatistics, LayerStatistics
from ...compress.weights import DenseWeight, StoredWeight
from ..errors import InputError
from ..models.blocks import StreamedModel
from ..models.hidden import Room
from ..models.reading import BlockReader
from ..models.sharding import BatchShare
from ..models.structure import Site, shared_names
from ..recipes.stage_settings import StageSpec
from ..store.artifact import Artifact, ArtifactWriter
from .context import Context
from .guidance import Guidance


@dataclass(frozen=True)
class Stage:
    """`targets` reads the baseline's blocks: what `model` reads, where the parent is the baseline. `dense` runs along where the method reads
    what the dense model makes of the text. `room` is for hidden states, `share` this rank's of the text's batches. `sparsity` holds, for a pruning stage whose blocks differ, that of
    each matrix that shares the stage's mean."""

    parent: Artifact
    writer: ArtifactWriter
    spec: StageSpec
    row: Method
    context: Context
    model: StreamedModel
    targets: BlockReader
    dense: StreamedModel | None
    needs: frozenset[str]
    room: Room
    share: BatchShare
    sparsity: Mapping[str, float]
    fisher: Mapping[str, Fisher]
    guidance: Guidance | None = None

    @property
    def looks_at_inputs(self) -> bool:
        return looks_at_inputs(self.needs, self.row)

    @property
    def collected(self) -> frozenset[str]:
        return (self.needs - BY_MATRIX) | {"samples"}

    @property
    def true_sequential(self) -> bool:
        return self.spec.true_sequential and bool(self.needs - BY_MATRIX)

    def calibration(self) -> Tensor:
        return calibration(self.context, self.looks_at_inputs)

    def known(self, site: Site, statistics: Mapping[str, InputStatistics]) -> LayerStatistics:
        """All that its method may know about a matrix."""
        guided = () if self.guidance is None else self.guidance.moments.get(site.name, ())
        return LayerStatistics(statistics[site.name], self.fisher.get(site.name), guided)

    def guides(self, site: Site) -> bool:
        return self.guidance is not None and site.name in self.guidance.weights

    def config_for(self, site: Site) -> Any:
        """The site's config: its overrides over its block's sparsity over the stage's settings; `guided` where there are gradients."""
        config = self.spec.config_for(site.name)
        if getattr(config, "guided", 0) and not self.guides(site):
            config = replace(config, guided=0)
        sparsity = self.sparsity.get(site.name)
        return config if sparsity is None else replace(config, sparsity=sparsity)


def looks_at_inputs(needs: frozenset[str], row: Method) -> bool:
    """Whether the method does; errors are measured on a few of them in any case."""
    return bool(needs - BY_MATRIX) or row.scope == "block"


def calibration(context: Context, looks: bool) -> Tensor:
    """Token ids [N, T]: all of the calibration text, or what SAMPLES tokens take where the method `looks` at none of it: errors are measured on
    that many inputs."""
    ids_NT = context.inputs.calibration()
    if looks:
        return ids_NT
    length = min(ids_NT.shape[1], SAMPLES)
    return ids_NT[: -(-SAMPLES // length), :length]


def current(stage: Stage, site: Site) -> StoredWeight:
    """The site's record in the parent; a plain weight becomes a dense record in its own dtype."""
    return _matrix(stage, stage.model.reader, site)


def target(stage: Stage, site: Site) -> Tensor:
    """The baseline's float32 [O, I] matrix."""
    record = _matrix(stage, stage.targets, site).to(stage.context.device)
    return record.dense().contiguous()


def checked_target(stage: Stage, site: Site, config: object) -> Tensor:
    """`target`. InputError for one with NaN or Inf, and where the config rounds inputs in groups that do not divide the site's."""
    target_OI = target(stage, site)
    if not bool(torch.isfinite(target_OI).all()):
        raise InputError(f"{site.name}.{site.parameter} holds NaN or Inf; repair the checkpoint or give another one")
    if (grid := getattr(config, "activations", None)) is not None:
        try:
            grid.divide(site.shape[1])
        except ValueError as error:
            raise InputError(f"{site.name}: {error}") from error
    return target_OI


def _matrix(stage: Stage, reader: BlockReader, site: Site) -> StoredWeight:
    if site.block is not None:
        return reader.block(stage.model.prefix(site.block)).matrix(site)
    return matrix_outside(stage.model.model, reader.artifact, site)


def matrix_outside(model: nn.Module, artifact: Artifact, site: Site) -> StoredWeight:
    """The record of a matrix outside the blocks, under whichever of its tied names it is stored; a plain weight as a dense one."""
    names = shared_names(model, f"{site.module}.{site.parameter}")
    linear = next((n for name in names if (n := name.removesuffix(".weight")) in artifact.linears), None)
    if linear is not None:
        return artifact.stored(linear)
    return StoredWeight(DenseWeight(site.read(artifact.tensor(names[0])).contiguous()))


def solve(stage: Stage, site: Site, statistics: Mapping[str, InputStatistics]) -> tuple[StoredWeight, dict[str, object]]:
    """(the site's new record, its row of the report). InputError names the site and what the method could not use."""
    config = stage.config_for(site)
    target_OI = checked_target(stage, site, config)
    known = stage.known(site, statistics)
    try:
        record, metrics = stage.row.function(current(stage, site).to(stage.context.device), target_OI, known, config)
    except ValueError as error:
        raise InputError(f"{site.name}: {error}") from error
    return record, described(site, record, target_OI, statistics[site.name].samples_TI, metrics)


def described(
    site: Site, record: StoredWeight, target_OI: Tensor, inputs_TI: Tensor | None, metrics: Mapping[str, object]
) -> dict[str, Any]:
    """What a report says of one matrix: its output's error on some of the stage's inputs (null where no token came), its bytes, and the
    method's own metrics."""
    rank = record.low_rank.rank if record.low_rank is not None else None
    return {
        "name": site.name,
        "block": site.block,
        "output_error": None if inputs_TI is None else output_error(record.dense().to(target_OI), target_OI, inputs_TI),
        "bits_per_weight": record.bits_per_weight(),
        "rank": rank,
        "sparsity": record.sparsity(),
        "weights": site.shape[0] * site.shape[1],
        "metrics": dict(metrics),
    }
