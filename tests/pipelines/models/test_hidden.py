"""Hidden states are the same wherever they lie, and so is everything that is made of them."""

import errno
import os
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.pipelines.devices import compute
from bitmend.pipelines.errors import InputError, OutOfMemoryError
from bitmend.pipelines.evaluation import perplexity
from bitmend.pipelines.evaluation.perplexity import hidden_reader
from bitmend.pipelines.models import hidden
from bitmend.pipelines.models.hidden import HiddenStates, Room
from bitmend.pipelines.run import runner
from bitmend.pipelines.store.kept import is_whole
from safetensors.torch import load_file

from ..families import save_speaking
from ..runs import chosen, hashes

CPU = torch.device("cpu")
BATCH = 3 * 5 * 8
PLACES = {"device": ["device"], "file": ["file"], "host": ["host"], "mixed": ["file", "device", "host"]}


def batches(dtype: torch.dtype = torch.float32) -> Iterator[torch.Tensor]:
    for seed in range(4):
        yield torch.randn(3 if seed < 3 else 2, 5, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def place_in_turn(monkeypatch: pytest.MonkeyPatch, places: list[str]) -> None:
    """Without a GPU memory is never pinned, so its place is played by plain memory."""
    turn = cycle(places)
    monkeypatch.setattr(Room, "place", lambda self, size: next(turn))
    monkeypatch.setattr(hidden, "pinned", torch.empty)


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_place(places: list[str], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [b * 3 + 1 for b in batches(dtype)]
    place_in_turn(monkeypatch, places)
    states = HiddenStates.of(batches(dtype), Room(CPU, scratch=tmp_path))
    states.through(lambda h: h * 3 + 1)
    assert set(states.places) == set(places) and not list(tmp_path.iterdir()), "files have no name"
    assert (len(states), states.windows, states.tokens) == (4, 11, 55)
    assert all(torch.equal(a, b) for a, b in zip(states, plain, strict=True)) and torch.equal(states[2], plain[2])
    whole, rows = torch.cat(plain), states.rows()
    numbers = torch.tensor([10, 0, 4, 4])
    assert torch.equal(states.whole(), whole) and torch.equal(states.window(9), whole[9])
    assert len(rows) == 11 and torch.equal(rows[numbers], whole[numbers]) and torch.equal(rows[2:7], whole[2:7])
    states.through(lambda h: h[:, 1:])
    assert torch.equal(states.whole(), whole[:, 1:]), "a prompt is cut off behind the last block"
    states.save(tmp_path / "states.safetensors")
    assert torch.equal(load_file(tmp_path / "states.safetensors")["hidden"], whole[:, 1:])
    assert is_whole(tmp_path / "states.safetensors")
    assert torch.equal(hidden_reader(tmp_path / "states.safetensors")(4), whole[4, 1:])


def test_what_does_not_fit_goes_to_files_and_gives_its_room_back(tmp_path: Path) -> None:
    room = Room(CPU, device_bytes=2 * BATCH * 4 + 10, scratch=tmp_path)
    states = HiddenStates.of(batches(), room)
    assert states.places == ["device", "device", "file", "file"] and room.device_bytes == 10
    del states
    assert room.device_bytes == 2 * BATCH * 4 + 10


def test_room_on_a_card_is_the_cards_then_the_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the card's own account, never by the host's; pinned memory comes in powers of two."""
    monkeypatch.setattr(compute, "memory", lambda: {"limit_bytes": 10**12, "available_bytes": 2000})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (600, 10**9))
    room = Room.measured(torch.device("cuda"), tmp_path)
    assert (room.device_bytes, room.host_bytes, room.memory_bytes) == (300, 1000, 1300)
    assert room.place(300) == "device"
    room.take("device", 300)
    assert room.place(300) == "host"
    room.take("host", 300)
    assert room.host_bytes == 1000 - 512 and room.place(300) == "file"
    room.take("host", -300)
    assert room.host_bytes == 1000
    assert Room.measured(CPU, tmp_path).place(1001) == "file"


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match="do not fit into memory, and no directory was given"):
        HiddenStates.of(batches(), Room(CPU, device_bytes=0))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutOfMemoryError, match="no disk space left"):
        HiddenStates.of(batches(), Room(CPU, device_bytes=0, scratch=tmp_path))
    assert not list(tmp_path.iterdir())


STAGES: list[dict[str, Any]] = [
    {"prune": {"method": "sparsegpt", "allocation": "outliers"}},
    {"quantize": {"method": "gptq", "bits": 3, "group_size": 32, "correction": 0.5, "true_sequential": True}},
    {"recover": {"method": "reconstruct", "steps": 2, "samples": 8, "batch_size": 4, "seq_len": 128}},
    {"quantize": {"method": "learned_rounding", "steps": 2, "batch_size": 3, "seq_len": 48, "target": "compressed", "group_size": 32}},
    {"decompose": {"method": "lq_lora", "rank": 2, "iterations": 1}},
]


def test_artifacts_are_the_same_whatever_fits(
    small_model: Path, small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pages: None
) -> None:
    """Two blocks; the three places at once against the device alone."""
    save_speaking("llama", tmp_path / "model", small_model, num_hidden_layers=2, max_position_embeddings=128)
    monkeypatch.setattr(perplexity, "TOKENS_AT_ONCE", 64)
    made: dict[str, Any] = {}
    for name in ("device", "mixed"):
        (tmp_path / name).mkdir()
        with monkeypatch.context() as patch:
            place_in_turn(patch, PLACES[name])
            record = runner.run(chosen(tmp_path / name, tmp_path / "model", small_text, STAGES), tmp_path / name / "run", device="cpu")
        made[name] = hashes(tmp_path / name / "run"), [(s.perplexity, s.kl_to_baseline) for s in record.stages]
        assert not list((tmp_path / name).rglob("hidden-*"))
    assert made["mixed"] == made["device"]
