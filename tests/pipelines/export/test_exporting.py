"""Exports of a run: what other programs read is what the run measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.pipelines.errors import InputError, QualityError, UsageError
from bitmend.pipelines.export import exporting
from bitmend.pipelines.recipes.recipe import resolve
from bitmend.pipelines.run import runner
from bitmend.pipelines.run.opening import opened
from transformers import AutoModelForCausalLM

from ..families import save_speaking, tiny_model
from ..runs import chosen

pytestmark = pytest.mark.usefixtures("no_pages")


def stage(run: Path, name: str) -> Any:
    return next(s for s in runner.record(run).stages if s.stage == name)


@pytest.fixture(scope="module")
def gptq(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quantized stage as a GPTQ checkpoint."""
    directory = tmp_path_factory.mktemp("gptq") / "model"
    exporting.export(finished, "gptq", directory, stage="quantize")
    return directory


def test_dense_is_what_transformers_loads(finished: Path, tmp_path: Path) -> None:
    actual = exporting.export(finished, "dense", tmp_path / "dense", stage="quantize")
    assert actual["perplexity"] == pytest.approx(stage(finished, "quantize").perplexity, rel=1e-5)
    assert actual["artifact_perplexity"] == stage(finished, "quantize").perplexity
    assert actual["total_bytes"] == sum(p.stat().st_size for p in (tmp_path / "dense").glob("*.safetensors"))
    assert any("masks themselves have no place" in note for note in actual["notes"])
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    artifact = runner.last_artifact(finished, "quantize")
    for name in artifact.linears:
        assert torch.equal(loaded.get_submodule(name).weight, artifact.stored(name).dense())
    card = (tmp_path / "dense" / "README.md").read_text()
    assert f"{stage(finished, 'quantize').perplexity:.2f}"[:4] in card
    assert (tmp_path / "dense" / "tokenizer.json").is_file()


def test_a_low_rank_run_is_a_base_and_an_adapter(finished: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    actual = exporting.export(finished, "dense", tmp_path / "out", adapter=True)
    assert actual["stage"] == "fuse" and actual["read_by"] == ["PEFT 0.21 on transformers"]
    assert actual["total_bytes"] == pytest.approx(exporting.predict(finished, "dense", adapter=True)["total_bytes"], rel=0.002)
    assert actual["perplexity"] == pytest.approx(stage(finished, "fuse").perplexity, rel=1e-3)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    model = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).merge_and_unload()  # type: ignore[arg-type]
    artifact = runner.last_artifact(finished)
    for name in artifact.linears:
        torch.testing.assert_close(model.get_submodule(name).weight, artifact.stored(name).dense(), rtol=1e-4, atol=1e-4)


def test_by_itself_a_dense_export_is_one_model_with_the_term_in_it(finished: Path, tmp_path: Path) -> None:
    actual = exporting.export(finished, "dense", tmp_path / "out")
    artifact = runner.last_artifact(finished)
    pruned = sum(artifact.stored(name).mask is not None for name in artifact.linears)
    assert actual["notes"][0].startswith("one plain model: the low-rank terms of 28 linears are added into their weights; --adapter keeps")
    assert actual["notes"][1] == f"{pruned} pruned linears: the low-rank term fills their zeros; --adapter keeps them"
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name in artifact.linears:
        assert torch.equal(model.get_submodule(name).weight, artifact.stored(name).dense())
    assert not (tmp_path / "out" / "adapter").exists() and actual["read_by"] == ["transformers 5.24"]
    assert "## Read by\n\nKnown to read exactly this file:\n\n- transformers 5.24\n" in (tmp_path / "out" / "README.md").read_text()


def test_a_dry_run_counts_refuses_and_names_who_reads_it(finished: Path, gptq: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"28 linears have a low-rank term, which gptq has no place for: --adapter keeps it .* --format dense"):
        exporting.predict(finished, "gptq")
    with pytest.raises(UsageError, match=r"no linear of this model has a low-rank term, .* leave --adapter out"):
        exporting.predict(finished, "gptq", stage="quantize", adapter=True)
    with pytest.raises(UsageError, match="bitsandbytes holds NormalFloat4, not uniform 3-bit grids"):
        exporting.predict(finished, "bnb", stage="quantize")
    actual = exporting.predict(finished, "gptq", stage="quantize")
    assert actual["read_by"] == ["auto-gptq 0.7.1"] and "--format dense" in actual["changes_for_others"]["transformers 5.24"]
    header = 8 + int.from_bytes((gptq / "model.safetensors").read_bytes()[:8], "little")
    assert actual["total_bytes"] == (gptq / "model.safetensors").stat().st_size - header
    assert "28 pruned linears" in " ".join(actual["notes"])


