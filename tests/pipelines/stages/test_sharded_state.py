"""Matrices that train in parts on several processes (FSDP2 through gloo): as good as on one, and a state that another number of them can read."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.pipelines.ranks.exchange import ONE
from bitmend.pipelines.stages.sharded_state import keep_parts, kept_parts
from bitmend.pipelines.store.rundir import PARTS_META, TRAINING_PARTS
from bitmend.recover.adamw import TrainState
from bitmend.recover.trainable import Attached, Trainable

from ..runs import Processes
from .test_ranked import GRID, TRAIN, Chains, by_one, made

PARTS = {**TRAIN, "steps": 6, "shard": True}
CHAINS: Chains = {
    "full": [{"prune": {"method": "wanda"}}, {"recover": {"method": "full", **PARTS}}],
    "qat": [{"quantize": {"method": "rtn", **GRID}}, {"recover": {"method": "qat", **PARTS}}],
}


def trained_metrics(place: Path, name: str) -> dict[str, Any]:
    return json.loads((place / f"{name}-1.json").read_text())["metrics"]


def close(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Perplexities within 0.1 %, at every look and at the end; what trains in parts on one machine is no more than its share."""
    for name in ("held_out_loss_start", "held_out_loss_best", "held_out_loss_kept"):
        assert actual[name] == pytest.approx(expected[name], abs=1e-3)
    assert actual["best_step"] > 0 and expected["held_out_loss_best"] < expected["held_out_loss_start"] - 0.01
    assert actual["tokens"] == expected["tokens"] and len(actual["history"]) == len(expected["history"])
    for one, other in zip(actual["history"], expected["history"], strict=True):
        assert one == pytest.approx(other, abs=1e-3)


@pytest.mark.filterwarnings("ignore")  # torch's, of a checkpoint without processes
def test_a_state_is_found_wherever_a_kill_left_it(tmp_path: Path) -> None:
    trainables = {"a": Trainable(torch.nn.Parameter(torch.zeros(3)), "dense")}
    place, fresh = tmp_path / TRAINING_PARTS, tmp_path / f"{TRAINING_PARTS}.new"
    for step in (1, 2):
        tensors = {f"{label}.a": torch.full((3,), float(step)) for label in ("value", "first", "second", "best", "good")}
        keep_parts(tmp_path, TrainState(tensors, {"step": step}), ONE)
        actual = kept_parts(tmp_path, Attached(trainables), ONE)
        assert actual is not None and actual.meta == {"step": step} and all(torch.equal(actual.tensors[name], t) for name, t in tensors.items())
    os.rename(place, fresh)  # killed right before the renaming
    actual = kept_parts(tmp_path, Attached(trainables), ONE)
    assert actual is not None and actual.meta == {"step": 2}
    (fresh / PARTS_META).unlink()  # and before all was written
    assert kept_parts(tmp_path, Attached(trainables), ONE) is None


def test_perplexity_is_that_of_one_process(commands: Processes, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    _, asked = by_one("llama", {"full": CHAINS["full"]}, commands, small_model, small_text, tmp_path)
    made(commands, 2, tmp_path / "two", **asked)
    close(trained_metrics(tmp_path / "two", "full"), trained_metrics(tmp_path / "one", "full"))


@pytest.mark.slow
def test_another_number_of_processes_goes_on(commands: Processes, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    """It is the run's key that has it begin anew; the state can be read."""
    _, asked = by_one("llama", CHAINS, commands, small_model, small_text, tmp_path)
    place = tmp_path / "changing"
    _, output = made(commands, 4, place, {"full": 6, "qat": 6}, **asked)
    assert output.count("stopped") == 2
    for name in CHAINS:
        parts = place / f"{name}-1.partial" / TRAINING_PARTS
        assert json.loads((parts / PARTS_META).read_text())["step"] == 3 and len(list(parts.glob("*.distcp"))) == 4
    made(commands, 2, place, **asked)
    for name in CHAINS:
        close(trained_metrics(place, name), trained_metrics(tmp_path / "one", name))
