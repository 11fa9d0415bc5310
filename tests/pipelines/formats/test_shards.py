import contextlib
import json
import logging
import os
import shutil
import signal

import pytest
import torch
from bitmend.pipelines.errors import InputError, OutOfMemoryError, UsageError
from bitmend.pipelines.formats import shards
from bitmend.pipelines.formats.shards import INDEX, fresh_directory, open_directory, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

FOUR = {name: torch.arange(100.0) + i for i, name in enumerate("abcd")}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=12), st.integers(1, 1200))
def test_shards_stay_below_the_limit_and_lose_nothing(tmp_path_factory, sizes, limit):
    directory = tmp_path_factory.mktemp("shards")
    tensors = {f"t{i}": torch.randn(size) for i, size in enumerate(sizes)}
    total = write_shards(directory, tensors.items(), limit)
    stored = open_directory(directory)
    assert total == 4 * sum(sizes) and set(stored) == set(tensors)
    assert all(torch.equal(stored[name].load(), tensor) for name, tensor in tensors.items())
    held: dict[str, list[int]] = {}
    for entry in stored.values():
        held.setdefault(entry.file.name, []).append(entry.size_bytes)
    assert all(sum(sizes) <= limit or len([s for s in sizes if s]) == 1 for sizes in held.values())


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    table = torch.randn(4, 4)
    write_shards(tmp_path, {"a": table, "b": table, "c": table.t()}.items())
    stored = open_directory(tmp_path)
    assert torch.equal(stored["b"].load(), table) and torch.equal(stored["c"].load(), table.t())


def test_a_name_that_comes_twice(tmp_path):
    with pytest.raises(UsageError, match="a would be written twice"):
        write_shards(tmp_path, [("a", torch.ones(1)), ("a", torch.ones(1))])


def test_a_missing_shard_is_named(tmp_path):
    write_shards(tmp_path, FOUR.items(), 500)
    (tmp_path / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00004\.safetensors.*missing shard"):
        open_directory(tmp_path)


def test_an_index_that_lies(tmp_path):
    write_shards(tmp_path, FOUR.items(), 500)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["a"] = index["weight_map"]["b"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match="tensor a is in model"):
        open_directory(tmp_path)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "sub/model.safetensors"])
def test_an_index_that_leaves_the_directory(name, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    target = inside / name
    target.parent.mkdir(exist_ok=True)
    save_file({"a": torch.ones(1)}, target)
    (inside / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match="no plain file name"):
        open_directory(inside)


def test_a_link_that_leads_out(tmp_path):
    """Refused, unless the directory is a snapshot of the Hub's cache, whose files are links to its blobs."""
    blob, plain = tmp_path / "blobs" / "0a1b", tmp_path / "plain"
    snapshot = tmp_path / "snapshots" / "main"
    for directory in (blob.parent, plain, snapshot):
        directory.mkdir(parents=True)
    save_file({"a": torch.ones(1)}, blob)
    for directory in (plain, snapshot):
        (directory / "model.safetensors").symlink_to(blob)
    assert list(open_directory(snapshot)) == ["a"]
    with pytest.raises(InputError, match="a link to .*0a1b, out of its directory"):
        open_directory(plain)


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_what_the_umask_leaves(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        write_shards(tmp_path, FOUR.items(), 500)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {mode}


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index(content, tmp_path):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(InputError, match="index"):
        open_directory(tmp_path)


def test_one_tensor_in_two_files(tmp_path):
    for file in ("x.safetensors", "y.safetensors"):
        save_file({"a": torch.ones(1)}, tmp_path / file)
    with pytest.raises(InputError, match=r"tensor a is in x\.safetensors and in y\.safetensors"):
        open_directory(tmp_path)


def test_nothing_is_left_of_an_export_that_fails(tmp_path):
    with pytest.raises(RuntimeError), fresh_directory(tmp_path / "out") as scratch:
        (scratch / "half").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.fixture
def exporting(tmp_path):
    """(what kills a process that writes an export to `out`, its scratch place)."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        with fresh_directory(tmp_path / "out") as scratch:
            (scratch / "half").write_text("x")
            os.write(there, b"x")
            signal.pause()

    def kill():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return child

    os.read(here, 1)
    try:
        yield kill, tmp_path / f".out.{child}.partial"
    finally:
        with contextlib.suppress(ProcessLookupError):
            kill()
        os.close(here)
        os.close(there)


def exported(tmp_path):
    """What lies next to `out` while it is exported once more, its own scratch place left out."""
    with fresh_directory(tmp_path / "out") as scratch:
        return set(tmp_path.iterdir()) - {scratch.parent}


def test_what_a_killed_export_left_is_removed_and_reported(exporting, tmp_path, caplog):
    kill, left = exporting
    other = left.with_name(left.name.replace("out", "other"))
    other.mkdir()
    assert exported(tmp_path) == {left, other}, "its process lives"
    (tmp_path / "out").rmdir()
    kill()
    caplog.set_level(logging.INFO, "bitmend")
    assert exported(tmp_path) == {other}
    assert [record.getMessage() for record in caplog.records] == [f"{left}: removed; an export that was killed left it"]


def test_what_no_killed_export_is_proven_to_have_left_stays(exporting, tmp_path):
    """The same name with other contents, another number in the claim, a link; and a place that a living process has only just made."""
    kill, left = exporting
    dead = kill()
    (left / "notes.txt").write_text("mine")
    names = [f".out.{n}.partial" for n in (os.getppid(), "1x", dead + 1, dead + 2)]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / names[-2] / ".lock").write_text(f"bitmend export, process {dead}\n")
    (tmp_path / names[-1] / "model.safetensors").touch()
    (tmp_path / ".out.7.partial").symlink_to(tmp_path / names[0])
    (tmp_path / ".out.8.partial").write_text("a file")
    before = set(tmp_path.iterdir())
    assert exported(tmp_path) == before


def test_a_scratch_place_that_was_never_claimed_goes_with_its_process(exporting, tmp_path):
    kill, left = exporting
    kill()
    shutil.rmtree(left)
    left.mkdir()
    assert exported(tmp_path) == set()
    (tmp_path / "out").rmdir()
    left.mkdir()
    (left / ".lock").touch()
    assert exported(tmp_path) == set()


def test_a_place_that_is_taken_is_refused(tmp_path):
    (tmp_path / f".out.{os.getpid()}.partial").mkdir()
    with pytest.raises(UsageError, match=r"\.out\.\d+\.partial: is there already"), fresh_directory(tmp_path / "out"):
        pass
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_reported(monkeypatch, tmp_path):
    def full(*_, **__):
        raise SafetensorError('Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })')

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(OutOfMemoryError, match="no disk space left"), fresh_directory(tmp_path / "out") as scratch:
        write_shards(scratch, FOUR.items())
    assert not list(tmp_path.iterdir())
