"""Models made on the spot, and runs of them in processes of their own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.pipelines.bench import benchmarks, scaling, shape
from bitmend.pipelines.bench.benchmarks import Options
from bitmend.pipelines.bench.synthetic import SHAPES, Shape, write_model, write_text
from bitmend.pipelines.errors import UsageError
from bitmend.pipelines.models.structure import skeleton
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

TINY = Shape(2, 64, 128, 4, 2, 96)
TEXT = {"calibration": {"samples": 4, "seq_len": 64}, "evaluation": {"seq_len": 64, "windows": 2}}


def test_a_model_is_written_in_shards_and_read_by_transformers(tmp_path: Path) -> None:
    count = write_model(tmp_path / "a", TINY, shard_bytes=40_000)
    write_model(tmp_path / "b", TINY)
    assert len(list((tmp_path / "a").glob("model-*-of-*.safetensors"))) > 2
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ab")
    assert one.dtype == torch.bfloat16 and count == sum(p.numel() for p in one.parameters())
    assert all(torch.equal(x, y) for x, y in zip(one.parameters(), other.parameters(), strict=True)), "shards change nothing"
    write_text(tmp_path / "text.jsonl", 96, 1000, document=64)
    rows = [json.loads(line)["text"] for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    ids = [AutoTokenizer.from_pretrained(tmp_path / "a")(row)["input_ids"] for row in rows]
    assert sum(map(len, ids)) == 1000 and ids[0] == [int(word[1:]) for word in rows[0].split()]
    assert torch.isfinite(one(torch.tensor([ids[0][:16]])).logits).all()


def test_1b_is_what_it_says() -> None:
    shape = SHAPES["1b"]
    assert (shape.blocks, shape.width, shape.intermediate, shape.heads, shape.kv_heads, shape.vocabulary) == (22, 2048, 5632, 32, 4, 32000)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    assert sum(p.numel() for p in skeleton(config).parameters()) == 1_100_048_384


@pytest.mark.parametrize(("name", "parameters"), [("8b", 8_030_261_248), ("70b", 70_553_706_496)])
def test_larger_shapes_are_llama_3s(name: str, parameters: int) -> None:
    shape = SHAPES[name]
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.intermediate, num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, tie_word_embeddings=False,
    )  # fmt: skip
    assert sum(p.numel() for p in skeleton(config).parameters()) == parameters


def test_a_row_of_a_shape_is_a_process(tmp_path: Path) -> None:
    """Training steps, the other kind of row, run on the pretended card (tests/device/test_make_gpu.py)."""
    row = shape.Bench("tiny", TINY, TEXT, "cpu", tmp_path).row("quantize", "rtn", shape.in_a_process)
    assert "error" not in row and row["seconds_per_block"] == row["seconds"] / 2 > 0 and 4 < row["bits_per_weight"] < 5
    assert 100e6 < row["host_peak_bytes"] < 1.2e9 and row["device_peak_bytes"] is None


def test_a_row_is_a_run_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the parent holds does not count: the child's own high-water mark is what it says."""
    monkeypatch.setattr(scaling, "SMALL", TINY)
    held = torch.ones(200_000_000)
    (row,) = benchmarks.run("compress", Options("cpu", only=("rtn",), output=tmp_path, depths=(1,)))["rows"]
    assert held[0] == 1
    assert row["blocks"] == 1 and row["parameters"] == 49_344 and row["seconds"] > 0
    assert 100e6 < row["peak_bytes"] < 800e6
    assert 4 < row["bits_per_weight"] < 5
    assert row["perplexity"] != row["baseline_perplexity"]
    written = json.loads((tmp_path / "bench-compress-depths.json").read_text())
    assert written["rows"] == [row] and written["growth"] == []
    assert "| peak_bytes" in (tmp_path / "bench-compress-depths.md").read_text()


def test_time_and_memory_against_the_number_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "SMALL", TINY)

    def launch(recipe: Path, directory: Path, device: str) -> dict[str, Any]:
        settings = json.loads(recipe.read_text())
        blocks = json.loads((Path(settings["model"]) / "config.json").read_text())["num_hidden_layers"]
        if blocks == 3:
            return {"error": "the process ended with -9 (out of memory?)"}
        last = {"seconds": 5.0 + 2.0 * blocks, "total_bytes": 1, "bits_per_weight": 4.5, "perplexity": 9.0}
        return {"record": {"stages": [{"perplexity": 8.0}, last]}, "peak_bytes": 1000 + blocks}

    rows = scaling.by_depth([1, 2, 3, 4], [("quantize", "gptq")], "cpu", tmp_path, launch)
    assert [row.get("seconds") for row in rows] == [7.0, 9.0, None, 13.0]
    assert rows[2]["error"] == "the process ended with -9 (out of memory?)"
    (actual,) = scaling.growth(rows)
    assert actual["seconds_per_block"] == pytest.approx(2.0) and actual["seconds_beside"] == pytest.approx(5.0)
    assert actual["largest_deviation"] == pytest.approx(0, abs=1e-12) and actual["peak_growth"] == pytest.approx(3 / 1001)
    assert scaling.growth(rows[:1]) == []


def test_a_process_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling.sys, "executable", shutil.which("false"))
    assert scaling.in_a_process(tmp_path / "r.yaml", tmp_path / "run", "cpu") == {"error": "the process ended with 1"}


@pytest.mark.parametrize(("subject", "options", "words"), [
    ("decompose", Options(depths=(4,)), "--depths makes models of its own to compress"),
    ("compress", Options(depths=(4,), model="demo"), "alone and without --model"),
    ("compress", Options(depths=(4,), shape="1b"), "alone"),
    ("compress", Options(shape="7b"), "unknown shape '7b'"),
    ("compress", Options(shape="8b", only=("gtpq",)), "did you mean 'gptq'"),
    ("compress", Options(blocks=2), "--blocks says how many blocks of a --shape"),
    ("compress", Options(depths=(4,), only=("gtpq",)), "did you mean 'gptq'"),
])  # fmt: skip
def test_refusals(subject: str, options: Options, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        benchmarks.run(subject, options)


@pytest.mark.parametrize("shape", [scaling.SMALL, *SHAPES.values()])
def test_groups_and_blocks_of_every_default_divide_every_shape(shape: Shape) -> None:
    assert not [n for n in (shape.width, shape.intermediate, shape.width // shape.heads * shape.kv_heads) if n % 64]
    assert shape.width % shape.heads == 0 == shape.heads % shape.kv_heads
