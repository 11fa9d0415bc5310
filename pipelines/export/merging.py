"""`pipeline export --merge`: low-rank terms and deltas are merged into their base, exactly, or (with --requantize) by quantizing the sum again.

Knows artifacts and stages; when a merge is exact is `recover/merge`'s business.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from ...compress.weights import DenseWeight, StoredWeight
from ...recover.merge import audit, merge, merge_refusal
from ..errors import QualityError, UsageError
from ..formats.checkpoint import Checkpoint, Lazy
from ..recipes import recipe as recipes
from ..recipes.stage_settings import StageSpec
from ..stages import Context
from ..stages.compress import compress
from ..stages.inputs import Inputs
from ..store.artifact import Artifact, ArtifactWriter, shards_of
from ..store.files import scratch_directory


def merged(checkpoint: Checkpoint, artifact: Artifact) -> Checkpoint:
    """Every record merged where that is exact. UsageError names the first layer that refuses, before anything is written."""
    for name in artifact.linears:
        reason = merge_refusal(artifact.stored(name))
        if reason is not None:
            raise UsageError(
                f"{name}: {reason}; --adapter writes base and adapter, --format dense one model, --requantize quantizes the sum again: see what it costs"
            )
    return checkpoint.with_linears(Lazy({n: lambda n=n: _audited(n, artifact.stored(n)) for n in artifact.linears}))


def _audited(name: str, record: StoredWeight) -> StoredWeight:
    """The record merged. QualityError when mask, grid or codes are not what they were."""
    made = merge(record)
    problems = audit({name: record}, {name: made})
    if problems:
        raise QualityError(f"--merge: {problems[0]}; nothing was written, please report it")
    return made


@contextmanager
def requantized(artifact: Artifact, chosen: recipes.Recipe) -> Iterator[tuple[Artifact, list[str]]]:
    """The merged weights quantized again with GPTQ against the run's calibration text, on the grid of the run's quantize stage.

    A mask is kept: what the low-rank term adds under it is dropped, and counts as loss. QualityError when the audit finds a changed mask.
    """
    spec = next((s for s in chosen.stages if s.name == "quantize"), None)
    if spec is None:
        raise UsageError("--requantize: the recipe has no quantize stage whose grid could be used; leave it out")
    known = ("bits", "group_size", "symmetric", "grid")
    overrides = {pattern: {k: v for k, v in fields.items() if k in known} for pattern, fields in spec.overrides.items()}
    settings = {k: getattr(spec.config, k) for k in known if hasattr(spec.config, k)}
    again = StageSpec(
        "quantize", "quantize", "gptq", recipes.methods("quantize")["gptq"].config(**settings), spec.ignore, overrides=overrides
    )
    with scratch_directory() as place:
        dense = _dense_artifact(artifact, place)
        inputs = Inputs(chosen, artifact.directory)
        context = Context(
            dense, dense, place, place, place / "q.partial", torch.device("cpu"), torch.float32, chosen.seed, inputs, lambda: False
        )
        writer = ArtifactWriter(place / "q.partial", dense)
        compress(dense, writer, again, context)
        made = writer.seal(place / "q", artifact.manifest | {"key": "requantized"}, _documents(artifact))
        problems = [p for n in made.linears for p in audit({n: dense.stored(n)}, {n: made.stored(n)}, True) if "mask" in p]
        if problems:
            raise QualityError(f"--requantize: {problems[0]}; nothing was written")
        yield (
            made,
            [f"merged and quantized again with GPTQ ({json.dumps(settings)}): compare its perplexity with the artifact's"],
        )


def _dense_artifact(artifact: Artifact, place: Path) -> Artifact:
    """The same model with every record's effective weight, under its mask, as a dense record."""
    writer = ArtifactWriter(place / "d.partial", None)
    parts: dict[str, list[str]] = {}
    for name, part in artifact.manifest["parts"].items():
        parts.setdefault(part, []).append(name)
    for part in sorted({n.split(".")[0] for n in artifact.manifest["files"] if n.endswith(".safetensors")}):
        records = {n: _effective(artifact.stored(n)) for n in parts.get(part, [])}
        files = [n for n in artifact.manifest["files"] if n.startswith(f"{part}.")]
        names = [n for n, file in artifact.index.items() if file in files]
        plain = {n: artifact.tensor(n) for n in names if n.endswith(".bias") or not any(n.startswith(f"{r}.") for r in records)}
        writer.write_part(part, shards_of(plain, records), records)
    return writer.seal(place / "d", artifact.manifest | {"key": "merged"}, _documents(artifact))


def _effective(record: StoredWeight) -> StoredWeight:
    weight, mask = record.dense(), record.mask_OI()
    return replace(StoredWeight(DenseWeight(weight if mask is None else weight.where(mask, 0))), mask=record.mask)


def _documents(artifact: Artifact) -> dict[str, bytes]:
    return {n: (artifact.directory / n).read_bytes() for n in artifact.manifest["files"] if not n.endswith(".safetensors")}
