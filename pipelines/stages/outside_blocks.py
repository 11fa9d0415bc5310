"""What lies outside the decoder blocks: embeddings, last norm and head, as they are or, when asked, compressed. Tied weights stay tied.

Knows the model's structure and the stage's settings; the maths is `compress/`.
"""

from collections.abc import Callable
from typing import Any

from ...compress.rounding import rtn
from ...compress.statistics import SAMPLES, InputStatistics, LayerStatistics
from ...compress.weights import StoredWeight
from ..models.structure import Site, shared_names, tied_names
from ..store.artifact import shards_of
from .matrices import Stage, current, described, solve, target


def write_rest(stage: Stage, head: list[Site], statistics_of: Callable[[Site], InputStatistics]) -> None:
    """The last part of the artifact. `head`: the output head, when it is to be compressed."""
    if "rest" not in stage.writer.finished:
        records, layers = _records(stage, head, statistics_of)
        tied = tied_names(stage.model.model)
        replaced = {tied.get(f"{n}.weight", f"{n}.weight") for n in records}
        blocks = f"{stage.model.structure.prefix}."
        wanted = [n for n in stage.model.model.state_dict() if not n.startswith(blocks) and n not in tied and n not in replaced]
        tensors = {n: stage.parent.tensor(n) for n in wanted}
        stage.writer.write_part("rest", {"tensors": tensors, **shards_of({}, records)}, records, {"layers": layers})
    stage.layers += stage.writer.finished["rest"]["extra"].get("layers", [])


def _records(
    stage: Stage, head: list[Site], statistics_of: Callable[[Site], InputStatistics]
) -> tuple[dict[str, StoredWeight], list[dict[str, Any]]]:
    """The parent's records outside the blocks, and the new ones, of which each replaces what held the same matrix."""
    blocks = f"{stage.model.structure.prefix}."
    records = {n: stage.parent.stored(n) for n in stage.parent.linears if not n.startswith(blocks)}
    layers = []
    nearest = rounded(stage, head)
    for site in [*head, *nearest]:
        made, layer = _rounded(stage, site) if site in nearest else solve(stage, site, {site.name: statistics_of(site)})
        for name in shared_names(stage.model.model, f"{site.module}.weight"):
            records.pop(name.removesuffix(".weight"), None)
        records[site.name] = made
        layers.append(layer)
    return records, layers


def embeddings(stage: Stage, head: list[Site]) -> list[Site]:
    """The token embeddings, when they are to be rounded: not where they are one matrix with a head that is compressed already."""
    site = stage.model.structure.embeddings
    if site is None or not stage.spec.include_embeddings or stage.spec.skips(site.name):
        return []
    shared = shared_names(stage.model.model, f"{site.module}.weight")
    return [] if any(f"{other.module}.weight" in shared for other in head) else [site]


def rounded(stage: Stage, head: list[Site]) -> list[Site]:
    """What is rounded to nearest: the embeddings, when asked, and a head of its own, where `head_bits` says to how many bits."""
    found, spec = embeddings(stage, head), stage.spec
    if spec.head_bits is None:
        return found
    shared = {name for site in found for name in shared_names(stage.model.model, f"{site.module}.weight")}
    others = [s for s in stage.model.structure.sites if s.block is None and s not in head and not spec.skips(s.name)]
    return [*found, *(s for s in others if f"{s.module}.weight" not in shared)]


def said_of_rest(stage: Stage, head: list[Site]) -> list[str]:
    """Notes on what lies outside the blocks: what was left alone, and what is one matrix with something that was not."""
    spec, table = stage.spec, stage.model.structure.embeddings
    heads = [s for s in stage.model.structure.sites if s.block is None]
    shared = table is not None and any(f"{s.module}.weight" in shared_names(stage.model.model, f"{table.module}.weight") for s in heads)
    nearest = rounded(stage, head)
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


def _rounded(stage: Stage, site: Site) -> tuple[StoredWeight, dict[str, Any]]:
    """Rounded to nearest. An embedding's rows are looked up, not multiplied, so there are no inputs to weigh an error by: its output's error
    is that of the rows that the text looks up; a head's is not measured."""
    target_OI, table = target(stage, site), site.kind == "embedding"
    none = InputStatistics(site.shape[1], frozenset())
    config = stage.spec.embedding_config(site.shape[1], None if table else stage.spec.head_bits)
    record, metrics = rtn(current(stage, site).to(stage.context.device), target_OI, LayerStatistics(none), config)
    layer = described(site, record, target_OI, None, metrics)
    if not table:
        return record, layer | {"output_error": None}
    ids_T = stage.calibration().flatten()[:SAMPLES].to(target_OI.device)
    wanted_TD = target_OI[ids_T]
    lost, whole = ((m.double().square().sum()) for m in (wanted_TD - record.dense()[ids_T], wanted_TD))
    return record, layer | {"output_error": float(lost / whole) if whole > 0 else 0.0}