def test_a_quantized_run_is_a_gptq_checkpoint(gptq: Path, finished: Path) -> None:
    config = json.loads((gptq / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("gptq", 3, 32)
    with opened(str(gptq)) as read:
        artifact = runner.last_artifact(finished, "quantize")
        assert set(read.linears) == set(artifact.linears)
        for name in artifact.linears:
            torch.testing.assert_close(read.stored(name).dense(), artifact.stored(name).dense(), rtol=1e-3, atol=1e-4)
    assert read.total_bytes() < 0.6 * stage(finished, "baseline").total_bytes


def test_an_export_that_measures_otherwise_is_refused(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = exporting.checkpoint_of

    def damaged(*arguments: Any) -> Any:
        checkpoint = plain(*arguments)
        name = "model.norm.weight"
        tensors = {n: checkpoint.tensors[n] for n in checkpoint.tensors}
        tensors[name] = tensors[name] * 3
        return type(checkpoint)(**{**vars(checkpoint), "tensors": tensors})

    monkeypatch.setattr(exporting, "checkpoint_of", damaged)
    with pytest.raises(QualityError, match=r"reads back with perplexity .* do not use it") as caught:
        exporting.export(finished, "dense", tmp_path / "dense", stage="prune")
    assert caught.value.exit_code == 4


def test_what_cannot_be_exported_is_reported(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no stage 'melt'"):
        exporting.export(finished, "dense", tmp_path / "a", stage="melt")
    with pytest.raises(UsageError, match="unknown format 'onnx'"):
        exporting.export(finished, "onnx", tmp_path / "a", stage="quantize")
    with pytest.raises(UsageError):
        exporting.export(finished, "gptq", tmp_path / "a", stage="prune")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "opt"])
def test_other_families(family: str, tmp_path: Path, small_model: Path, small_text: Path) -> None:
    save_speaking(family, tmp_path / "source", small_model)
    chain = [{"quantize": {"method": "rtn", "bits": 4, "group_size": 16}}]
    sections = {"evaluation": {"seq_len": 32, "windows": 2}, "calibration": {"samples": 1, "seq_len": 32}}
    made = runner.run(chosen(tmp_path, tmp_path / "source", small_text, chain, **sections), tmp_path / "run")
    actual = exporting.export(tmp_path / "run", "dense", tmp_path / "out")
    assert actual["perplexity"] == pytest.approx(made.stages[-1].perplexity, rel=1e-5)
    ids = torch.arange(3, 27).view(1, -1)
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "source")(ids).logits
    assert 0 < float((ours - theirs).abs().max()) < float(theirs.abs().max())


def test_a_quantized_checkpoint_recovers_towards_its_teacher(gptq: Path, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    """`pipeline run recover -m CHECKPOINT --teacher DENSE`: its scales train, no byte is added."""
    sets = ["evaluation.seq_len=64", "evaluation.windows=6", "calibration.samples=2", "calibration.seq_len=64"]
    sets += ["recover.steps=6", "recover.batch_size=1", "recover.seq_len=64", "recover.eval_every=3"]
    options = {"model": str(gptq), "data": str(small_text), "teacher": str(small_model)}
    recipe = resolve("recover", sets=sets, options=options)
    made = runner.run(recipe, tmp_path / "run")
    assert [s.method for s in made.stages] == [None, "scales", "bind"]
    before, after, fused = made.stages
    assert before.perplexity is not None and after.perplexity is not None
    assert before.bits_per_weight is not None and before.bits_per_weight < 5, "what came quantized is counted as it is stored"
    assert after.perplexity < before.perplexity
    assert after.total_bytes == before.total_bytes and after.bits_per_weight == before.bits_per_weight
    assert fused.perplexity == pytest.approx(after.perplexity, rel=1e-3)
    first, last = (runner.last_artifact(tmp_path / "run", name) for name in ("baseline", "recover"))
    name = "model.layers.0.mlp.up_proj.base"
    assert torch.equal(first.tensor(f"{name}.codes"), last.tensor(f"{name}.codes"))
    assert not torch.equal(first.tensor(f"{name}.scales"), last.tensor(f"{name}.scales"))
    assert len(list((tmp_path / "run" / "stages").glob("teacher-????????"))) == 1
    runner.gc(tmp_path / "run")
    assert len(list((tmp_path / "run" / "stages").glob("teacher-????????"))) == 1
    assert runner.resume(tmp_path / "run").stages[-1].perplexity == fused.perplexity


def test_without_a_teacher_it_learns_from_text(gptq: Path, small_text: Path, tmp_path: Path) -> None:
    chain = [{"recover": {"method": "scales", "steps": 1, "batch_size": 1, "seq_len": 64}}]
    made = runner.run(chosen(tmp_path, gptq, small_text, chain), tmp_path / "run")
    assert any("next-token cross-entropy" in note for note in made.stages[-1].notes)


def test_a_teacher_of_another_vocabulary_is_refused(gptq: Path, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    save_speaking("llama", tmp_path / "teacher", small_model)
    tiny_model("llama", vocab_size=1032).save_pretrained(tmp_path / "teacher")
    chain = [{"recover": {"method": "scales", "steps": 1, "batch_size": 1, "seq_len": 64}}]
    recipe = chosen(tmp_path, gptq, small_text, chain, teacher=str(tmp_path / "teacher"))
    with pytest.raises(UsageError, match="recover: --teacher: its vocabulary has 1032 tokens, the model's has 1024"):
        runner.run(recipe, tmp_path / "run")
