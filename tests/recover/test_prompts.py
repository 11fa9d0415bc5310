"""Methods with virtual tokens: the start is the model without them, and what cannot help stays off."""

import pytest
import torch
from bitmend.recover.methods import RECOVER, attach, split
from bitmend.recover.student import student_of
from bitmend.recover.train import held_out_loss, train
from bitmend.recover.trainable import adapter_tensors, load_adapter_

from .conftest import batch, compressed, held_out

TOKENS = ("prefix_tuning", "prompt_tuning", "p_tuning", "mam_adapter")
SETTINGS = {"steps": 6, "loss": "cross_entropy", "eval_every": 2, "warmup": 0, "tokens": 4}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("kind", ["3-bit", "2:4+4-bit+lq"])
def test_starts_without_tokens_and_trains_with_them(name, kind, family):
    model = compressed(kind, family)
    start = held_out_loss(student_of(model), held_out())
    own = SETTINGS | ({"bottleneck": 8} if name == "mam_adapter" else {"hidden": 8} if name == "p_tuning" else {})
    attached = attach(name, model, own)
    assert attached.adapter == set(attached.trainables)
    result = train(model, attached, batch, held_out(), None, split(name, own)[0], main=RECOVER[name].main)
    assert result.start_loss == pytest.approx(start, abs=1e-6)
    assert len({round(h["loss"], 6) for h in result.history if "loss" in h}) > 1
    final = held_out_loss(attached.run, held_out())
    assert final == pytest.approx(result.best_loss, abs=1e-6) and final <= start + 1e-6


def test_tokens_that_do_not_help_stay_off():
    model = compressed("3-bit")
    attached = attach("prompt_tuning", model, SETTINGS | {"learning_rate": 50.0})
    wrong = type(batch(0))(torch.full((2, 24), 5))
    result = train(
        model, attached, lambda i: wrong, held_out(), None, split("prompt_tuning", SETTINGS | {"learning_rate": 50.0})[0], main="tokens"
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


def test_what_peft_saves_gives_the_same_logits(tmp_path):
    from peft import PeftModel

    model = compressed("3-bit")
    attached = attach("prompt_tuning", model, SETTINGS)
    train(model, attached, batch, held_out(), None, split("prompt_tuning", SETTINGS)[0], main="tokens")
    assert attached.starts_without is not None
    attached.starts_without(False)
    attached.peft.save_pretrained(tmp_path)
    ids = batch(4).ids
    with torch.no_grad():
        ours = attached.run.logits(attached.run.hidden(ids))
        loaded = PeftModel.from_pretrained(compressed("3-bit"), tmp_path)
        theirs = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(ValueError, match="64 positions"):
        attach("prompt_tuning", compressed("3-bit", "gpt2"), SETTINGS | {"tokens": 64})


def test_an_adapter_is_stored_and_comes_back_and_a_foreign_one_is_refused():
    settings = SETTINGS | {"bottleneck": 8}
    model = compressed("3-bit")
    attached = attach("mam_adapter", model, settings)
    train(model, attached, batch, held_out(), None, split("mam_adapter", settings)[0], main="adapters")
    assert attached.starts_without is not None
    attached.starts_without(False)
    again = attach("mam_adapter", compressed("3-bit"), settings, seed=9)
    load_adapter_(again, adapter_tensors(attached))
    ids = batch(4).ids
    with torch.no_grad():
        assert torch.equal(again.run.hidden(ids), attached.run.hidden(ids))
    with pytest.raises(ValueError, match="this model wants"):
        load_adapter_(attach("mam_adapter", compressed("3-bit"), settings | {"tokens": 3}), adapter_tensors(attached))
    with pytest.raises(ValueError, match="other targets, layers"):
        load_adapter_(attach("prefix_tuning", compressed("3-bit"), SETTINGS), adapter_tensors(attached))
