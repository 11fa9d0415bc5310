"""Artifacts: immutable directories of safetensors shards with a manifest, written under a scratch name and then renamed.

Knows files, hashes and records; not what a stage does. Nothing here is pickled. A tensor has the name that the model in memory
gives it; a compressed linear `L` stores the tensors of its record as `L.base.codes`, `L.low_rank.up`, … Extra modules
(bottlenecks, virtual tokens) have parts of their own, which every later artifact takes over.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ...compress.sharing import SHARED, holder_of, own_tensors, settled
from ...compress.weights import StoredWeight, describe, from_tensors
from ...recover.extra_modules import ExtraModules, extra_modules_of
from ..errors import InputError
from ..ranks.exchange import ONE, Ranks
from .files import disk_errors, link, read_json, sha256, sync, write_bytes, write_json
from .manifest import MANIFEST, SCHEMA, read_manifest, verify_files, weights_of

ADAPTER = "adapter-"
"""Begins the names of parts that hold a recovery stage's extra modules: adapter-00, adapter-01, …"""


@dataclass(frozen=True)
class Artifact:
    """An artifact opened for reading. `weights` is where its shards lie."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def key(self) -> str:
        return self.manifest["key"]

    @property
    def weights(self) -> Path:
        return weights_of(self.directory, self.manifest)

    @property
    def linears(self) -> dict[str, Any]:
        """Module name → description of its record, for every compressed linear."""
        return self.manifest["linears"]

    @cached_property
    def index(self) -> dict[str, str]:
        """Name of a tensor of the model → shard file name, from the shards' own headers."""
        out: dict[str, str] = {}
        for name in self.manifest["files"]:
            if name.endswith(".safetensors") and not name.startswith(ADAPTER):
                with self._open(name) as shard:
                    out |= dict.fromkeys(shard.keys(), name)
        return out

    def _open(self, name: str) -> Any:
        path = self.weights / name
        try:
            return safetensors.safe_open(path, framework="pt")
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(
                f"{path}: not a readable safetensors file ({error}); restore it or delete its directory and run again"
            ) from error

    def shape(self, name: str) -> list[int]:
        with self._open(self.index[name]) as shard:
            return shard.get_slice(name).get_shape()

    def stored_bytes(self, name: str) -> int:
        """Of one tensor's data, which is not read."""
        with self._open(self.index[name]) as shard:
            result = shard.get_slice(name)
            return math.prod(result.get_shape()) * result[:0].element_size()

    def tensor(self, name: str) -> Tensor:
        """A fresh, aligned copy, so that arithmetic does not depend on where in a file a tensor lay."""
        with self._open(self.index[name]) as shard:
            return shard.get_tensor(name).clone()

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose name begins with `prefix`, each shard opened once."""
        wanted: dict[str, list[str]] = {}
        for name, file in self.index.items():
            if name.startswith(prefix):
                wanted.setdefault(file, []).append(name)
        out: dict[str, Tensor] = {}
        for file, names in wanted.items():
            with self._open(file) as shard:
                out |= {name: shard.get_tensor(name).clone() for name in names}
        return out

    def is_plain(self, name: str) -> bool:
        """Whether a tensor of the index lies outside all records. The bias of a compressed linear does: it is stored as it was."""
        parts = name.split(".")
        return name.endswith(".bias") or not any(".".join(parts[:end]) in self.linears for end in range(1, len(parts)))

    def plain(self, prefix: str) -> dict[str, Tensor]:
        """The tensors outside records whose name begins with `prefix`."""
        return {name: tensor for name, tensor in self.tensors(prefix).items() if self.is_plain(name)}

    def stored(self, linear: str) -> StoredWeight:
        """The record of a compressed linear."""
        return record_of(self, linear, self.tensors)

    @cached_property
    def extra_modules(self) -> list[ExtraModules]:
        """Bottlenecks and virtual tokens of recovery stages, in the order in which they were trained."""
        out = []
        for part, description in sorted(self.manifest.get("beside", {}).items()):
            file = f"{part}.tensors.safetensors"
            with self._open(file) as shard:
                tensors = {name: shard.get_tensor(name).clone() for name in shard.keys()}  # noqa: SIM118
            try:
                out.append(extra_modules_of(description, tensors))
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{self.directory / file}: {error}; the artifact does not match its manifest") from error
        return out

    def total_bytes(self) -> int:
        """Bytes of all weight shards."""
        return sum(entry["bytes"] for name, entry in self.manifest["files"].items() if name.endswith(".safetensors"))

    def verify(self, full: bool = False) -> None:
        """As the function, of this artifact's files."""
        verify_files(self.directory, self.manifest, full)


