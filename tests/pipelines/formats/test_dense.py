from functools import partial
from typing import Any

import pytest
import torch
from bitmend.compress.weights import LowRank, StoredWeight
from bitmend.pipelines.formats import registry
from bitmend.pipelines.formats.plain import read, write
from transformers import AutoModelForCausalLM

FAMILIES = ["llama", "opt", "gpt2", "gpt_neox", "qwen3_moe", "mixtral"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_transformers_loads_it_and_gives_the_same_logits(kind, case, on_grid, logits_of, tmp_path):
    made = case(kind, on_grid)
    write(made.checkpoint, tmp_path / "out")
    answer: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    loaded, report = answer
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    torch.testing.assert_close(logits_of(loaded), made.logits(), rtol=0, atol=1e-5)


def test_small_shards_hold_the_same_tensors_and_have_an_index(case, on_grid, tmp_path):
    made = case("llama", on_grid)
    write(made.checkpoint, tmp_path / "one")
    write(made.checkpoint, tmp_path / "many", shard_bytes=60_000)
    files = sorted(tmp_path.glob("many/*.safetensors"))
    assert len(files) > 3 and (tmp_path / "many/model.safetensors.index.json").is_file()
    assert not (tmp_path / "one/model.safetensors.index.json").exists()
    one, many = read(tmp_path / "one").tensors, read(tmp_path / "many").tensors
    assert set(one) == set(many)
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_dtype_is_what_was_asked_for_and_the_config_says_so(case, on_grid, tmp_path):
    made = case("llama", on_grid)
    write(made.checkpoint, tmp_path / "out", dtype=torch.bfloat16)
    back = read(tmp_path / "out")
    assert back.config["dtype"] == back.config["torch_dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in back.tensors.values()} == {torch.bfloat16}


def test_smoothing_mask_and_low_rank_are_folded_in(case, on_grid, logits_of, tmp_path):
    def extra(name: str, record: StoredWeight) -> StoredWeight:
        rows, columns = record.shape
        generator = torch.Generator().manual_seed(len(name))
        low_rank = LowRank(torch.randn(rows, 3, generator=generator) * 0.1, torch.randn(3, columns, generator=generator) * 0.1)
        smooth = torch.rand(columns, generator=generator) + 0.5
        kept = torch.rand(rows, columns, generator=generator) > 0.4
        return StoredWeight(record.base, low_rank=low_rank, smooth=smooth).with_mask(kept)

    made = case("gpt2", partial(on_grid, bits=3), extra)
    notes = write(made.checkpoint, tmp_path / "out")
    assert any("8 pruned linears" in note for note in notes)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits_of(loaded), made.logits(), rtol=0, atol=1e-5)


def test_registry_detects_it(case, on_grid, tmp_path):
    registry.write("dense", case("llama", on_grid).checkpoint, tmp_path / "out")
    assert registry.detect(tmp_path / "out") == "dense"


@pytest.mark.parametrize("kind", FAMILIES)
def test_it_comes_back_under_the_names_in_memory(kind, case, on_grid, tmp_path):
    made = case(kind, on_grid)
    write(made.checkpoint, tmp_path / "out")
    back = read(tmp_path / "out")
    state = {name: tensor for name, tensor in made.model.state_dict().items() if name not in back.tied}
    assert set(back.tensors) == set(state)
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in state.items())
