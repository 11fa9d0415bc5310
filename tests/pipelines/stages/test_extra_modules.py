"""Bottlenecks and virtual tokens, end to end: trained, stored, measured, fused, loaded, written by, exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.pipelines.errors import InputError, UsageError
from bitmend.pipelines.evaluation.perplexity import last_hidden
from bitmend.pipelines.export import exporting
from bitmend.pipelines.models.blocks import StreamedModel
from bitmend.pipelines.planning.plan import predict
from bitmend.pipelines.recipes.recipe import resolve
from bitmend.pipelines.run.evaluate import evaluate
from bitmend.pipelines.run.generate import generate
from bitmend.pipelines.run.opening import load
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ..runs import stage_directory
from ..toy import CPU, RTN, STEPS, held_out_loss, opened, run, toy_text

pytestmark = pytest.mark.usefixtures("no_pages")

OWN: dict[str, dict[str, Any]] = {
    "serial_adapter": {"bottleneck": 8},
    "parallel_adapter": {"bottleneck": 8},
    "mam_adapter": {"bottleneck": 8, "tokens": 4},
    "prefix_tuning": {"tokens": 4},
    "prompt_tuning": {"tokens": 4},
    "p_tuning": {"tokens": 4, "hidden": 16},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run directory: its quantized stage is shared."""
    directory = tmp_path_factory.mktemp("extra-modules")
    toy_text(directory / "toy.jsonl")
    return directory


@pytest.fixture(autouse=True)
def short_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitmend.pipelines.stages.inputs.HELD_OUT_TOKENS", 256)


def recovered(place: Path, small_model: Path, method: str, *more: dict[str, Any], **changes: Any) -> Any:
    made = run(place, small_model, place / "toy.jsonl", [RTN, {"recover": {"method": method, **STEPS, **OWN[method], **changes}}, *more])
    return next(s for s in made.stages if s.stage == "recover")


def predicted_bytes(place: Path) -> int:
    recipe = resolve(str(place / "run" / "recipe.resolved.yaml"))
    return next(row["total_bytes"] for row in predict(recipe)["stages"] if row["stage"] == "recover")


def inodes(place: Path, address: str, pattern: str) -> set[int]:
    return {p.stat().st_ino for p in stage_directory(place / "run", address).glob(pattern)}


@pytest.mark.parametrize("method", OWN)
def test_trained_extra_modules_are_in_the_artifact(method: str, place: Path, small_model: Path) -> None:
    stage = recovered(place, small_model, method)
    artifact, before = opened(place, "recover"), opened(place, "quantize")
    artifact.verify()
    assert stage.metrics["held_out_loss_best"] < stage.metrics["held_out_loss_start"] - 0.05
    assert held_out_loss(place, artifact) == pytest.approx(stage.metrics["held_out_loss_kept"], abs=1e-4)
    assert held_out_loss(place, before) == pytest.approx(stage.metrics["held_out_loss_start"], abs=1e-4), "the start has no tokens"
    (kept,) = artifact.extra_modules
    assert kept.method == method and artifact.total_bytes() > before.total_bytes()
    assert predicted_bytes(place) == pytest.approx(artifact.total_bytes(), rel=0.01)
    assert set(artifact.linears) == set(before.linears) and set(artifact.index) == set(before.index)
    assert inodes(place, "recover", "block-*") == inodes(place, "quantize", "block-*"), "the model itself is untouched"
    count = OWN[method].get("tokens")
    assert (kept.virtual() is None) == (count is None) and (count is None or kept.virtual().count == count)  # type: ignore[union-attr]
    ids = torch.arange(5, 37).view(2, 16)
    streamed, model = StreamedModel(artifact, CPU), load(stage_directory(place / "run", "recover"))
    with torch.no_grad():
        ours = streamed.logits(last_hidden(streamed, ids))
        loaded = model(ids).logits
    assert loaded.shape == ours.shape
    torch.testing.assert_close(loaded, ours, rtol=0, atol=0.15)  # on kernels that hold 16-bit scales


