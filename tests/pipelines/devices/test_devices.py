"""Device, dtype and determinism: what is chosen, what is refused, what a key says of it, how a run keeps it."""

import json
import logging
import time
from pathlib import Path

import pytest
import torch
from bitmend.pipelines.devices import compute
from bitmend.pipelines.devices.compute import Compute, chosen, chosen_device, chosen_dtype, determinism
from bitmend.pipelines.errors import UsageError
from bitmend.pipelines.run import runner
from bitmend.pipelines.store.files import read_json, write_json

from ..runs import CHAIN, stage_directory
from ..runs import chosen as recipe_of

CPU, CARD = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch answers as on an Ampere card; no tensor goes there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")


def test_auto_is_the_card_in_bfloat16(card: None) -> None:
    assert chosen() == Compute(CARD, torch.bfloat16)


def test_before_ampere_auto_is_float16_and_bfloat16_is_refused(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert chosen_dtype("auto", CARD) == torch.float16
    with pytest.raises(UsageError, match=r"a card \(compute capability 7\.5\) has no bfloat16.*--dtype float16"):
        chosen_dtype("bfloat16", CARD)


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device("auto") == CPU
    with pytest.raises(UsageError, match=r"--device cuda: .*use --device cpu"):
        chosen_device("cuda")


@pytest.mark.parametrize("units, seconds, dtype", [
    ({}, {torch.float32: 1.0, torch.bfloat16: 0.1}, torch.float32),
    ({"amx_bf16": True}, {torch.float32: 1.0, torch.bfloat16: 0.4}, torch.bfloat16),
    ({"avx512_bf16": True}, {torch.float32: 1.0, torch.bfloat16: 0.9}, torch.float32),
])  # fmt: skip
def test_a_cpu_takes_bfloat16_where_its_units_are_faster(
    monkeypatch: pytest.MonkeyPatch, units: dict[str, bool], seconds: dict[torch.dtype, float], dtype: torch.dtype
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    monkeypatch.setattr(compute, "_product_seconds", lambda dtype: seconds[dtype])
    assert _measured() == dtype


_measured = compute.measured_dtype  # before the fixture of the whole session takes its place


def test_a_product_is_timed() -> None:
    assert 0 < compute._product_seconds(torch.float32) < 10


def test_a_dtype_is_not_chosen_by_what_others_do_with_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *_: time.sleep(0.2))
    assert compute._product_seconds(torch.float32) < 0.1


def test_a_key_names_the_device_but_for_a_cpu_in_float32() -> None:
    identities = [
        Compute(CPU),
        Compute(CPU, torch.bfloat16),
        Compute(CARD),
        Compute(CARD, torch.bfloat16),
        Compute(CARD, deterministic=False),
    ]
    assert identities[0].identity() == {} == Compute(CPU, deterministic=False).identity()
    assert len({json.dumps(compute.identity(), sort_keys=True) for compute in identities}) == len(identities)


def test_deterministic_algorithms_on_a_card_and_as_before_behind_it() -> None:
    inside = []
    for chosen_compute in (Compute(CARD), Compute(CARD, deterministic=False), Compute(CPU)):
        with determinism(chosen_compute):
            inside.append((torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory))  # type: ignore[attr-defined]
        assert not torch.are_deterministic_algorithms_enabled()
    assert inside == [(True, False), (False, True), (False, True)]


def test_a_run_keeps_its_dtype_and_another_one_does_its_stages_again(
    small_model: Path, small_text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The baseline is the same files; everything computed is another key, in a directory of its own."""
    recipe, place = recipe_of(tmp_path, small_model, small_text, [CHAIN[1]]), tmp_path / "run"
    first = runner.run(recipe, place, device="cpu", page=False)
    before = stage_directory(place, "quantize")
    assert first.protocol.dtype == "float32" and first.environment["dtype"] == "float32"
    with caplog.at_level(logging.INFO, "bitmend"):
        second = runner.run(recipe.model_copy(update={"dtype": "bfloat16"}), place, device="cpu", page=False)
    assert "quantize: computed on cpu in float32 before, on cpu in bfloat16 now; it is done again" in caplog.text
    assert before.is_dir() and stage_directory(place, "quantize") != before
    assert second.protocol.dtype == "bfloat16" and second.environment["dtype"] == "bfloat16"
    for one, other in zip(first.stages, second.stages, strict=True):
        assert one.perplexity != other.perplexity == pytest.approx(one.perplexity, rel=0.01)
    assert runner.run(recipe, place, device="cpu", page=False).protocol.dtype == "bfloat16", "auto goes on as the run does"


def test_a_run_that_began_on_a_card_goes_on_without_one(
    small_model: Path, small_text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, place = recipe_of(tmp_path, small_model, small_text, [{"quantize": {"method": "rtn"}}]), tmp_path / "run"
    runner.run(recipe, place, device="cpu", page=False)
    for name, changes in (("environment.json", {"device": "cuda", "dtype": "bfloat16"}), ("run.json", {"compute": "cuda in bfloat16"})):
        state = read_json(place / name) | changes
        for row in state.get("stages", [])[1:]:
            (place / "stages" / row["name"]).rename(place / "stages" / "02-other")
            row |= {"key": "other", "name": "02-other"}
        write_json(place / name, state)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO, "bitmend"):
        record = runner.run(recipe, place, page=False)
    assert "computed on cuda in bfloat16 before, on cpu in float32 now" in caplog.text
    assert record.environment["device"] == "cpu" and record.protocol.dtype == "float32"
