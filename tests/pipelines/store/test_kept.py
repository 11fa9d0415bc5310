"""Tensor files with a checksum in their header: read back as they were, by any reader of safetensors; never when torn or flipped."""

import os
from pathlib import Path

import pytest
import torch
from bitmend.pipelines.store.kept import is_whole, keep, kept
from safetensors.torch import load_file

TENSORS = {
    "half": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "whole": torch.tensor([1, -2], dtype=torch.int64),
    "part": torch.arange(12.0).view(3, 4).T,
    "nothing": torch.zeros(0, 4),
    "mask": torch.tensor([True, False]),
}


def test_what_was_kept_is_read(tmp_path: Path) -> None:
    keep(tmp_path / "a.safetensors", TENSORS, {"meta": "words"})
    actual = kept(tmp_path / "a.safetensors")
    assert actual is not None and actual[1]["meta"] == "words"
    for tensors in (actual[0], load_file(tmp_path / "a.safetensors")):
        assert tensors.keys() == TENSORS.keys()
        assert all(torch.equal(tensors[name], TENSORS[name]) and tensors[name].dtype == TENSORS[name].dtype for name in TENSORS)


def test_a_flipped_bit_anywhere(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    keep(file, TENSORS)
    data = file.read_bytes()
    for place in range(0, len(data), 7):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        assert kept(file) is None, f"byte {place} of {len(data)}"
    file.write_bytes(data)
    assert kept(file) is not None


@pytest.mark.parametrize("left", [0, 5, 8, 100, -1])
def test_a_torn_file(left: int, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    keep(file, TENSORS)
    os.truncate(file, left if left >= 0 else file.stat().st_size + left)
    assert not is_whole(file) and kept(file) is None


def test_a_file_of_another_program_or_none(tmp_path: Path) -> None:
    assert kept(tmp_path / "none.safetensors") is None
    (tmp_path / "a.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert kept(tmp_path / "a.safetensors") is None
