"""Weights outside the decoder blocks: embeddings, last norm and head, unchanged or, if set, compressed. Tied weights stay tied.

Knows the model's structure and the stage's settings; the maths is `compress/`.
"""

from collections.abc import Callable
from typing import Any

from ...compress.ranges import Bits
from ...compress.rounding import rtn
from ...compress.statistics import SAMPLES, InputStatistics, LayerStatistics
from ...compress.weights import StoredWeight
from ..models.sizes import rounded_to_nearest
from ..models.structure import Site, is_tied, shared_names, tied_names
from ..store.artifact import shards_of
from .matrices import Stage, current, described, target
from .shared_inputs import Solved, solve_all


def write_rest(stage: Stage, head: list[Site], statistics_of: Callable[[Site], InputStatistics]) -> list[dict[str, Any]]:
    """The last part of the artifact, which rank 0 writes, and its matrices' rows of the report. `head`: the output head, when it is to be compressed."""
    if "rest" in stage.writer.finished:
        return stage.writer.finished["rest"]["extra"].get("layers", [])
    solved = solve_all(stage, head, {site.name: statistics_of(site) for site in head}) if head else ({}, {})
    if not stage.context.ranks.leads:
        stage.writer.write_part("rest", {}, {})
    else:
        records, layers = _records(stage, head, solved)
        tied = tied_names(stage.model.model)
        replaced = {tied.get(f"{n}.weight", f"{n}.weight") for n in records}
        blocks = f"{stage.model.structure.prefix}."
        wanted = [n for n in stage.model.model.state_dict() if not n.startswith(blocks) and n not in tied and n not in replaced]
        tensors = {n: stage.parent.tensor(n) for n in wanted}
        stage.writer.write_part("rest", {"tensors": tensors, **shards_of({}, records)}, records, {"layers": layers})
    return stage.writer.finished["rest"]["extra"].get("layers", [])


def _records(
    stage: Stage, head: list[Site], solved: Solved
) -> tuple[dict[str, StoredWeight], list[dict[str, Any]]]:
    """The parent's records outside the blocks, and the new ones, of which each replaces what held the same matrix."""
    blocks = f"{stage.model.structure.prefix}."
    records = {n: stage.parent.stored(n) for n in stage.parent.linears if not n.startswith(blocks)}
    layers = []
    structure = stage.model.structure
    nearest = {s: getattr(stage.spec, key) for key, s in rounded_to_nearest(stage.spec, structure, is_tied(stage.model.model, structure)).items()}
    for site in [*head, *nearest]:
        made, layer = _rounded(stage, site, nearest[site]) if site in nearest else (solved[0][site.name], solved[1][site.name])
        for name in shared_names(stage.model.model, f"{site.module}.weight"):
            records.pop(name.removesuffix(".weight"), None)
        records[site.name] = made
        layers.append(layer)
    return records, layers


def outside_notes(stage: Stage, head: list[Site]) -> list[str]:
    """Notes on what lies outside the blocks: what was left alone, and what is one matrix with something that was not."""
    spec, structure = stage.spec, stage.model.structure
    table, heads, shared = structure.embeddings, [s for s in structure.sites if s.block is None], is_tied(stage.model.model, structure)
    nearest = list(rounded_to_nearest(spec, structure, shared).values())
    of_table = table in nearest
    notes = []
    for site in heads:
        if site in nearest:
            notes.append(f"{site.name} is rounded to {spec.head_bits} bits")
        elif site not in head and not (of_table and shared):
            notes.append(f"left alone: {site.name} (the output head stays as it is unless include_head or head_bits is set)")
        elif site not in head and table is not None:
            notes.append(f"{site.name} is one matrix with {table.name}: both are rounded to {spec.embedding_bits} bits")
        elif spec.include_embeddings and shared and table is not None:
            notes.append(f"{table.name} is one matrix with {site.name}, which {spec.method} compressed: embedding_bits does not count")
    if table is not None and spec.name == "quantize" and not of_table and not (shared and (head or nearest)):
        notes.append(f"left alone: {table.name} (token embeddings stay as they are unless include_embeddings is set)")
    return notes


def _rounded(stage: Stage, site: Site, bits: Bits) -> tuple[StoredWeight, dict[str, Any]]:
    """Rounded to nearest. An embedding's rows are looked up, not multiplied, so there are no inputs to weigh an error by: its output's error
    is that of the rows that the text looks up; a head's is not measured."""
    target_OI, table = target(stage, site), site.kind == "embedding"
    none = InputStatistics(site.shape[1], frozenset())
    config = stage.spec.embedding_config(site.shape[1], bits)
    record, metrics = rtn(current(stage, site).to(stage.context.device), target_OI, LayerStatistics(none), config)
    layer = described(site, record, target_OI, None, metrics)
    if not table:
        return record, layer | {"output_error": None}
    ids_T = stage.calibration().flatten()[:SAMPLES].to(target_OI.device)
    wanted_TD = target_OI[ids_T]
    lost, whole = ((m.double().square().sum()) for m in (wanted_TD - record.dense()[ids_T], wanted_TD))
    return record, layer | {"output_error": float(lost / whole) if whole > 0 else 0.0}
