"""`pipeline export`: a stage's artifact as a checkpoint that other programs load, read back and measured after writing.

Knows artifacts and checkpoints; the bytes of a format are `formats/`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...compress.weights import GgmlWeight, NormalFloatWeight, UniformWeight
from .. import formats
from ..demo import imported
from ..devices.environment import compute_of
from ..errors import InputError, QualityError, UsageError
from ..evaluation import measure, perplexity
from ..formats.checkpoint import Checkpoint, Lazy, dtype_of
from ..formats.gguf_files import adapter_path
from ..formats.readers import Exported, for_the_others, known_readers
from ..formats.shards import COUNTED, counted_bytes
from ..models.source import load_config
from ..models.structure import inspect, skeleton, tied_names
from ..recipes.recipe import Recipe, resolve
from ..run.ledger import record
from ..run.opening import last_artifact
from ..stages.baseline import artifact_of, build_baseline, fingerprint
from ..stages.inputs import Inputs
from ..store.artifact import Artifact
from ..store.files import scratch_directory
from ..store.manifest import FOR_TRANSFORMERS
from ..store.rundir import RunDirectory, refuse_inside_run
from .audit import write_audited
from .merging import merged, requantized

TOLERANCE = 1e-3
"""Largest relative difference between the artifact's perplexity and its export's; formats round factors and scales to 16 bits."""


def export(
    directory: Path,
    format_: str,
    output: Path,
    *,
    stage: str | None = None,
    merge: bool = False,
    requantize: bool = False,
    adapter: bool = False,
) -> dict[str, Any]:
    """Write, read back, measure; with `adapter` a low-rank term or virtual tokens stay apart from their base. UsageError for what the format
    cannot carry, QualityError when the export does not measure the same."""
    place = RunDirectory(directory.resolve())
    refuse_inside_run(output)
    artifact = _verified(directory, stage)
    recipe = resolve(place.checked_recipe(), file=None, sets=[], options={})
    with _prepared(directory, artifact, recipe, format_, merge, requantize, adapter) as (checkpoint, exported, notes):
        notes = [*notes, *write_audited(format_, checkpoint, output, adapter)]
    compute = compute_of(place, "auto", recipe.dtype, recipe.deterministic)
    before = _known_perplexity(directory, artifact)
    if (
        before is not None and compute.dtype != torch.float32
    ):  # two computations of one model in short floats differ by more than a format may
        before = _perplexity(artifact, recipe, compute.device)
    if formats.FORMATS[format_].whole:
        after = _measure_whole(format_, output, checkpoint, artifact, recipe, compute.device)
    else:
        after = _measure(output, recipe, compute.device)
    if before is not None and not (merge and requantize) and abs(after / before - 1) > TOLERANCE:
        raise QualityError(
            f"{output}: reads back with perplexity {after:.4f}, the artifact has {before:.4f}; do not use it, and report this"
        )
    files = [f for f in (output, adapter_path(output)) if f.is_file()] or [*output.rglob("*.safetensors"), *output.glob("*.gguf")]
    size = sum(f.stat().st_size for f in files)
    return {
        "directory": str(output),
        "format": format_,
        "stage": artifact.manifest["stage"]["name"],
        "total_bytes": size,
        "perplexity": after,
        "artifact_perplexity": before,
        "read_by": known_readers(exported),
        "notes": notes,
    }


def predict(
    directory: Path, format_: str, *, stage: str | None = None, merge: bool = False, requantize: bool = False, adapter: bool = False
) -> dict[str, Any]:
    """What `export` would write: every matrix is packed, which shows all refusals, and only counted; nothing is measured. Who reads it, and
    what would have to change for the others."""
    place = RunDirectory(directory.resolve())
    artifact = _verified(directory, stage)
    recipe = resolve(place.checked_recipe(), file=None, sets=[], options={})
    with (
        _prepared(directory, artifact, recipe, format_, merge, requantize, adapter) as (checkpoint, exported, notes),
        scratch_directory() as scratch,
    ):
        counted = scratch / "export"
        notes = [*notes, *formats.write(format_, checkpoint, counted, adapter, shard_bytes=COUNTED)]
        size = counted_bytes(counted)
    apart = bool(artifact.extra_modules) or any("low_rank" in description for description in artifact.linears.values())
    return {
        "format": format_,
        "stage": artifact.manifest["stage"]["name"],
        "total_bytes": size,
        "read_by": known_readers(exported),
        "changes_for_others": for_the_others(exported, apart),
        "notes": notes,
    }


def _verified(directory: Path, stage: str | None) -> Artifact:
    artifact = last_artifact(directory, stage)
    artifact.verify()
    return artifact


@contextmanager
def _prepared(
    directory: Path, artifact: Artifact, recipe: Recipe, format_: str, merge: bool, requantize: bool, adapter: bool
) -> Iterator[tuple[Checkpoint, Exported, list[str]]]:
    """The checkpoint to be written, its card filled in, what decides who reads it, and the notes."""
    if format_ not in formats.FORMATS:
        raise UsageError(f"unknown format {format_!r}; known are {', '.join(formats.FORMATS)}")
    whole = formats.FORMATS[format_].whole
    remarks = [] if whole else _embeddings_made_dense(artifact)
    card = _card(directory, artifact, remarks)
    with requantized(artifact, recipe) if merge and requantize else nullcontext((artifact, [])) as (source, notes):
        checkpoint, descriptions = checkpoint_of(source, card, whole), list(source.linears.values())
        if merge and not requantize and format_ != "dense":  # a dense weight takes every term in
            checkpoint = merged(checkpoint, source)
            descriptions = [{name: part for name, part in entire.items() if name != "low_rank"} for entire in descriptions]
        exported = Exported.of(format_, adapter, checkpoint.config.get("model_type", ""), descriptions)
        yield replace(checkpoint, card={**card, "read_by": known_readers(exported)}), exported, [*remarks, *notes]


def checkpoint_of(artifact: Artifact, card: Mapping[str, object], embeddings: bool = False) -> Checkpoint:
    """An artifact as every format sees it: rounded embeddings become the dense table that any program can look rows up in, unless the format has
    a place for their codes (`embeddings`)."""
    config = json.loads((artifact.directory / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in FOR_TRANSFORMERS}
    model = skeleton(load_config(artifact.directory))
    structure = inspect(model, include_head=True)
    tied = tied_names(model)
    of_records = {f"{s.module}.{s.parameter}" for s in structure.sites if s.name in artifact.linears}
    table = structure.embeddings.name if structure.embeddings is not None else None
    tensors: dict[str, Callable[[], Tensor]] = {
        n: partial(artifact.tensor, n) for n in artifact.index if artifact.is_plain(n) and not {n} & (of_records | tied.keys())
    }
    if table is not None and table in artifact.linears and not embeddings:
        tensors[f"{table}.weight"] = lambda: artifact.stored(table).dense(dtype_of(config))
    return Checkpoint(
        config=config,
        linears=Lazy({n: partial(artifact.stored, n) for n in artifact.linears if embeddings or n != table}),
        tensors=Lazy(tensors),
        files=artifact.directory,
        transposed=frozenset(s.module if s.expert is None else f"{s.module}.{s.parameter}" for s in structure.sites if s.transposed),
        tied=tied,
        card=card,
        extra_modules=tuple(artifact.extra_modules),
    )


def _embeddings_made_dense(artifact: Artifact) -> list[str]:
    """The note on token embeddings that the artifact holds on a grid."""
    table = inspect(skeleton(load_config(artifact.directory))).embeddings
    if table is None or table.name not in artifact.linears:
        return []
    base = artifact.stored(table.name).base
    bits = f"{base.bits} bits" if isinstance(base, UniformWeight | NormalFloatWeight | GgmlWeight) else "floating point"
    return [f"{table.name}: rounded to {bits} in the artifact, written densely here; no format has a place for the codes of an embedding"]


def _card(directory: Path, artifact: Artifact, remarks: list[str]) -> dict[str, Any]:
    """What the model card says."""
    made = record(directory)
    name = artifact.manifest["stage"]["name"]
    stage = next((s for s in made.stages if s.stage == name), None)
    done = [s for s in made.stages if stage is None or made.stages.index(s) <= made.stages.index(stage)]
    steps = [f"{s.method} {bits} bits" if (bits := s.settings.get("bits")) else str(s.method) for s in done[1:] if s.method != "bind"]
    return {
        "title": f"{_model_name(made.model)}: {' → '.join(steps)}" if steps else _model_name(made.model),
        "recipe": [{s.stage: dict(s.settings)} for s in done[1:]],
        "perplexity": stage.perplexity if stage else None,
        "baseline_perplexity": made.stages[0].perplexity,
        "protocol": made.protocol.to_json(),
        "notes": [*(stage.notes if stage else []), *remarks],
    }


def _model_name(model: str) -> str:
    """What people call the model: the demo's own name, a Hub id as it is, of a path its last part."""
    if model == "demo":
        return imported.NAME
    path = Path(model)
    return (path.stem if path.suffix == ".gguf" else path.name) if path.is_absolute() else model


