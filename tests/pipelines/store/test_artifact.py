"""Artifacts: whole or not there, linked to their parents, checked when read."""

import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.grids import UniformGrid
from bitmend.compress.rounding import round_uniform
from bitmend.compress.weights import DenseWeight, StoredWeight
from bitmend.pipelines.errors import InputError, OutOfMemoryError
from bitmend.pipelines.stages.baseline import build_baseline, fingerprint
from bitmend.pipelines.store import artifact
from bitmend.pipelines.store.artifact import Artifact, ArtifactWriter, open_artifact, settle, shards_of
from bitmend.pipelines.store.files import read_json

from ..runs import stage_directory

MANIFEST = {"key": "k", "parent": None, "stage": {"name": "prune", "method": "wanda", "settings": {}}}


def matrix(seed: int) -> torch.Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))


def record(seed: int) -> StoredWeight:
    return StoredWeight(round_uniform(matrix(seed), UniformGrid(4, 8)))


def write(place: Path, name: str = "a", parent: Artifact | None = None, changed: int = 0) -> Artifact:
    """Two parts of one linear and one norm each; `changed` alters the second one's norm."""
    writer = ArtifactWriter(place / f"{name}.partial", parent)
    for index in range(2):
        linears = {f"m.{index}.proj": record(index)}
        norm = torch.ones(16) + (changed if index else 0)
        writer.write_part(f"block-{index:05d}", shards_of({f"m.{index}.norm": norm}, linears), linears, {"layers": [index]})
    return writer.seal(place / name, MANIFEST, {"config.json": b"{}"})


def test_what_was_written_is_read(tmp_path: Path) -> None:
    made = write(tmp_path)
    made.verify()
    again = open_artifact(tmp_path / "a")
    assert again.key == "k" and set(again.linears) == {"m.0.proj", "m.1.proj"}
    for index in range(2):
        stored = again.stored(f"m.{index}.proj")
        assert torch.equal(stored.dense(), record(index).dense())
        assert torch.equal(again.tensor(f"m.{index}.norm"), torch.ones(16))
    assert again.shape("m.0.norm") == [16]
    assert again.total_bytes() == sum(p.stat().st_size for p in (tmp_path / "a").glob("*.safetensors"))
    for name, entry in again.manifest["files"].items():
        assert hashlib.sha256((tmp_path / "a" / name).read_bytes()).hexdigest() == entry["sha256"]
    assert not (tmp_path / "a.partial").exists()
    assert {p.suffix for p in (tmp_path / "a").iterdir()} == {".json", ".safetensors"}
    assert not list((tmp_path / "a").glob("*.part.json"))


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path, "a")
    write(tmp_path, "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_what_a_stage_leaves_alone_is_its_parents_file(tmp_path: Path) -> None:
    parent = write(tmp_path, "a")
    write(tmp_path, "b", parent, changed=1)
    inode = {p.name: p.stat().st_ino for p in (tmp_path / "a").glob("*.safetensors")}
    shared = {p.name for p in (tmp_path / "b").glob("*.safetensors") if p.stat().st_ino == inode[p.name]}
    assert shared == set(inode) - {"block-00001.vectors.safetensors"}
    assert all((tmp_path / "b" / name).stat().st_nlink == 2 for name in shared)
    shutil.rmtree(tmp_path / "a")
    open_artifact(tmp_path / "b").verify()  # it does not need its parent


def test_in_a_run_stages_share_their_files(finished: Path) -> None:
    def inodes(address: str) -> dict[str, int]:
        return {p.name: p.stat().st_ino for p in stage_directory(finished, address).glob("*.safetensors")}

    quantize, decompose, recover, fuse = (inodes(a) for a in ("quantize", "decompose", "recover", "fuse"))
    assert recover == fuse, "fuse adds no byte"
    for name, inode in quantize.items():
        assert (decompose[name] == inode) == (not name.endswith(".vectors.safetensors")), "factors are own files next to shared codes"
    assert {n for n in decompose if decompose[n] == recover[n]} == {n for n in decompose if not n.endswith("vectors.safetensors")}
    name = "block-00000.matrices.safetensors"
    sharing = [p for p in finished.glob(f"stages/*/{name}") if p.stat().st_ino == fuse[name]]
    assert len(sharing) == 4, "from quantize on"


def test_copied_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.EXDEV, "another device")

    parent = write(tmp_path, "a")
    monkeypatch.setattr(os, "link", refuse)
    made = write(tmp_path, "b", parent)
    made.verify()
    assert (tmp_path / "b" / "block-00000.matrices.safetensors").stat().st_nlink == 1


def test_a_part_is_taken_over_unchanged(tmp_path: Path) -> None:
    parent = write(tmp_path, "a")
    writer = ArtifactWriter(tmp_path / "b.partial", parent)
    for part in ("block-00000", "block-00001"):
        writer.copy_part(part)
    made = writer.seal(tmp_path / "b", MANIFEST, {})
    assert made.linears == parent.linears and made.manifest["parts"] == parent.manifest["parts"]
    assert torch.equal(made.stored("m.1.proj").dense(), record(1).dense())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "block-00000.matrices.safetensors").unlink(), "block-00000.matrices.safetensors: is missing"),
        (lambda d: os.truncate(d / "block-00001.vectors.safetensors", 90), "block-00001.vectors.safetensors: has 90 bytes"),
        (lambda d: (d / "config.json").write_bytes(b"{} "), "config.json: has 3 bytes"),
        (lambda d: (d / "artifact.json").write_text('{"schema": 7}'), "schema 7, this program reads 1"),
        (lambda d: (d / "artifact.json").write_text('{"schema": 1'), "not JSON"),
        (lambda d: (d / "artifact.json").unlink(), "no artifact.json"),
    ],
)
def test_damage_is_named_when_opened(damage: Any, words: str, tmp_path: Path) -> None:
    write(tmp_path)
    damage(tmp_path / "a")
    with pytest.raises(InputError, match=words.replace(".", r"\.")):
        open_artifact(tmp_path / "a")


