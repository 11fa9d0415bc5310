"""Loads an artifact into a model whose linears can train, and writes what was trained back into an artifact, audited there.

Knows artifacts and records; no method.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...compress.weights import DenseWeight, StoredWeight
from ...recover.compressed_model import compressed_linears, install
from ...recover.fits import Chosen, left_alone
from ...recover.merge import audit
from ...recover.trainable import Attached, through
from ..devices.compute import free_bytes
from ..errors import QualityError
from ..models.blocks import StreamedModel
from ..models.structure import Site, Structure, set_parameter, tied_names
from ..store.artifact import Artifact, ArtifactWriter, shards_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SLACK = 1e-6
"""Of a held-out loss in nats: what the order of a sum may change."""
DENSE_CACHE_BYTES = 2e9
FEW = 4
"""Matrices that a note names one by one."""


@dataclass(frozen=True)
class InPlace:
    """A `blocks.Binder`: puts every linear of a block, fused experts included, into the model as one that can train, a weight that was
    never compressed as a dense record; embeddings and head are dense."""

    artifact: Artifact
    structure: Structure
    device: torch.device
    dtype: torch.dtype
    experts = True

    def __call__(self, model: nn.Module, prefix: str, records: dict[str, StoredWeight]) -> None:
        sites = [s for s in self.structure.sites if s.name.startswith(f"{prefix}.")]
        result = {s.name: records.get(s.name) or self._dense(s) for s in sites}
        linears = install(model, {name: record.to(self.device) for name, record in result.items()}, self.dtype)
        for site in sites:  # as they are stored: training moves them in float32, whatever the model computes in
            if linears[site.name].bias is not None:
                bias = self.artifact.tensor(f"{site.module}.bias").to(self.device)
                linears[site.name].bias, linears[site.name].bias_storage = nn.Parameter(bias, requires_grad=False), bias.dtype

    def _dense(self, site: Site) -> StoredWeight:
        return StoredWeight(DenseWeight(site.read(self.artifact.tensor(f"{site.module}.{site.parameter}")).contiguous()))

    def tables(self, model: "PreTrainedModel", records: dict[str, StoredWeight]) -> None:
        for name, record in records.items():
            set_parameter(model, name, record.dense(self.dtype).to(self.device))
        model.tie_weights()


def dense_cache_bytes(device: torch.device) -> float:
    """What rebuilt dense matrices may take: a third of what is free now; of a host's memory, which others want, too, up to DENSE_CACHE_BYTES."""
    return min(free_bytes(device) / 3, DENSE_CACHE_BYTES if device.type == "cpu" else math.inf)


@dataclass(frozen=True)
class Trained:
    """What a recovery changed: records by linear, and tensors (biases, norms, embeddings) by name."""

    records: dict[str, StoredWeight] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def untouched(config: Chosen, model: nn.Module, structure: Structure) -> list[str]:
    """What a recovery leaves alone in the decoder's blocks and a reader might not expect, one line a reason. `model` is a skeleton."""
    sites = [site.name for site in structure.sites if site.block is not None]
    inside = {s.name: s.reason for s in structure.skipped if s.name.startswith(f"{structure.prefix}.")}
    return left_alone(config, model, sites) + by_reason(inside)


def by_reason(left: Mapping[str, str]) -> list[str]:
    """One note for each matrix; of many with one reason the first is named, the others are counted."""
    names: dict[str, list[str]] = {}
    for name, reason in left.items():
        names.setdefault(reason, []).append(name)
    single = [f"left alone: {name} ({reason})" for reason, result in names.items() if len(result) <= FEW for name in result]
    return single + [
        f"left alone: {result[0]} and {len(result) - 1} more ({reason})" for reason, result in names.items() if len(result) > FEW
    ]


def as_stored_before(attached: Attached, parent: Artifact) -> None:
    """Plain parameters begin at the values that the artifact stores, not at those that the model computes with, and end in that dtype."""
    for name in attached.plain:
        value, trainable = parent.tensor(name), attached.trainables[name]
        attached.plain[name] = value.dtype
        trainable.parameter.data = value.to(trainable.parameter.device, torch.float32)
        trainable.stored = through(value.dtype)


