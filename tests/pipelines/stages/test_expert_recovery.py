"""Recovery of a mixture of experts: its fused experts train, are written where they belong, and run from disk as they were trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.weights import DenseWeight, UniformWeight
from bitmend.pipelines.errors import UsageError
from bitmend.pipelines.planning.plan import refusals
from bitmend.pipelines.run import runner
from bitmend.pipelines.store.artifact import Artifact

from ..families import save_speaking
from ..runs import chosen

pytestmark = pytest.mark.usefixtures("no_pages")

FEW: dict[str, Any] = {"calibration": {"samples": 4, "seq_len": 32}, "evaluation": {"seq_len": 32, "windows": 4}}
SHORT: dict[str, Any] = {"steps": 4, "batch_size": 2, "seq_len": 32}
QUANTIZE = {"quantize": {"method": "rtn", "bits": 3, "group_size": 16}}
MATRICES = [f"model.layers.0.mlp.experts.{p}.{e}" for p in ("gate_up_proj", "down_proj") for e in range(4)]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    place = tmp_path_factory.mktemp("mixture")
    save_speaking("mixtral", place / "source", small_model, num_hidden_layers=1)
    return place / "source"


def run(place: Path, mixture: Path, text: Path, *stages: dict[str, Any]) -> Any:
    return runner.run(chosen(place, mixture, text, list(stages), **FEW), place / "run")


def last(place: Path, stage: str) -> Artifact:
    return runner.last_artifact(place / "run", stage)


def test_scales_of_every_expert_train(mixture: Path, small_text: Path, tmp_path: Path) -> None:
    made = run(tmp_path, mixture, small_text, QUANTIZE, {"recover": {"method": "scales", **SHORT}})
    before, after = last(tmp_path, "quantize"), last(tmp_path, "recover")
    moved = 0
    for name in MATRICES:
        old, new = before.stored(name).base, after.stored(name).base
        assert isinstance(old, UniformWeight) and isinstance(new, UniformWeight) and torch.equal(old.codes, new.codes)
        moved += not torch.equal(old.scales, new.scales)
    assert moved == 8, "every expert that a token reached"
    recover = made.stages[-1]
    assert recover.perplexity < made.stages[-2].perplexity
    assert any(n.startswith("left alone: model.layers.0.mlp.gate.weight") and "router" in n for n in recover.notes), recover.notes


def test_factors_on_a_model_that_was_never_compressed(mixture: Path, small_text: Path, tmp_path: Path) -> None:
    """Chosen experts get a record with a pair; the others of the same parameter must not be lost."""
    lora = {
        "method": "lora",
        "targets": r"experts\.gate_up_proj\.[01]$",
        "rank": 2,
        "learning_rate": 1e-2,
        "loss": "cross_entropy",
        **SHORT,
    }
    run(tmp_path, mixture, small_text, {"recover": lora})
    base, after = last(tmp_path, "baseline"), last(tmp_path, "recover")
    whole = base.tensor("model.layers.0.mlp.experts.gate_up_proj")
    for expert in range(4):
        record = after.stored(f"model.layers.0.mlp.experts.gate_up_proj.{expert}")
        assert isinstance(record.base, DenseWeight) and torch.equal(record.base.weight, whole[expert])
        assert (record.low_rank is not None) == (expert < 2)
    assert torch.equal(after.tensor("model.layers.0.mlp.experts.down_proj"), base.tensor("model.layers.0.mlp.experts.down_proj"))


def test_whole_weights_are_written_into_their_place(mixture: Path, small_text: Path, tmp_path: Path) -> None:
    full = {"method": "full", "targets": r"experts\.down_proj\.[02]$", "learning_rate": 1e-3, "loss": "cross_entropy", **SHORT}
    run(tmp_path, mixture, small_text, {"recover": full})
    before, after = (last(tmp_path, s).tensor("model.layers.0.mlp.experts.down_proj") for s in ("baseline", "recover"))
    assert [not torch.equal(a, b) for a, b in zip(after, before, strict=True)] == [True, False, True, False]


def test_reconstruction_fits_experts(mixture: Path, small_text: Path, tmp_path: Path) -> None:
    fit = {"method": "reconstruct", "train": "scales", "window": "split", "steps": 20, "samples": 16, "batch_size": 4, "seq_len": 32}
    made = run(tmp_path, mixture, small_text, QUANTIZE, {"recover": fit})
    before, after = last(tmp_path, "quantize"), last(tmp_path, "recover")
    bases = [(before.stored(n).base, after.stored(n).base) for n in MATRICES]
    assert sum(not torch.equal(a.scales, b.scales) for a, b in bases) >= 6, made.stages[-1].notes  # type: ignore[union-attr]


def test_what_cannot_reach_experts_says_so_or_is_refused(mixture: Path, small_text: Path, tmp_path: Path) -> None:
    made = run(tmp_path, mixture, small_text, QUANTIZE, {"recover": {"method": "bitfit", **SHORT}})
    first = "left alone: the biases of model.layers.0.mlp.experts.gate_up_proj.0 and 7 more expert matrices"
    assert any(note.startswith(first) for note in made.stages[-1].notes), made.stages[-1].notes
    stages = [QUANTIZE, {"recover": {"method": "bitfit", "targets": "down", **SHORT}}]
    recipe = chosen(tmp_path, mixture, small_text, stages, **FEW)
    assert any("a choice of fused experts alone leaves no trainable parameter" in line for line in refusals(recipe, mixture))
    with pytest.raises(UsageError, match="a choice of fused experts alone"):
        runner.run(recipe, tmp_path / "refused")


def test_experts_that_are_ignored_stay_what_they_were(mixture: Path, small_text: Path, tmp_path: Path) -> None:
    quantize = {"quantize": {"method": "rtn", "bits": 8, "group_size": 16, "ignore": [r"gate_up_proj\.[12]$"]}}
    run(tmp_path, mixture, small_text, quantize)
    whole = last(tmp_path, "baseline").tensor("model.layers.0.mlp.experts.gate_up_proj")
    for expert in range(4):
        record = last(tmp_path, "quantize").stored(f"model.layers.0.mlp.experts.gate_up_proj.{expert}")
        assert isinstance(record.base, DenseWeight) == (expert in (1, 2))
        if expert in (1, 2):
            assert torch.equal(record.dense(), whole[expert])
