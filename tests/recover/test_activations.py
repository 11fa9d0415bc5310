"""What a training step is predicted to hold is what it holds, counted by the storages that are alive while it runs."""

from typing import Any

import pytest
import torch
from bitmend.recover.activations import Alive, training_activations
from bitmend.recover.compressed_model import cache_dense, compressed_linears, install
from bitmend.recover.losses import Objective
from bitmend.recover.recovery_methods import attach
from bitmend.recover.student import Batch, Teacher, student_of
from bitmend.recover.train import batch_loss, checkpointed
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from .conftest import records

WINDOWS, TOKENS, VOCABULARY = 2, 48, 512
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "opt": {"ffn_dim": 176, "word_embed_proj_dim": 32, "num_key_value_heads": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def made(family: str) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**COMMON, **FAMILIES[family]})
    config._experts_implementation = "eager"
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def measured(family: str, dtype: torch.dtype, checkpointing: bool, method: str) -> tuple[int, int]:
    """(saved, peak) of a real step."""
    model = made(family)
    install(model, records(model, "3-bit"), dtype)
    model.to(dtype)
    cache_dense(compressed_linears(model), 1e9)
    attached = attach(method, model, {"rank": 4} if method == "lora" else {})
    student, batch = student_of(model), Batch(torch.randint(0, VOCABULARY, (WINDOWS, TOKENS)))
    with torch.no_grad():
        hidden = student.hidden(batch.ids)
    for t in attached.trainables.values():
        t.parameter.grad = torch.zeros_like(t.parameter)
    kept = nn.ParameterList(
        [*(t.parameter.grad for t in attached.trainables.values()), *(m.base() for m in compressed_linears(model).values())]
    )
    model.register_module("not_counted", kept)
    with Alive(model) as alive, checkpointed(model, checkpointing):
        loss = batch_loss(student, batch, Teacher(lambda batch: hidden, student.logits), Objective("both"))
        saved = alive.now
        torch.autograd.backward(loss)
    return saved, alive.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "dtype", "method"), [
    *((family, torch.float32, "lora") for family in FAMILIES), ("llama", torch.bfloat16, "lora"), ("llama", torch.float32, "scales"),
])  # fmt: skip
def test_a_step_holds_what_was_predicted(family: str, dtype: torch.dtype, method: str, checkpointing: bool) -> None:
    said = training_activations(made(family), WINDOWS, TOKENS, dtype, checkpointing)
    saved, peak = measured(family, dtype, checkpointing, method)
    assert said.peak == pytest.approx(peak, rel=0.2), (said, saved, peak)
    assert checkpointing or said.saved == pytest.approx(saved, rel=0.2), (said, saved, peak)


def test_recomputing_saves_what_it_is_for_and_more_tokens_hold_more() -> None:
    plain, recomputed = (training_activations(made("llama"), WINDOWS, TOKENS, torch.float32, c) for c in (False, True))
    longer = training_activations(made("llama"), 2 * WINDOWS, TOKENS, torch.float32, False)
    assert recomputed.saved < plain.saved / 4 and recomputed.peak < plain.peak
    assert longer.saved == pytest.approx(2 * plain.saved, rel=0.05)


def test_a_model_that_asks_for_values_is_said_so() -> None:
    model = made("llama")
    plain = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda hidden: plain(hidden[hidden.sum(-1) > 0])
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: what training it holds cannot be predicted"):
        training_activations(model, 1, 8, torch.float32, False)
