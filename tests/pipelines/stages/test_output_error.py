"""What a report calls relative output error is one quantity: E‖(W − Ŵ)x‖² / E‖Wx‖² on the first of the stage's inputs, whatever the method."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.statistics import SAMPLES
from bitmend.pipelines.evaluation import measure
from bitmend.pipelines.models.blocks import StreamedModel
from bitmend.pipelines.recipes.recipe import resolve
from bitmend.pipelines.run import runner
from bitmend.pipelines.stages.inputs import Inputs
from bitmend.pipelines.store.artifact import Artifact
from safetensors.torch import load_file

from ..families import save_speaking
from ..runs import chosen, stage_directory

pytestmark = pytest.mark.usefixtures("no_pages")

CPU = torch.device("cpu")
FEW: dict[str, Any] = {"calibration": {"samples": 20, "seq_len": 48}, "evaluation": {"seq_len": 32, "windows": 1}}
RTN: dict[str, Any] = {"quantize": {"method": "rtn", "bits": 3, "group_size": 32, "clip": "none"}}
LAST: dict[str, list[dict[str, Any]]] = {
    "rtn": [RTN],
    "gptq": [{"quantize": {"method": "gptq", "bits": 3, "group_size": 32}}],
    "nf4": [{"quantize": {"method": "nf4", "block_size": 32}}],
    "magnitude": [{"prune": {"method": "magnitude", "sparsity": 0.4}}],
    "loftq": [RTN, {"decompose": {"method": "loftq", "rank": 4, "iterations": 1}}],
    "lqer": [RTN, {"decompose": {"method": "lqer", "rank": 4}}],
    "qera_exact": [RTN, {"decompose": {"method": "qera_exact", "rank": 4}}],
    "svdquant": [RTN, {"decompose": {"method": "svdquant", "rank": 4, "iterations": 1, "smoothing_steps": 1}}],
}
Q = "model.layers.{}.self_attn.q_proj"


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory, small_model: Path, small_text: Path) -> dict[str, tuple[Path, Any]]:
    out = {}
    for name, stages in LAST.items():
        place = tmp_path_factory.mktemp(name)
        out[name] = place / "run", runner.run(chosen(place, small_model, small_text, stages, **FEW), place / "run").stages[-1]
    return out


@torch.no_grad()
def by_hand(run: Path, made: Artifact, parent: Artifact, weights: dict[str, torch.Tensor], block: int) -> float:
    """q of a block on what the stage's own blocks below it make of the first 512 tokens."""
    ids = Inputs(resolve(str(run / "recipe.resolved.yaml")), made.directory).calibration()
    model = StreamedModel(made, CPU)
    hidden = model.embed(ids)
    for index in range(block):
        model.load_block(index)
        hidden = model.run_block(index, hidden)
    x = model.load_block(block).input_layernorm(hidden).reshape(-1, hidden.shape[-1])[:SAMPLES]
    wanted = weights[f"{Q.format(block)}.weight"].float()
    lost = x @ (wanted - made.stored(Q.format(block)).dense()).T
    return float(lost.double().square().sum() / (x @ wanted.T).double().square().sum())


@pytest.mark.parametrize("name", LAST)
def test_every_method_reports_the_same_quantity(name: str, reported: dict[str, tuple[Path, Any]], small_model: Path) -> None:
    run, stage = reported[name]
    made, weights = runner.last_artifact(run), load_file(small_model / "model.safetensors")
    actual = {layer.name: layer.relative_output_error for layer in stage.layers}
    assert all(error is not None and 0 < error < 1 for error in actual.values()), "of every matrix"
    for block in (0, 1):
        expected = by_hand(run, made, runner.last_artifact(run, "baseline"), weights, block)
        assert actual[Q.format(block)] == pytest.approx(expected, rel=1e-4)
    assert stage.metrics["calibration_tokens"] == (0 if name in ("rtn", "nf4", "magnitude", "loftq") else 20 * 48)


def test_a_better_term_shows_a_smaller_error_next_to_its_own_metric(reported: dict[str, tuple[Path, Any]]) -> None:
    """The exact term errs least on the outputs; in their own metrics the three cannot be compared."""
    of = {name: {layer.name: layer for layer in reported[name][1].layers} for name in ("loftq", "lqer", "qera_exact")}
    mean = {name: sum(layer.relative_output_error for layer in layers.values()) for name, layers in of.items()}
    assert mean["qera_exact"] < mean["lqer"] and mean["qera_exact"] < mean["loftq"]
    assert all("relative_error" in layer.metrics for layers in of.values() for layer in layers.values())


def test_idle_experts_have_none(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    save_speaking("mixtral", tmp_path / "source", small_model, num_hidden_layers=1, num_local_experts=64, num_experts_per_tok=1)
    few = FEW | {"calibration": {"samples": 1, "seq_len": 16}}
    made = runner.run(chosen(tmp_path, tmp_path / "source", small_text, [RTN], **few), tmp_path / "run").stages[-1]
    experts = [layer.relative_output_error for layer in made.layers if ".experts." in layer.name]
    assert sum(error is None for error in experts) >= 2 * 48 and any(error is not None and 0 < error < 1 for error in experts)


def test_a_stage_of_an_older_program_keeps_its_own_error(reported: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    run, _ = reported["rtn"]
    measured = next(stage_directory(run, "quantize").parent.glob("*quantize*.metrics")) / "stage.json"
    stage = json.loads(measured.read_text())
    for layer in stage["layers"]:
        layer["relative_output_error"] = layer.pop("output_error") ** 0.5
    old = next(layer for layer in stage["layers"] if layer["name"] == Q.format(0))
    assert measure._metrics_of(old) == {"root_relative_error": old["relative_output_error"]} | old["metrics"]
