import json

import pytest
import torch
from bitmend.pipelines.formats import registry
from bitmend.pipelines.formats.checkpoint import Checkpoint
from bitmend.pipelines.formats.folder import model_card, portable_config
from transformers import AutoConfig


@pytest.mark.parametrize(
    ("rope", "old"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
        (
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        ({"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.25}, {"rotary_emb_base": 2e4, "rotary_pct": 0.25}),
        (
            {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}, "sliding_attention": {"rope_theta": 1e4}},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        ),
    ],
)
def test_the_rope_is_stored_as_transformers_4_reads_it(rope, old):
    config = portable_config({"rope_parameters": rope, "dtype": "torch.bfloat16"})
    assert old.items() <= config.items()
    assert config["rope_parameters"] == rope and config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert "rope_scaling" in old or "rope_scaling" not in config


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gemma3_text", "qwen3_moe", "phi3"])
def test_transformers_5_reads_the_same_config_with_both_names(kind, tmp_path):
    plain = AutoConfig.for_model(kind, pad_token_id=0).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(portable_config(plain)))
    back = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert back.get("rope_parameters") == plain.get("rope_parameters")


def test_the_card_says_what_was_done_and_how_it_was_measured():
    card = {
        "title": "demo after recover",
        "recipe": [{"quantize": {"bits": 3}}],
        "perplexity": 33.123456,
        "baseline_perplexity": 28.7,
        "protocol": {"seq_len": 512, "windows": 40, "join": "\n\n", "details": {"documents": 6, "sample_seed": None}},
        "notes": ["made for a test"],
    }
    text = model_card(card, ["a mask was lost"], "load(it)")
    for part in (
        "# demo after recover",
        "| Perplexity | 33.1235 |",
        "before compression | 28.7 |",
        "- windows: 40",
        '"bits": 3',
        "load(it)",
    ):
        assert part in text
    assert '- join: "\\n\\n"' in text and "- documents: 6" in text and "sample" not in text
    assert "- made for a test" in text and "- a mask was lost" in text


def test_a_card_that_knows_nothing_claims_nothing():
    text = model_card({}, [], "load(it)")
    assert "erplexity" not in text and "None" not in text and "Notes" not in text


@pytest.mark.parametrize("name", ["dense", "gptq", "gptq-v2", "compressed-tensors"])
def test_tokenizer_and_generation_config_come_along(name, single, on_grid, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in ("tokenizer.json", "generation_config.json", "model.safetensors", "config.json", "training_args.bin"):
        (source / file).write_text(file)
    made = single(on_grid(torch.randn(64, 64)))
    registry.write(name, Checkpoint(made.config, made.linears, made.tensors, source), tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_text() == "tokenizer.json"
    assert (tmp_path / "out/generation_config.json").read_text() == "generation_config.json"
    assert (tmp_path / "out/config.json").read_text() != "config.json" and not (tmp_path / "out/training_args.bin").exists()
    assert (tmp_path / "out/README.md").is_file()
