"""Predicted bytes against what a pretended card's allocator counts, and what the program promises of large models."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.pipelines.bench.synthetic import Shape, write_model, write_text
from bitmend.pipelines.cli import explain
from bitmend.pipelines.commands.runs import predict as command
from bitmend.pipelines.devices.rates import Speeds
from bitmend.pipelines.errors import OutOfMemoryError, UsageError
from bitmend.pipelines.models.structure import skeleton
from bitmend.pipelines.planning import plan, run_costs
from bitmend.pipelines.planning.anatomy import Anatomy
from bitmend.pipelines.recipes.recipe import Recipe, resolve
from bitmend.pipelines.run import runner
from transformers import LlamaConfig

from .pretended import pretended_cuda

COMMON = {"max_position_embeddings": 8192, "tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"], "dtype": torch.bfloat16}
LARGE: dict[str, dict[str, int]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
}


def chosen(place: Path, model: Path, text: Path, stages: list[dict[str, Any]], **sections: Any) -> Recipe:
    path = place / "recipe.yaml"
    path.write_text(json.dumps({"stages": stages, "evaluation": {"seq_len": 64, "windows": 2}} | sections))
    return resolve(str(path), options={"model": str(model), "data": str(text)})


def outline(directory: Path, name: str) -> Path:
    """A model directory whose shards have their headers and holes in place of numbers."""
    directory.mkdir()
    config = LlamaConfig(vocab_size=128256, **LARGE[name], **COMMON)
    config.save_pretrained(directory)
    shards: dict[str, dict[str, Any]] = {}
    for tensor, value in skeleton(config).state_dict().items():
        shard = shards.setdefault("".join(part for part in tensor.split(".") if part.isdigit()) or "rest", {})
        begin = max((entry["data_offsets"][1] for entry in shard.values()), default=0)
        shard[tensor] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [begin, begin + 2 * value.numel()]}
    for shard, entries in shards.items():
        header = json.dumps(entries).encode()
        with (directory / f"{shard}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + max(entry["data_offsets"][1] for entry in entries.values()))
    places = {tensor: f"{shard}.safetensors" for shard, entries in shards.items() for tensor in entries}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return directory


def predicted(model: Path, gigabytes: float, *sets: str, recipe: str = "compress_and_recover") -> dict[str, Any]:
    asked = resolve(recipe, sets=list(sets), options={"model": str(model)})
    with pretended_cuda(total_memory=int(gigabytes * 1e9)), pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitmend.pipelines.stages.inputs.Inputs.check", lambda *_, **__: None)  # an outline has no tokenizer
        return plan.predict(asked, None, device="cuda")


@pytest.mark.parametrize("recipe", ["compress_and_recover", "sparse_compress_and_recover"])
def test_8b_through_the_packaged_recipes_on_a_card_of_24_gb(recipe: str, tmp_path: Path) -> None:
    made = predicted(outline(tmp_path / "8b", "8b"), 24, recipe=recipe)
    assert (made["device"], made["dtype"]) == ("cuda", "bfloat16") and made["parameters"] == 8_030_261_248
    assert made["refusals"] == made["shortages"] == []
    for row in made["stages"]:
        assert 3e9 < row["device_bytes"] <= 24e9 and 2e9 < row["host_bytes"] <= 32e9, row


def test_70b_through_quantize_and_decompose_on_a_card_of_48_gb(tmp_path: Path) -> None:
    stages = ("prune.method=none", "recover.method=none", "fuse.method=none")
    made = predicted(outline(tmp_path / "70b", "70b"), 48, *stages, recipe="sparse_compress_and_recover")
    assert [row["method"] for row in made["stages"][1:]] == ["gptq", "best"]
    assert made["shortages"] == [] and all(row["device_bytes"] <= 48e9 for row in made["stages"])


def test_what_will_not_fit_is_reported_with_what_would(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    few = {"calibration": {"samples": 2, "seq_len": 64}}
    recipe = chosen(
        tmp_path, small_model, small_text, [{"recover": {"method": "lora", "rank": 2, "batch_size": 64, "seq_len": 256}}], **few
    )
    with pretended_cuda(total_memory=100 << 20), pytest.raises(OutOfMemoryError) as caught:
        command(recipe, tmp_path / "run", "cuda", True)
    code, line = explain(caught.value)
    assert code == 5 and "recover needs about 0." in line and "0.1 GB are there; try --set recover.batch_size=32" in line


def test_a_device_or_dtype_that_is_not_there_is_refused(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    recipe = chosen(tmp_path, small_model, small_text, [RTN], dtype="bfloat16", calibration={"samples": 2, "seq_len": 64})
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="--device cuda: this torch sees no CUDA device"):
            plan.predict(recipe, None, "cuda")
    with pretended_cuda(capability=(7, 5)), pytest.raises(UsageError, match="has no bfloat16"):
        plan.predict(recipe, None, "cuda")


SHAPE = Shape(2, 256, 704, 8, 4, 512)
RTN: dict[str, Any] = {"quantize": {"method": "rtn", "bits": 4, "clip": "none"}}
TRAINED: dict[str, Any] = {"steps": 2, "batch_size": 4, "seq_len": 128, "eval_every": 2, "gradient_checkpointing": False}
CASES: dict[str, list[dict[str, Any]]] = {
    "wanda": [{"prune": {"method": "wanda"}}],
    "gptq": [{"quantize": {"method": "gptq"}}],
    "gptq, replayed": [{"quantize": {"method": "gptq", "true_sequential": True}}],
    "qera_exact": [RTN, {"decompose": {"method": "qera_exact", "rank": 4}}],
    "lora": [RTN, {"recover": {"method": "lora", **TRAINED}}],
    "scales": [RTN, {"recover": {"method": "scales", **TRAINED}}],
    "recomputed": [RTN, {"recover": {"method": "lora", **TRAINED, "gradient_checkpointing": True}}],
}
SLOW: dict[str, list[dict[str, Any]]] = {
    "rtn": [RTN],
    "nf4": [{"quantize": {"method": "nf4"}}],
    "sparsegpt": [{"prune": {"method": "sparsegpt"}}],
    "learned_rounding": [{"quantize": {"method": "learned_rounding", "steps": 2, "seq_len": 128}}],
    "block_training": [{"quantize": {"method": "block_training", "steps": 2, "seq_len": 128}}],
    "caldera": [RTN, {"decompose": {"method": "caldera", "rank": 4, "iterations": 1}}],
    "best": [RTN, {"decompose": {"method": "best", "rank": 4, "iterations": 2}}],
    "reconstruct": [RTN, {"recover": {"method": "reconstruct", "steps": 2, "samples": 8, "seq_len": 128}}],
    "reconstruct, factors under a mask": [
        {"prune": {"method": "magnitude"}},
        {"recover": {"method": "reconstruct", "steps": 2, "samples": 8, "seq_len": 128}},
    ],
    "reconstruct, weights": [
        {"prune": {"method": "magnitude"}},
        {"recover": {"method": "reconstruct", "train": "weights", "steps": 2, "samples": 8, "seq_len": 128}},
    ],
}


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shape")
    write_model(place / "model", SHAPE)
    write_text(place / "text.jsonl", SHAPE.vocabulary, 8 * 8 * 256)
    return place


def recipe_of(place: Path, scratch: Path, stages: list[dict[str, Any]]) -> Recipe:
    sections = {"calibration": {"samples": 8, "seq_len": 256}, "evaluation": {"seq_len": 256, "windows": 2}, "dtype": "float32"}
    return chosen(scratch, place / "model", place / "text.jsonl", stages, **sections)


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_device_bytes_of_a_stage(case: str, speaking: Path, tmp_path: Path) -> None:
    """Of the last stage and its evaluation, as the card's allocator counts them."""
    recipe = recipe_of(speaking, tmp_path, (CASES | SLOW)[case])
    with pretended_cuda():
        runner.run(recipe, tmp_path / "run", device="cuda", page=False)
        measured = torch.cuda.max_memory_allocated()
        row = plan.predict(recipe, None, "cuda")["stages"][-1]
    assert row["device_bytes"] == pytest.approx(measured, rel=0.2), (case, row["device_bytes"], measured)


