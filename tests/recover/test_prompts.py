"""Methods with virtual tokens: the start is the model without them, and what cannot help stays off."""

import json
from typing import Any

import pytest
import torch
from bitmend.recover.compressed_model import install
from bitmend.recover.extra_modules import extra_modules_of
from bitmend.recover.recovery_methods import RECOVER, attach, config_of
from bitmend.recover.student import student_of
from bitmend.recover.train import TrainingText, held_out_loss, train
from transformers import OPTConfig, OPTForCausalLM

from .conftest import batch, compressed, held_out, records

TOKENS = ("prefix_tuning", "prompt_tuning", "p_tuning", "mam_adapter")
SETTINGS = {"steps": 6, "loss": "cross_entropy", "eval_every": 2, "warmup": 0, "tokens": 4, "seq_len": 24}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("kind", ["3-bit", "2:4+4-bit+lq"])
def test_starts_without_tokens_and_trains_with_them(name, kind, family):
    model = compressed(kind, family)
    start = held_out_loss(student_of(model), held_out())
    own = SETTINGS | ({"bottleneck": 8} if name == "mam_adapter" else {"hidden": 8} if name == "p_tuning" else {})
    attached = attach(name, model, own)
    assert attached.adapter == set(attached.trainables)
    result = train(model, attached, TrainingText(batch, held_out()), config_of(name, own), main=RECOVER[name].main)
    assert result.start_loss == pytest.approx(start, abs=1e-6)
    assert len({round(h["loss"], 6) for h in result.history if "loss" in h}) > 1
    final = held_out_loss(attached.run, held_out())
    assert final == pytest.approx(result.best_loss, abs=1e-6) and final <= start + 1e-6


def test_tokens_that_do_not_help_stay_off():
    model = compressed("3-bit")
    attached = attach("prompt_tuning", model, SETTINGS | {"learning_rate": 50.0})
    wrong = type(batch(0))(torch.full((2, 24), 5))
    result = train(
        model, attached, TrainingText(lambda i: wrong, held_out()), config_of("prompt_tuning", SETTINGS | {"learning_rate": 50.0}), main="tokens"
    )
    assert result.best_step == 0
    ids = batch(0).ids
    assert torch.equal(attached.run.hidden(ids), student_of(model).hidden(ids))


def test_prefix_starts_from_the_models_own_keys_and_values():
    """With the text's own first tokens as prefix, the rest of the text is predicted as in one piece."""
    model = compressed("3-bit")
    text = batch(3, size=1, length=20).ids
    from bitmend.recover.site import Gradients

    attached = attach("prefix_tuning", model, SETTINGS, gradients=Gradients(lambda i: type(batch(0))(text), lambda b: torch.zeros(())))
    with torch.no_grad():
        whole = student_of(model).hidden(text)[:, 4:]
        assert torch.allclose(attached.run.hidden(text[:, 4:]), whole, atol=1e-4)


@pytest.mark.parametrize("name", TOKENS)
def test_what_is_kept_gives_the_same_logits_on_a_fresh_model(name):
    own = SETTINGS | ({"bottleneck": 8} if name == "mam_adapter" else {"hidden": 8} if name == "p_tuning" else {})
    model, ids = compressed("3-bit"), batch(4).ids
    attached = attach(name, model, own)
    train(model, attached, TrainingText(batch, held_out()), config_of(name, own), main=RECOVER[name].main)
    assert attached.starts_without is not None and attached.extra_modules is not None
    attached.starts_without(False)
    made = attached.extra_modules()
    kept = extra_modules_of(json.loads(json.dumps(made.describe())), made.tensors)
    fresh, tokens = compressed("3-bit"), kept.virtual()
    kept.hang(fresh)
    assert tokens is not None and tokens.count == 4
    tokens.stand_before(fresh)
    with torch.no_grad():
        ours = attached.run.logits(attached.run.hidden(ids))
        assert torch.allclose(fresh(ids).logits, ours, atol=1e-4)
    assert set(made.describe()["bottlenecks"]) == ({f"model.layers.{i}.mlp" for i in (0, 1)} if name == "mam_adapter" else set())


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(ValueError, match="64 positions"):
        attach("prompt_tuning", compressed("3-bit", "gpt2"), SETTINGS | {"tokens": 64})


def test_a_kept_adapter_whose_tensors_do_not_fit_is_refused():
    attached = attach("serial_adapter", compressed("3-bit"), {"bottleneck": 8})
    assert attached.extra_modules is not None
    kept = attached.extra_modules()
    short = {n: t for n, t in kept.tensors.items() if not n.endswith("0.mlp.up")}
    for tensors in (short, kept.tensors | {"model.layers.0.mlp.up": torch.zeros(3, 8)}):
        with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.up' of the adapter serial_adapter is missing or not \[32, 8\]"):
            extra_modules_of(kept.describe(), tensors)


@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning"])
def test_tokens_have_the_width_of_the_embeddings(name):
    """OPT embeds narrower than it computes."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2)
    model: Any = OPTForCausalLM(OPTConfig(vocab_size=101, max_position_embeddings=64, **sizes)).eval()
    install(model, records(model, "3-bit"))
    own = {**SETTINGS, **({"hidden": 8} if name == "p_tuning" else {})}
    attached = attach(name, model, own)
    assert attached.extra_modules is not None and attached.extra_modules().tensors["tokens"].shape == (4, 16)
    with torch.no_grad():
        assert attached.run.hidden(batch(0).ids).shape[:2] == batch(0).ids.shape
