from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from bitmend.pipelines.errors import UsageError
from bitmend.pipelines.formats import registry
from bitmend.pipelines.formats.biases import with_room_for_biases
from torch import nn
from transformers import AutoModelForCausalLM


def with_biases(made, suffixes) -> Any:
    """Biases on some linears, in the checkpoint and in the plain model."""
    tensors = dict(made.checkpoint.tensors)
    for name in made.checkpoint.linears:
        if name.endswith(suffixes):
            linear = made.model.get_submodule(name)
            tensors[f"{name}.bias"] = torch.randn(linear.out_features, generator=torch.Generator().manual_seed(len(name)))
            linear.bias = nn.Parameter(tensors[f"{name}.bias"])
    return replace(made, checkpoint=replace(made.checkpoint, tensors=tensors))


@pytest.mark.parametrize("suffixes", [("q_proj",), ("down_proj",), ("o_proj", "up_proj")])
@pytest.mark.parametrize("name", ["dense", "compressed-tensors"])
def test_transformers_gives_the_same_logits_with_biases_that_llama_does_not_have(name, suffixes, case, on_grid, logits_of, tmp_path):
    made = with_biases(case("llama", partial(on_grid, symmetric=True)), suffixes)
    registry.write(name, made.checkpoint, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits_of(loaded), made.logits(), rtol=0, atol=1e-5)


def test_only_the_switches_that_are_needed_are_on(case, on_grid):
    config = with_room_for_biases(with_biases(case("llama", on_grid), ("q_proj",)).checkpoint).config
    assert config["attention_bias"] is True and config["mlp_bias"] is False


def test_biases_of_zero_need_no_room(case, on_grid):
    checkpoint = case("llama", on_grid).checkpoint
    idle = replace(checkpoint, tensors={**checkpoint.tensors, "model.layers.0.mlp.up_proj.bias": torch.zeros(128)})
    out = with_room_for_biases(idle)
    assert set(out.tensors) == set(checkpoint.tensors) and out.config == checkpoint.config


@pytest.mark.parametrize("name", ["dense", "gptq"])
def test_an_architecture_without_room_is_refused(name, case, on_grid, tmp_path):
    made = with_biases(case("mixtral", on_grid), ("q_proj",))
    with pytest.raises(UsageError, match=r"q_proj\.bias was added by the recovery, and mixtral"):
        registry.write(name, made.checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())