def test_what_is_gathered_for_a_stage_is_counted_once(speaking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fisher information by the first stage that reads it; a budget's table before the first stage that it chooses for."""
    speeds = Speeds(dict.fromkeys((torch.float32, torch.float64), 1e8), 1e7, 1e8, 1e4, 1e9, 1e7)
    monkeypatch.setattr(run_costs, "measured", lambda compute: speeds)
    lq_lora = {"decompose": {"method": "lq_lora", "rank": 4, "iterations": 1}}
    few = {"bits": [3, 4], "group_sizes": [64], "ranks": [0, 4], "factor_bits": [16]}
    calibration = {"samples": 8, "seq_len": 256}

    def rows(stages: list[dict[str, Any]], **options: str) -> list[dict[str, Any]]:
        path = tmp_path / "recipe.yaml"
        sections = {"calibration": calibration, "evaluation": {"seq_len": 256, "windows": 2}, "dtype": "float32"}
        path.write_text(json.dumps({"stages": stages, **({"allocation": few} if "budget" in options else {})} | sections))
        given = {"model": str(speaking / "model"), "data": str(speaking / "text.jsonl")}
        return plan.predict(resolve(str(path), options=given | options), None, "cuda")["stages"]

    with pretended_cuda():
        first, second = rows([RTN, lq_lora, lq_lora])[2:]
        assert first["seconds"] > 1.2 * second["seconds"]
        gptq = {"quantize": {"method": "gptq"}}
        bare, chosen = rows([gptq])[1], rows([gptq], budget="4.5bpw")[1]
    assert chosen["seconds"] > first["seconds"] - second["seconds"] + bare["seconds"], "the table in addition to Fisher information"
    assert 26e6 < chosen["device_bytes"] < 39e6, "32.7e6 of it were measured while the table was built with GPTQ"


def test_a_large_batch_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs in a straight line what smaller ones do; one of ten million is answered at once."""
    anatomy = Anatomy(skeleton(LlamaConfig(**{**LARGE["8b"], "num_hidden_layers": 2}, vocab_size=512)))
    run = anatomy.step(12, 64, torch.bfloat16, False, "both")
    monkeypatch.setattr("bitmend.pipelines.planning.anatomy.LARGE_BATCH", 8)
    extended = anatomy.step(12, 64, torch.bfloat16, False, "both")
    assert extended.activations.peak == pytest.approx(run.activations.peak, rel=0.02)
    assert extended.work.passes == pytest.approx(run.work.passes, rel=0.02)
    assert anatomy.step(10_000_000, 64, torch.bfloat16, False, "both").activations.peak > 1e6 * run.activations.peak / 12


def test_blocks_alike_cost_alike() -> None:
    """Work and activations grow in a straight line with the number of blocks."""
    actual = {}
    for blocks in (2, 6):
        config = LlamaConfig(**{**LARGE["8b"], "num_hidden_layers": blocks}, vocab_size=512)
        anatomy = Anatomy(skeleton(config))
        actual[blocks] = anatomy.step(1, 64, torch.bfloat16, False, "both"), anatomy.forward(8, 256, torch.bfloat16)
    (two, running), (six, also) = actual[2], actual[6]
    assert running == also and two.work == six.work
    assert six.activations.saved == pytest.approx(3 * two.activations.saved, rel=0.1)