def open_artifact(directory: Path) -> Artifact:
    """InputError as `read_manifest`."""
    return Artifact(directory, read_manifest(directory))


@dataclass
class ArtifactWriter:
    """Fills a scratch directory part by part; a part (one decoder block, or `rest`, all else) is finished once its marker is there.

    A shard whose bytes equal the parent's shard of that name becomes a hard link to it. Several `ranks` have a writer each for one directory:
    rank 0 writes, what the others hand in is not looked at, and a part that has been written is finished on all. To seal is rank 0's alone.
    """

    scratch: Path
    parent: Artifact | None
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)
    ranks: Ranks = ONE

    def __post_init__(self) -> None:
        if self.ranks.leads:
            with disk_errors(self.scratch):
                self.scratch.mkdir(parents=True, exist_ok=True)
            for marker in sorted(self.scratch.glob("*.part.json")):
                part = _read_marker(marker, self.scratch)
                if part is not None:
                    self.finished[marker.name.removesuffix(".part.json")] = part
        self.finished = self.ranks.broadcast(self.finished)

    def write_part(
        self,
        part: str,
        shards: Mapping[str, Mapping[str, Tensor]],
        linears: Mapping[str, StoredWeight],
        extra: Mapping[str, object] | None = None,
    ) -> None:
        """Write the shards (suffix → tensors) of one part, records included, then its marker; `extra` is kept in the marker."""
        marker = self._written(part, shards, linears, extra) if self.ranks.leads else None
        self.finished[part] = self.ranks.broadcast(marker)

    def _written(
        self,
        part: str,
        shards: Mapping[str, Mapping[str, Tensor]],
        linears: Mapping[str, StoredWeight],
        extra: Mapping[str, object] | None,
    ) -> dict[str, Any]:
        linears, files = settled(linears), {}
        for suffix, tensors in shards.items():
            if tensors:
                name = f"{part}.{suffix}.safetensors"
                files[name] = self._write_shard(name, tensors)
        marker = {"files": files, "linears": {n: describe(s) for n, s in linears.items()}, "extra": dict(extra or {})}
        write_json(self.scratch / f"{part}.part.json", marker)
        return marker

    def _write_shard(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, object]:
        data = safetensors.torch.save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, metadata={"format": "pt"})
        entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        target = self.scratch / name
        if self.parent is not None and self.parent.manifest["files"].get(name) == entry:
            link(self.parent.weights / name, target)
        else:
            write_bytes(target, data)
        return entry

    def copy_part(self, part: str) -> None:
        """Take a part over from the parent unchanged, shards hard-linked."""
        self.finished[part] = self.ranks.broadcast(self._copied(part) if self.ranks.leads else None)

    def _copied(self, part: str) -> dict[str, Any]:
        assert self.parent is not None
        files = {n: e for n, e in self.parent.manifest["files"].items() if n.startswith(f"{part}.") and n.endswith(".safetensors")}
        for name in files:
            link(self.parent.weights / name, self.scratch / name)
        linears = {n: d for n, d in self.parent.linears.items() if self.parent.manifest["parts"].get(n) == part}
        stored = self.parent.manifest.get("beside", {})
        marker = {"files": files, "linears": linears, "extra": {"beside": stored[part]} if part in stored else {}}
        write_json(self.scratch / f"{part}.part.json", marker)
        return marker

    def write_extra_modules(self, extra: ExtraModules) -> None:
        """One more adapter, after those of the parent."""
        part = f"{ADAPTER}{len(self._parents_extra_parts()):02d}"
        self.write_part(part, {"tensors": extra.tensors}, {}, {"beside": extra.describe()})

    def _parents_extra_parts(self) -> list[str]:
        return [] if self.parent is None else sorted(self.parent.manifest.get("beside", {}))

    def view(self, part: str) -> Artifact:
        """A finished part as it lies on disk, to be read like an artifact that holds nothing else."""
        marker = self.finished[part]
        return Artifact(self.scratch, {"key": part, "files": marker["files"], "linears": marker["linears"]})

    def stored(self, part: str, linear: str) -> StoredWeight:
        """The record of a finished part as it lies on disk."""

        def tensors(prefix: str) -> dict[str, Tensor]:
            out: dict[str, Tensor] = {}
            for name in self.finished[part]["files"]:
                with safetensors.safe_open(self.scratch / name, framework="pt") as shard:
                    out |= {n: shard.get_tensor(n).clone() for n in shard.keys() if n.startswith(prefix)}  # noqa: SIM118
            return out

        return _record(self.finished[part]["linears"][linear], linear, tensors)

    def seal(self, final: Path, manifest: Mapping[str, object], documents: Mapping[str, bytes]) -> Artifact:
        """Write the manifest, remove the markers, rename scratch → final. `documents` are config and tokenizer files. The parent's
        extra modules are taken over."""
        for part in self._parents_extra_parts():
            if part not in self.finished:
                self.finished[part] = self._copied(part)
        extra = {part: marker["extra"]["beside"] for part, marker in self.finished.items() if "beside" in marker["extra"]}
        files: dict[str, object] = {}
        linears: dict[str, object] = {}
        parts: dict[str, str] = {}
        for part, marker in sorted(self.finished.items()):
            files |= marker["files"]
            linears |= marker["linears"]
            parts |= dict.fromkeys(marker["linears"], part)
        for name, data in documents.items():
            write_bytes(self.scratch / name, data)
            files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        described = {"files": files, "linears": linears, "parts": parts, "beside": extra}
        write_json(self.scratch / MANIFEST, {"schema": SCHEMA, **manifest, **described})
        return settle(self.scratch, final)


