from dataclasses import replace
from functools import partial

import pytest
import torch
from bitmend.compress.weights import DenseWeight, StoredWeight
from bitmend.pipelines.errors import InputError, UsageError
from bitmend.pipelines.formats import registry
from bitmend.pipelines.formats.checkpoint import Checkpoint
from bitmend.pipelines.formats.fusing import to_memory
from bitmend.pipelines.formats.naming import Names, by_layer, to_file
from safetensors.torch import load_file, save_file

GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "gpt_neox", "qwen3_moe", "mixtral"])
def test_to_the_file_and_back_is_the_identity(kind, case, on_grid):
    checkpoint = case(kind, on_grid).checkpoint
    back = to_memory(to_file(checkpoint))
    assert set(back.linears) == set(checkpoint.linears) and set(back.tensors) == set(checkpoint.tensors)
    assert back.tied == checkpoint.tied and back.transposed == checkpoint.transposed
    assert all(torch.equal(back.linears[name].dense(), record.dense()) for name, record in checkpoint.linears.items())
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in checkpoint.tensors.items())


def test_experts_left_dense_are_fused_again(case):
    made = case("mixtral", lambda weight: DenseWeight(weight.clone())).checkpoint
    fused = torch.stack([made.linears[f"{GATE_UP}.{i}"].dense() for i in range(4)])
    linears = {name: record for name, record in made.linears.items() if not name.startswith(f"{GATE_UP}.")}
    checkpoint = replace(made, linears=linears, tensors={**made.tensors, GATE_UP: fused})
    written = to_file(checkpoint)
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in written.tensors
    back = to_memory(written)
    assert torch.equal(back.tensors[GATE_UP], fused)


def test_architectures_whose_files_keep_experts_fused_are_refused(on_grid):
    config = dict(
        model_type="gpt_oss", hidden_size=64, intermediate_size=64, num_local_experts=2, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96,
    )  # fmt: skip
    linears = {f"{GATE_UP}.{i}": StoredWeight(on_grid(torch.randn(128, 64))) for i in range(2)}
    with pytest.raises(UsageError, match=r"gate_up_proj\.0: this architecture.*--format dense"):
        to_file(Checkpoint(config, linears, {}, transposed=frozenset([GATE_UP])))


def test_a_matrix_of_another_size_than_the_config_says(single, on_grid):
    made = single(on_grid(torch.randn(64, 32)))
    back = to_memory(replace(made, config={**made.config, "intermediate_size": 96}))
    with pytest.raises(InputError, match=r"up_proj is 64 × 32; by config\.json it is 96 × 32"):
        list(back.linears.values())
    back = to_memory(replace(made, tensors={"model.norm.weight": torch.ones(31)}))
    with pytest.raises(InputError, match=r"model\.norm\.weight has shape \[31\]; by config\.json it has \[32\]"):
        list(back.tensors.values())


def test_a_model_type_nobody_knows(single, on_grid, tmp_path):
    made = single(on_grid(torch.randn(64, 64)))
    with pytest.raises(InputError, match="'nobody'"):
        registry.write("gptq", replace(made, config={**made.config, "model_type": "nobody"}), tmp_path / "out")


@pytest.fixture
def experts(case, on_grid, tmp_path):
    registry.write("gptq", case("mixtral", partial(on_grid, act_order=True)).checkpoint, tmp_path / "out")
    return tmp_path / "out"


def test_an_expert_that_is_missing(experts):
    file = experts / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if ".experts.2.w3." not in name}
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"no tensor .*experts\.2\.w3\.weight, which .*gate_up_proj is made of"):
        registry.read(experts)


def test_gate_and_up_with_groups_of_their_own_cannot_be_fused(experts):
    file = experts / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.block_sparse_moe.experts.2.w3.g_idx"
    tensors[name] = tensors[name].flip(0).clone()
    save_file(tensors, file)
    with pytest.raises(InputError, match="their g_idx differ"):
        list(registry.read(experts).linears.values())


def test_layers_stay_together():
    assert by_layer(["a.0.x", "b", "a.1.x", "a.0.y.3.z"]) == [["a.0.x", "a.0.y.3.z"], ["b"], ["a.1.x"]]


def test_unequal_copies_of_a_tied_weight_untie_it(case, on_grid):
    made = case("llama", on_grid, tie_word_embeddings=True).checkpoint
    assert Names.of(made.config).tied == {"lm_head.weight": "model.embed_tokens.weight"}
    tensors = {**made.tensors, "lm_head.weight": made.tensors["model.embed_tokens.weight"] + 1}
    back = to_memory(replace(made, tensors=tensors, tied={}))
    assert back.config["tie_word_embeddings"] is False and back.tied == {} and "lm_head.weight" in back.tensors
