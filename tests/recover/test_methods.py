"""Invariants of every method on every kind: step 0, masks, codes, folding, refusals."""

import pytest
import torch
from bitmend.compress.weights import DenseWeight
from bitmend.recover.linear import compressed_linears, install
from bitmend.recover.methods import RECOVER, attach, refusal, split
from bitmend.recover.site import kinds
from bitmend.recover.train import as_stored, train
from torch.testing import assert_close

from .conftest import KINDS, batch, compress, compressed, held_out, llama

SHORT = {"steps": 3, "loss": "cross_entropy", "eval_every": 3}
CONFIGS = {
    "lora": [{"rank": 4}, {"rank": 4, "norms": True, "biases": True}],
    "dora": [{"rank": 4}],
    "qa_lora": [{"rank": 2}],
    "svft": [{"rank": 8, "width": 2}, {"rank": 0, "pattern": "plain"}],
    "perp": [{}, {"lora": "mask_lora", "rank": 4}, {"lora": "scale_lora", "rank": 4}, {"lora": "lora_prune", "rank": 4}, {"head": True}],
    "scales": [{}, {"zeros": True, "biases": True, "low_rank": True}],
}
CASES = [(name, kind, own) for name in RECOVER for own in CONFIGS.get(name, [{}]) for kind in KINDS]


def served(name, kind, own):
    return refusal(name, [kinds(compress(torch.randn(16, 32), kind))], SHORT | own) is None


@pytest.mark.parametrize(
    ("name", "kind", "own"),
    [c for c in CASES if served(*c)],
    ids=lambda v: str(v) if not isinstance(v, dict) else "-".join(map(str, v.values())),
)
def test_step_0_training_and_folding(name, kind, own):
    model = compressed(kind)
    ids = batch(0).ids
    with torch.no_grad():
        start = model(ids).logits
    before = {n: lin.stored for n, lin in compressed_linears(model).items()}
    attached = attach(name, model, SHORT | own)
    with torch.no_grad():
        assert_close(model(ids).logits, start, atol=1e-4, rtol=1e-4)
    config, _ = split(name, SHORT | own)
    result = train(model, attached, batch, held_out(), None, config, main=RECOVER[name].main)
    assert result.finished and result.best_loss <= result.start_loss
    one_step(model, attached)
    check_folding(name, kind, model, attached, before)


def one_step(model, attached):
    """Move every trainable from wherever it is, whatever the held-out text says."""
    model(batch(5).ids).logits.square().mean().backward()
    moved = 0
    with torch.no_grad():
        for t in attached.trainables.values():
            if t.parameter.grad is not None:
                moved += int(t.parameter.grad.count_nonzero())
                t.parameter.sub_(1e-2 * t.parameter.grad.sign())
                t.parameter.grad = None
    assert moved > 0


def check_folding(name, kind, model, attached, before):
    """The records give the trained model's logits, with masks as they were and codes where the method promises it."""
    ids = batch(1).ids
    with torch.no_grad(), as_stored(attached):
        trained = model(ids).logits
    after = {n: lin.to_stored() for n, lin in compressed_linears(model).items()}
    for layer, (stored, _) in after.items():
        old = before[layer]
        assert (stored.mask is None) == (old.mask is None)
        if stored.mask is not None and old.mask is not None:
            assert torch.equal(stored.mask, old.mask)
            assert not bool(stored.base_dense()[~stored.mask_OI()].any())
        if RECOVER[name].grid_safe and not isinstance(old.base, DenseWeight):
            assert torch.equal(stored.base.codes, old.base.codes)
    twin = llama()
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if k in twin.state_dict()}, strict=False)
    new = install(twin, {n: s for n, (s, _) in after.items()})
    for layer, (_, bias) in after.items():
        new[layer].bias = None if bias is None else torch.nn.Parameter(bias)
    with torch.no_grad():
        logits = twin(ids).logits
    # a last bit may flip an activation's rounding; dora's row magnitudes are folded into scales of 11 significant bits
    loose = kind == "everything" or name == "dora"
    assert (logits - trained).abs().max() <= (0.2 if loose else 1e-4)