def settle(scratch: Path, final: Path) -> Artifact:
    """The end of `seal`, which may be repeated: a scratch directory that has its manifest has everything else."""
    files = read_json(scratch / MANIFEST)["files"]
    for stray in scratch.iterdir():
        if stray.name not in files and stray.name != MANIFEST:
            stray.unlink() if stray.is_file() else shutil.rmtree(stray)
    sync(scratch)
    os.rename(scratch, final)
    sync(final.parent)
    return open_artifact(final)


def record_of(artifact: Artifact, linear: str, tensors: Callable[[str], Mapping[str, Tensor]]) -> StoredWeight:
    """The record of a compressed linear from `tensors`, which gives those whose names begin with a prefix."""
    try:
        return _record(artifact.linears[linear], linear, tensors)
    except (KeyError, ValueError) as error:
        raise InputError(f"{artifact.directory}: {linear}: {error}; the artifact does not match its manifest") from error


def _record(description: Mapping[str, object], linear: str, tensors: Callable[[str], Mapping[str, Tensor]]) -> StoredWeight:
    """A record from its description and the tensors whose names begin with a prefix; a shared factor lies with its holder."""
    result = {name.removeprefix(f"{linear}."): tensor for name, tensor in tensors(f"{linear}.").items()}
    holder = holder_of(description)
    if holder is not None:
        result |= {name.removeprefix(f"{holder}."): tensor for name, tensor in tensors(f"{holder}.{SHARED}").items()}
    return from_tensors(description, result)


def shards_of(tensors: Mapping[str, Tensor], linears: Mapping[str, StoredWeight]) -> dict[str, dict[str, Tensor]]:
    """Split a part into `matrices` (codes, masks, dense matrices: what later stages leave alone) and `vectors` (norms, biases,
    scales, zeros, factors: what recovery trains), so that a recovered model shares the former with its parent."""
    matrices: dict[str, Tensor] = {}
    vectors: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        (matrices if tensor.ndim > 1 else vectors)[name] = tensor
    for linear, stored in settled(linears).items():
        for name, tensor in own_tensors(stored).items():
            frozen = name in ("base.codes", "base.weight", "mask", "base.group_index", "base.small_codes")
            (matrices if frozen else vectors)[f"{linear}.{name}"] = tensor
    return {"matrices": matrices, "vectors": vectors}


def _read_marker(marker: Path, directory: Path) -> dict[str, Any] | None:
    """A part's marker, or None when it or one of its shards is not whole (the part is then written again)."""
    try:
        part = read_json(marker)
        files = part["files"].items()
    except (InputError, KeyError, AttributeError):  # torn: not JSON, not what was written, or not all of it
        return None
    for name, entry in files:
        file = directory / name
        if not file.is_file() or file.stat().st_size != entry["bytes"] or sha256(file) != entry["sha256"]:
            return None
    return part
