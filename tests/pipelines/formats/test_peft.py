import json

import pytest
import torch
from bitmend.compress.weights import LowRank, StoredWeight
from bitmend.pipelines.errors import InputError, UsageError
from bitmend.pipelines.formats import gptq_files, peft, plain, registry
from bitmend.pipelines.stages.baseline import fingerprint
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM


def with_low_rank(name: str, record: StoredWeight) -> StoredWeight:
    """Ranks differ by module; one kind of module has none."""
    if name.endswith("k_proj"):
        return record
    rank = 5 if "mlp" in name else 3
    rows, columns = record.shape
    generator = torch.Generator().manual_seed(len(name))
    up, down = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return StoredWeight(record.base, low_rank=LowRank(up * 0.1, down * 0.1))


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
def test_peft_loads_the_adapter_on_the_base_and_reproduces_the_logits(kind, case, on_grid, logits_of, tmp_path):
    made = case(kind, on_grid, with_low_rank)
    registry.write("dense", made.checkpoint, tmp_path / "out", adapter=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out/base", dtype=torch.float32)
    without = logits_of(base)
    model = PeftModel.from_pretrained(base, str(tmp_path / "out/adapter"))
    assert all(set(m.scaling.values()) == {1.0} for m in model.modules() if isinstance(m, LoraLayer))
    torch.testing.assert_close(logits_of(model), made.logits(), rtol=0, atol=2e-5)
    assert (without - made.logits()).abs().max() > 0.05


def test_it_comes_back_as_records(case, on_grid, tmp_path):
    made = case("llama", on_grid, with_low_rank)
    registry.write("gptq", made.checkpoint, tmp_path / "out", adapter=True)
    back = registry.read(tmp_path / "out")
    assert set(back.linears) == set(made.checkpoint.linears)
    for name, record in made.checkpoint.linears.items():
        assert torch.equal(back.linears[name].dense(), record.dense())


@pytest.mark.parametrize("name", ["dense", "gptq"])
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_other_families_come_back_too(kind, name, case, on_grid, tmp_path):
    made = case(kind, on_grid, with_low_rank)
    registry.write(name, made.checkpoint, tmp_path / "out", adapter=True)
    assert registry.is_pair(tmp_path / "out")
    back = registry.read(tmp_path / "out")
    assert back.transposed == made.checkpoint.transposed and back.tied == made.checkpoint.tied
    for module, record in made.checkpoint.linears.items():
        assert torch.equal(back.linears[module].dense(), record.dense())


def test_on_a_dense_base_only_the_linears_it_reaches_become_records(case, on_grid, tmp_path):
    made = case("llama", on_grid, with_low_rank)
    peft.write(made.checkpoint, tmp_path / "out", plain.write)
    back = peft.read(tmp_path / "out", plain.read)
    assert "model.layers.0.self_attn.k_proj" not in back.linears
    name = "model.layers.0.mlp.up_proj"
    assert f"{name}.weight" not in back.tensors
    assert torch.equal(back.linears[name].dense(), made.checkpoint.linears[name].dense())


def test_nothing_to_write(case, on_grid, tmp_path):
    with pytest.raises(UsageError, match="no adapter to write"):
        peft.write(case("llama", on_grid).checkpoint, tmp_path / "out", gptq_files.write)


def test_experts_are_refused(case, on_grid, tmp_path):
    made = case("mixtral", on_grid, with_low_rank)
    with pytest.raises(UsageError, match="--format dense adds"):
        registry.write("gptq", made.checkpoint, tmp_path / "out", adapter=True)
    assert not list(tmp_path.iterdir())


BROKEN = [
    ({"peft_type": "IA3"}, "IA3"),
    ({"use_dora": True}, "DoRA"),
    ({"bias": "all"}, "biases"),
]


@pytest.mark.parametrize(("entry", "says"), BROKEN)
def test_adapters_of_another_kind(entry, says, case, on_grid, tmp_path):
    registry.write("dense", case("llama", on_grid, with_low_rank).checkpoint, tmp_path / "out", adapter=True)
    file = tmp_path / "out/adapter/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entry}))
    with pytest.raises(InputError, match=says):
        registry.read(tmp_path / "out")


def test_an_adapter_with_a_scaling_of_its_own(case, on_grid, tmp_path):
    made = case("llama", on_grid, with_low_rank)
    registry.write("dense", made.checkpoint, tmp_path / "out", adapter=True)
    file = tmp_path / "out/adapter/adapter_config.json"
    config = json.loads(file.read_text())
    config |= {"lora_alpha": 2 * config["r"], "alpha_pattern": {name: 2 * rank for name, rank in config["rank_pattern"].items()}}
    file.write_text(json.dumps(config))
    back = registry.read(tmp_path / "out").linears["model.layers.1.mlp.down_proj"]
    expected = made.checkpoint.linears["model.layers.1.mlp.down_proj"]
    assert expected.low_rank is not None
    torch.testing.assert_close(back.dense(), expected.dense() + expected.low_rank.dense())


def test_its_settings_are_part_of_what_the_model_is(case, on_grid, tmp_path):
    """Another scaling is another model, though no tensor moved."""
    registry.write("dense", case("llama", on_grid, with_low_rank).checkpoint, tmp_path / "out", adapter=True)
    file, before = peft.adapter_settings(tmp_path / "out"), fingerprint(tmp_path / "out")
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 40}))
    assert fingerprint(tmp_path / "out") != before