def test_a_flipped_bit_is_found_by_verify(tmp_path: Path) -> None:
    write(tmp_path)
    shard = tmp_path / "a" / "block-00001.matrices.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match=r"block-00001\.matrices\.safetensors: sha256 is"):
        open_artifact(tmp_path / "a").verify()


def test_a_shard_that_is_none_is_named(tmp_path: Path) -> None:
    made = write(tmp_path)
    shard = tmp_path / "a" / "block-00001.matrices.safetensors"
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(InputError, match=r"block-00001\.matrices\.safetensors: not a readable safetensors file"):
        made.stored("m.1.proj")


def test_a_manifest_of_other_records_is_named(tmp_path: Path) -> None:
    made = write(tmp_path)
    made.manifest["linears"]["m.0.proj"]["base"]["colour"] = "red"
    with pytest.raises(InputError, match=r"m\.0\.proj: UniformWeight has no field 'colour'"):
        made.stored("m.0.proj")


def begun(place: Path) -> ArtifactWriter:
    writer = ArtifactWriter(place / "a.partial", None)
    for index in range(2):
        linears = {f"m.{index}.proj": record(index)}
        writer.write_part(f"block-{index:05d}", shards_of({}, linears), linears, {"layers": [index]})
    return writer


def test_finished_parts_are_found_again(tmp_path: Path) -> None:
    begun(tmp_path)
    again = ArtifactWriter(tmp_path / "a.partial", None)
    assert set(again.finished) == {"block-00000", "block-00001"}
    assert again.finished["block-00001"]["extra"] == {"layers": [1]}
    assert torch.equal(again.stored("block-00001", "m.1.proj").dense(), record(1).dense())


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: (d / "block-00001.part.json").write_bytes(b""),
        lambda d: (d / "block-00001.part.json").write_bytes(b'{"files": '),
        lambda d: (d / "block-00001.part.json").write_bytes(b"null"),
        lambda d: (d / "block-00001.part.json").write_bytes(b"\xff\xfe\x00"),
        lambda d: (d / "block-00001.matrices.safetensors").unlink(),
        lambda d: os.truncate(d / "block-00001.matrices.safetensors", 50),
        lambda d: (d / "block-00001.vectors.safetensors").write_bytes(b"x" * (d / "block-00001.vectors.safetensors").stat().st_size),
    ],
)
def test_a_torn_part_is_written_again(damage: Any, tmp_path: Path) -> None:
    begun(tmp_path)
    damage(tmp_path / "a.partial")
    again = ArtifactWriter(tmp_path / "a.partial", None)
    assert set(again.finished) == {"block-00000"}
    linears = {"m.1.proj": record(1)}
    again.write_part("block-00001", shards_of({}, linears), linears)
    again.seal(tmp_path / "a", MANIFEST, {}).verify()


def test_sealing_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*arguments: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", kill)
        with pytest.raises(SystemExit):
            begun(tmp_path).seal(tmp_path / "a", MANIFEST, {})
    assert not (tmp_path / "a").exists()
    settle(tmp_path / "a.partial", tmp_path / "a").verify()


@pytest.mark.parametrize("step", ["replace", "fsync", "link"])
def test_a_full_disk_loses_nothing(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    parent, writer = write(tmp_path, "parent"), begun(tmp_path)
    writer.parent = parent
    linears = {"m.0.proj": record(0 if step == "link" else 5)}
    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        with pytest.raises(OutOfMemoryError, match="no disk space left") as caught:
            writer.write_part("block-00000" if step == "link" else "block-00002", shards_of({}, linears), linears)
    assert caught.value.exit_code == 5
    assert not [p.name for p in (tmp_path / "a.partial").iterdir() if p.name.startswith(".")], "the space is given back"
    assert "block-00001" in ArtifactWriter(tmp_path / "a.partial", None).finished
    open_artifact(tmp_path / "parent").verify()


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file.json"
    artifact.write_json(target, {"old": 1})
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        artifact.write_json(target, {"new": 2})
    assert read_json(target) == {"old": 1}


def test_no_pickle_anywhere(finished: Path) -> None:
    for file in finished.rglob("*"):
        if file.is_file() and file.suffix not in (".json", ".jsonl", ".yaml", ".html", ".lock"):
            assert file.suffix == ".safetensors" or file.name == ".lock", file
            if file.suffix == ".safetensors":
                assert file.read_bytes()[8:9] == b"{"


def test_a_baseline_refers_to_its_source(small_model: Path, tmp_path: Path) -> None:
    key = fingerprint(small_model)
    made = build_baseline(small_model, tmp_path / "b.partial", tmp_path / "b", {**MANIFEST, "key": key})
    assert made.weights == small_model.resolve()
    assert not list((tmp_path / "b").glob("*.safetensors"))
    made.verify()
    assert made.total_bytes() == (small_model / "model.safetensors").stat().st_size


def test_dense_records_keep_their_dtype(tmp_path: Path) -> None:
    writer = ArtifactWriter(tmp_path / "a.partial", None)
    linears = {"m.0.proj": StoredWeight(DenseWeight(matrix(1).bfloat16()))}
    writer.write_part("block-00000", shards_of({}, linears), linears)
    assert writer.seal(tmp_path / "a", MANIFEST, {}).stored("m.0.proj").base.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