def trained(model: nn.Module, plain: Mapping[str, torch.dtype]) -> Trained:
    """What stands in a model after training; `plain` are its trained parameters outside of records with their storage dtypes. A bias that
    was created and never moved is none."""
    records: dict[str, StoredWeight] = {}
    tensors: dict[str, Tensor] = {}
    for name, linear in compressed_linears(model).items():
        records[name], bias = linear.to_stored()
        if bias is not None:
            tensors[f"{name}.bias"] = bias
    return Trained(records, tensors | {n: model.get_parameter(n).detach().to(dtype) for n, dtype in plain.items()})


def write_model(parent: Artifact, writer: ArtifactWriter, streamed: StreamedModel, result: Trained) -> None:
    """Every part of the artifact: what was trained, and everything else as the parent has it. Rank 0 writes."""
    for index in range(streamed.structure.blocks):
        write_block(parent, writer, streamed.structure, index, result)
    write_rest(parent, writer, streamed, result)


def write_rest(parent: Artifact, writer: ArtifactWriter, streamed: StreamedModel, result: Trained) -> None:
    """Embeddings, last norm, head."""
    model, blocks = streamed.model, f"{streamed.structure.prefix}."
    outside = {n: result.tensors.get(n, parent.tensor(n)) for n in parent.index if not n.startswith(blocks) and parent.is_plain(n)}
    kept = {n: parent.stored(n) for n in parent.linears if not n.startswith(blocks)}
    known = set(model.state_dict()) - tied_names(model).keys()
    writer.write_part("rest", {"tensors": {n: t for n, t in outside.items() if n in known}, **shards_of({}, kept)}, kept)


def write_block(
    parent: Artifact, writer: ArtifactWriter, structure: Structure, index: int, result: Trained, extra: Mapping[str, object] | None = None
) -> None:
    """One block's part. A linear that was plain and still is one stays a plain tensor."""
    start, part = f"{structure.prefix}.{index}.", f"block-{index:05d}"
    sites = {s.name: s for s in structure.of_block(index)}
    linears: dict[str, StoredWeight] = {}
    tensors = {name: result.tensors.get(name, tensor) for name, tensor in parent.plain(start).items()}
    for name, tensor in result.tensors.items():
        if name.startswith(start) and (name in tensors or bool(tensor.any())):
            tensors[name] = tensor
    for name in [n for n in parent.linears if n.startswith(start)]:
        linears[name] = result.records.get(name) or parent.stored(name)
    plain: dict[str, dict[str, StoredWeight]] = {}
    for name, record in result.records.items():
        if name.startswith(start) and name not in linears:
            plain.setdefault(f"{sites[name].module}.{sites[name].parameter}", {})[name] = record
    for parameter, records in plain.items():  # of a linear one, of fused experts one each
        if all(map(_is_plain, records.values())):
            tensors[parameter] = _filled(tensors[parameter], {sites[name]: record for name, record in records.items()})
        else:
            linears |= records
            tensors.pop(parameter)
    writer.write_part(part, shards_of(tensors, linears), linears, {"layers": [], **(extra or {})})


def _filled(parameter: Tensor, records: Mapping[Site, StoredWeight]) -> Tensor:
    """The parameter with the matrices of plain records in it."""
    filled = parameter.clone()
    for site, record in records.items():
        site.read(filled).copy_(record.base.dense(filled.dtype))
    return filled


def _is_plain(record: StoredWeight) -> bool:
    return isinstance(record.base, DenseWeight) and record == StoredWeight(record.base)


def audited(parent: Artifact, writer: ArtifactWriter, address: str, codes_move: bool) -> None:
    """QualityError when a record, read back from disk, has lost its mask, its grid or (unless `codes_move`) its codes."""
    parts = {name: part for part, marker in writer.finished.items() for name in marker["linears"]}
    for name in parent.linears:
        after = {name: writer.stored(parts[name], name)} if name in parts else {}
        problems = audit({name: parent.stored(name)}, after, codes_move)
        if problems:
            raise QualityError(f"{address}: the audit after training failed: {problems[0]}; nothing was kept, please report it")