@pytest.mark.parametrize("method", ["mam_adapter", "prompt_tuning"])
def test_later_stages_take_it_over_and_it_writes(method: str, place: Path, small_model: Path) -> None:
    """Fused, compressed again, and writing with a cache what it writes without one."""
    stage = recovered(place, small_model, method, {"fuse": {}}, {"prune": {"method": "magnitude", "sparsity": 0.05}})
    fused, pruned = opened(place, "fuse"), opened(place, "prune")
    assert inodes(place, "recover", "*.safetensors") == inodes(place, "fuse", "*.safetensors")
    assert inodes(place, "recover", "adapter-*") == inodes(place, "prune", "adapter-*") != set()
    assert held_out_loss(place, fused) == pytest.approx(stage.metrics["held_out_loss_kept"], abs=1e-4)
    assert len(pruned.extra_modules) == 1 and held_out_loss(place, pruned) < stage.metrics["held_out_loss_start"]
    directory = stage_directory(place / "run", "recover")
    written = "".join(generate(directory, "The river is", max_new_tokens=8, device="cpu"))
    streamed, tokenizer = StreamedModel(opened(place, "recover"), CPU), _tokenizer(directory)
    ids = tokenizer("The river is", return_tensors="pt").input_ids
    begun = ids.shape[1]
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat((ids, streamed.logits(last_hidden(streamed, ids))[:, -1:].argmax(-1)), 1)
    assert written == tokenizer.decode(ids[0, begun:], skip_special_tokens=True)


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning", "p_tuning"])
def test_virtual_tokens_are_exported_for_peft(method: str, place: Path, small_model: Path, tmp_path: Path) -> None:
    stage = recovered(place, small_model, method)
    with pytest.raises(UsageError, match=r"\d+ virtual tokens stand before this model and merge into nothing; --adapter writes"):
        exporting.export(place / "run", "dense", tmp_path / "out", stage="recover")
    actual = exporting.export(place / "run", "dense", tmp_path / "out", stage="recover", adapter=True)
    assert actual["perplexity"] == pytest.approx(stage.perplexity, rel=1e-4), "read back, tokens in front"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    theirs: Any = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter"))  # type: ignore[arg-type]
    streamed, ids = StreamedModel(opened(place, "recover"), CPU), torch.arange(5, 37).view(2, 16)
    with torch.no_grad():
        ours = streamed.logits(last_hidden(streamed, ids))
        logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -16:]
    torch.testing.assert_close(logits, ours, rtol=1e-4, atol=1e-3)
    again = evaluate(str(tmp_path / "out"), eval_source=str(place / "toy.jsonl"), seq_len=32, windows=4, device="cpu")
    without = evaluate(str(tmp_path / "out" / "base"), eval_source=str(place / "toy.jsonl"), seq_len=32, windows=4, device="cpu")
    assert again["perplexity"] < without["perplexity"]


def test_what_no_format_carries_is_refused(place: Path, small_model: Path, tmp_path: Path) -> None:
    recovered(place, small_model, "serial_adapter")
    for options in ({}, {"merge": True}, {"adapter": True}):
        with pytest.raises(UsageError, match="serial_adapter adds bottleneck modules, which cannot be merged"):
            exporting.export(place / "run", "dense", tmp_path / "out", stage="recover", **options)
    assert not (tmp_path / "out").exists()
    recovered(place, small_model, "prompt_tuning", {"decompose": {"method": "loftq", "rank": 2}})
    with pytest.raises(UsageError, match="a low-rank term or virtual tokens, not both"):
        exporting.export(place / "run", "gptq", tmp_path / "out", stage="decompose", adapter=True)


def test_a_second_recovery_trains_with_the_first_in_place(place: Path, small_model: Path) -> None:
    stage = recovered(place, small_model, "mam_adapter", {"recover": {"method": "serial_adapter", **STEPS, "bottleneck": 4}})
    artifact = opened(place, "recover.2")
    assert [b.method for b in artifact.extra_modules] == ["mam_adapter", "serial_adapter"]
    assert held_out_loss(place, artifact) < stage.metrics["held_out_loss_kept"]
    with pytest.raises(UsageError, match=r"recover\.2: prompt_tuning trains virtual tokens, and recover puts some in front already"):
        recovered(place, small_model, "mam_adapter", {"recover": {"method": "prompt_tuning", **STEPS}})


def test_without_gain_nothing_is_kept(place: Path, small_model: Path) -> None:
    stage = recovered(place, small_model, "mam_adapter", learning_rate=30.0)
    assert any("could not improve" in note for note in stage.notes)
    assert opened(place, "recover").extra_modules == []
    assert inodes(place, "recover", "*.safetensors") == inodes(place, "quantize", "*.safetensors")


def test_a_damaged_adapter_is_named(place: Path, small_model: Path) -> None:
    recovered(place, small_model, "prompt_tuning")
    artifact = opened(place, "recover")
    described = artifact.manifest["beside"]["adapter-00"]
    described["shapes"] = {"tokens": [9, 9]}
    with pytest.raises(InputError, match="does not match its manifest"):
        _ = artifact.extra_modules