def _known_perplexity(directory: Path, artifact: Artifact) -> float | None:
    name = artifact.manifest["stage"]["name"]
    return next((s.perplexity for s in record(directory).stages if s.stage == name), None)


def _measure(output: Path, recipe: Recipe, device: torch.device) -> float:
    """Perplexity of what was written, opened as any model would be, under the run's protocol."""
    with scratch_directory() as place:
        manifest = {"key": fingerprint(output), "parent": None, "stage": {"name": "baseline", "method": None, "settings": {}}}
        result = _perplexity(build_baseline(output, place / "a.partial", place / "a", manifest), recipe, device)
    if result is None:
        raise InputError(f"{output}: nothing to measure it on")
    return result


def _measure_whole(format_: str, output: Path, written: Checkpoint, artifact: Artifact, recipe: Recipe, device: torch.device) -> float:
    """The same of a format that is read by the config of what was written."""
    with scratch_directory() as place:
        manifest = {"key": "export", "parent": None, "stage": {"name": "baseline", "method": None, "settings": {}}}
        read = formats.read_back(format_, output, written)
        result = _perplexity(artifact_of(read, artifact.directory, place / "a.partial", place / "a", manifest), recipe, device)
    if result is None:
        raise InputError(f"{output}: nothing to measure it on")
    return result


def _perplexity(artifact: Artifact, recipe: Recipe, device: torch.device) -> float | None:
    """In float32, whatever the run computes in, so that what a format loses stands out."""
    windows = Inputs(recipe, artifact.directory).evaluation()
    with scratch_directory() as scratch:
        forward = measure.ForwardPass(device, torch.float32)
        scores, _ = measure.scores_of(artifact, scratch, {"": windows}, None, forward, "export: perplexity, blocks")[""]
    return scores.perplexity if scores.nll else None


__all__ = ["checkpoint_of", "export", "perplexity"]
