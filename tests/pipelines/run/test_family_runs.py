"""Every model family runs the whole chain: prune, quantize, decompose, recover, fuse."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.weights import UniformWeight
from bitmend.pipelines.errors import UsageError
from bitmend.pipelines.models.blocks import StreamedModel
from bitmend.pipelines.models.loading import whole_model
from bitmend.pipelines.models.source import load_config
from bitmend.pipelines.models.structure import inspect, skeleton, tied_names
from bitmend.pipelines.run import runner
from transformers import AutoModelForCausalLM

from ..families import FAMILIES, OTHERS, save_speaking
from ..runs import chosen

pytestmark = pytest.mark.usefixtures("no_pages")

CPU = torch.device("cpu")
TRAINED: dict[str, dict[str, Any]] = {
    "perp": {"method": "perp", "steps": 2, "batch_size": 1, "seq_len": 32, "loss": "cross_entropy"},
    "lora": {"method": "lora", "steps": 2, "batch_size": 1, "seq_len": 32, "learning_rate": 1e-2},
}


def chain(recover: str, **quantize: Any) -> list[dict[str, Any]]:
    return [
        {"prune": {"method": "wanda", "sparsity": 0.25}},
        {"quantize": {"method": "gptq", "bits": 4, "group_size": 16, **quantize}},
        {"decompose": {"method": "qera_exact", "rank": 4}},
        {"recover": TRAINED[recover]},
        {"fuse": {"backend": "auto"}},
    ]


def run(family: str, place: Path, model: Path, text: Path, stages: list[dict[str, Any]], **changes: Any) -> Any:
    save_speaking(family, place / "source", model, **changes)
    sections = {"calibration": {"samples": 4, "seq_len": 32}, "evaluation": {"seq_len": 32, "windows": 4}}
    return runner.run(chosen(place, place / "source", text, stages, **sections), place / "run")


@pytest.mark.parametrize(("number", "family"), list(enumerate(FAMILIES | OTHERS)))
def test_the_whole_chain(number: int, family: str, tmp_path: Path, small_model: Path, small_text: Path) -> None:
    made = run(family, tmp_path, small_model, small_text, chain(("perp", "lora")[number % 2]))
    baseline, prune, quantize, decompose, recover, fuse = made.stages
    assert prune.sparsity == pytest.approx(0.25, abs=0.02)
    assert quantize.total_bytes < 0.7 * baseline.total_bytes and quantize.bits_per_weight < 8
    assert quantize.kl_to_baseline > 0.005, "the compression shows"
    assert decompose.kl_to_baseline < quantize.kl_to_baseline, "the low-rank term gives something back"
    assert fuse.perplexity == pytest.approx(recover.perplexity, rel=1e-3)
    assert fuse.total_bytes == recover.total_bytes
    every(family, tmp_path / "run")


def every(family: str, run: Path) -> None:
    """Every matrix of every block is compressed, none is left out, and whatever is tied still is."""
    artifact = runner.last_artifact(run)
    model = skeleton(load_config(artifact.directory))
    structure = inspect(model)
    assert set(artifact.linears) == {site.name for site in structure.sites}
    for site in structure.sites:
        stored = artifact.stored(site.name)
        assert stored.shape == site.shape and isinstance(stored.base, UniformWeight)
        assert stored.mask is not None and stored.low_rank is not None and stored.low_rank.rank == 4
    whole = whole_model(artifact, CPU, torch.float32).model
    assert tied_names(whole) == tied_names(model)
    if model.config.get_text_config().tie_word_embeddings:
        assert whole.get_output_embeddings().weight is whole.get_input_embeddings().weight


def test_experts_are_compressed_one_by_one(tmp_path: Path, small_model: Path, small_text: Path) -> None:
    run("mixtral", tmp_path, small_model, small_text, chain("perp")[:2])
    artifact = runner.last_artifact(tmp_path / "run")
    experts = [n for n in artifact.linears if ".experts." in n]
    assert len(experts) == 3 * 4 * 2, "blocks × experts × (gate and up fused, down)"
    assert artifact.shape("model.layers.0.mlp.gate.weight") == [4, 64], "the router stays as it is"
    notes = runner.record(tmp_path / "run").stages[2].notes
    assert any("router" in note for note in notes), notes
    tensors = artifact.tensors("model.layers.0.mlp.experts.")
    assert not {n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))}, "no dense copy is left"


def test_conv1d_is_stored_the_other_way_around(tmp_path: Path, small_model: Path, small_text: Path) -> None:
    stages = [{"quantize": {"method": "rtn", "bits": 8, "group_size": 16}}]
    run("gpt2", tmp_path, small_model, small_text, stages)
    artifact = runner.last_artifact(tmp_path / "run")
    source: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    conv = source.transformer.h[1].mlp.c_fc
    stored = artifact.stored("transformer.h.1.mlp.c_fc")
    assert stored.shape == (256, 64) == tuple(reversed(conv.weight.shape))
    torch.testing.assert_close(stored.dense().T, conv.weight.detach(), rtol=0, atol=0.01)
    loaded = whole_model(artifact, CPU, torch.float32).model
    torch.testing.assert_close(loaded.transformer.h[1].mlp.c_fc.weight, stored.dense().T.contiguous())


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_compressed_when_asked(tied: bool, tmp_path: Path, small_model: Path, small_text: Path) -> None:
    stages = chain("lora", include_head=True)[1:]
    made = run("llama", tmp_path, small_model, small_text, stages, tie_word_embeddings=tied)
    artifact = runner.last_artifact(tmp_path / "run")
    assert "lm_head" in artifact.linears and "lm_head.weight" not in artifact.index
    assert ("model.embed_tokens.weight" in artifact.index) == (not tied), "one matrix, stored once"
    model = StreamedModel(artifact, CPU).model
    dense = artifact.stored("lm_head").dense()
    assert torch.equal(model.get_output_embeddings().weight, dense)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert made.stages[-1].perplexity == pytest.approx(made.stages[-2].perplexity, rel=1e-3)
    assert made.stages[1].bits_per_weight < 8
    assert any(layer.name == "lm_head" for layer in made.stages[1].layers)
    assert not any("head" in note for note in made.stages[1].notes)


def test_ignored_layers_stay_as_they_are(tmp_path: Path, small_model: Path, small_text: Path) -> None:
    stages = chain("perp", ignore=["down_proj$"])[1:2]
    made = run("llama", tmp_path, small_model, small_text, stages)
    baseline, artifact = (runner.last_artifact(tmp_path / "run", name) for name in ("baseline", "quantize"))
    assert len(artifact.linears) == 3 * 6
    name = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(baseline.tensor(name), artifact.tensor(name))
    assert sum("matched by `ignore`" in note for note in made.stages[1].notes) == 3


@pytest.mark.parametrize("method", ["rtn", "learned_rounding"])
def test_embeddings_alone(method: str, tmp_path: Path, small_model: Path, small_text: Path) -> None:
    """All blocks stay as they are; what would change nothing at all is refused before any work."""
    alone: dict[str, Any] = {"method": method, "ignore": [r"\.layers\."]}
    made = run("llama", tmp_path, small_model, small_text, [{"quantize": alone | {"include_embeddings": True, "embedding_bits": 6}}])
    baseline, artifact = (runner.last_artifact(tmp_path / "run", name) for name in ("baseline", "quantize"))
    blocks = [name for name in baseline.index if ".layers." in name]
    assert len(artifact.linears) == 1 and all(torch.equal(baseline.tensor(name), artifact.tensor(name)) for name in blocks)
    assert made.stages[1].perplexity != made.stages[0].perplexity
    with pytest.raises(UsageError, match="quantize: `ignore` leaves no linear layer to compress"):
        run("llama", tmp_path / "nothing", small_model, small_text, [{"quantize": alone}])
    assert not [*(tmp_path / "nothing").rglob("01-*")]


def test_a_recovered_bias_where_the_family_has_none(tmp_path: Path, small_model: Path, small_text: Path) -> None:
    stages = [chain("perp")[1], {"recover": TRAINED["perp"] | {"learning_rate": 1e-2}}, {"fuse": {"backend": "reference"}}]
    made = run("llama", tmp_path, small_model, small_text, stages)
    artifact = runner.last_artifact(tmp_path / "run", "recover")
    biases = [n for n in artifact.index if n.endswith("_proj.bias")]
    assert len(biases) == 3 * 7 and any(artifact.tensor(n).any() for n in biases)
    assert made.stages[3].perplexity == pytest.approx(made.stages[2].perplexity, rel=1e-4)
    stage = json.loads(next((tmp_path / "run" / "stages").glob("02-recover*.metrics/stage.json")).read_text())
    assert stage["metrics"]["held_out_loss_best"] <= stage["metrics"]["held_out_loss_start"]
