"""Invariants of every method on every kind: step 0, masks, codes, folding, refusals."""

from typing import Any

import pytest
import torch
from bitmend.compress.weights import DenseWeight
from bitmend.recover.compressed_model import compressed_linears, install
from bitmend.recover.losses import Objective
from bitmend.recover.recovery_methods import RECOVER, attach, config_of, refusal
from bitmend.recover.site import Gradients, kinds
from bitmend.recover.stored_values import as_stored
from bitmend.recover.student import student_of
from bitmend.recover.train import TrainingText, batch_loss, train
from torch.testing import assert_close

from .conftest import KINDS, batch, compress, compressed, held_out, llama

SHORT = {"steps": 2, "loss": "cross_entropy", "eval_every": 2}
CONFIGS = {
    "lora": [{"rank": 4}, {"rank": 4, "norms": True, "biases": True}, {"rank": 4, "scales": True}, {"rank": 4, "scales": "auto"}],
    "dora": [{"rank": 4}],
    "qa_lora": [{"rank": 2}],
    "svft": [{"rank": 8, "width": 2}, {"rank": 0, "pattern": "plain"}],
    "perp": [{}, {"lora": "mask_lora", "rank": 4}, {"lora": "scale_lora", "rank": 4}, {"lora": "lora_prune", "rank": 4}, {"head": True}],
    "scales": [{}, {"zeros": True, "biases": True, "low_rank": True}],
}
CONFIGS |= {
    "qlora": [{"rank": 4}],
    "lq_lora": [{"rank": 4}],
    "dequantize_train_requantize": [{"quantizer": "rtn"}],
    "lota": [{"rank": 4}],
    "lr_qat": [{"rank": 4}, {"rank": 4, "scales": False}],
    "pafi": [{"share": 0.02}, {"share": 0.1, "by": "channel", "quota": "matrix"}],
    "fish_mask": [{"share": 0.02, "samples": 2}, {"share": 0.02, "samples": 2, "criterion": "saliency", "reestimate_every": 1}],
    "diff_pruning": [{"share": 0.02}, {"share": 0.02, "structured": True, "gated": 0.3}],
    "serial_adapter": [{"bottleneck": 8}],
    "parallel_adapter": [{"bottleneck": 8, "at": "both"}],
}
TOKENS = ("prefix_tuning", "prompt_tuning", "p_tuning", "mam_adapter")
FEWER = ("dense", "2:4", "3-bit", "nf4-nested", "lq-4-bit", "2:4+4-bit+lq", "everything")  # what a method's further settings are tried on
CASES = [
    (name, kind, own)
    for name, row in RECOVER.items()
    if name not in TOKENS and not row.by_block  # reconstruction has tests of its own
    for i, own in enumerate(CONFIGS.get(name, [{}]))
    for kind in (KINDS if i == 0 else FEWER)
]


def gradients_of(model):
    return Gradients(batch, lambda b: batch_loss(student_of(model, probe=False), b, None, Objective("cross_entropy")))


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
    attached = attach(name, model, SHORT | own, gradients=gradients_of(model))
    with torch.no_grad():
        assert_close(model(ids).logits, start, atol=1e-4, rtol=1e-4)
    config = config_of(name, SHORT | own)
    result = train(model, attached, TrainingText(batch, held_out(1)), config, main=RECOVER[name].main)
    assert result.finished and result.best_loss <= result.start_loss
    one_step(model, attached)
    check_folding(name, kind, model, attached, before)


def one_step(model, attached):
    """Move every trainable from wherever it is, whatever the held-out text says."""
    if attached.stored_form is not None:
        attached.stored_form(False)
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
    if attached.stored_form is not None:
        attached.stored_form(True)
    after: Any = {n: lin.to_stored() for n, lin in compressed_linears(model).items()}
    for layer, (stored, _) in after.items():
        old = before[layer]
        assert (stored.mask is None) == (old.mask is None)
        if stored.mask is not None and old.mask is not None:
            assert torch.equal(stored.mask, old.mask)
            assert not bool(stored.base_dense()[~stored.mask_OI()].any())
        if RECOVER[name].grid_safe and not isinstance(old.base, DenseWeight):
            assert torch.equal(stored.base.codes, old.base.codes)
        if kind == "lq-4-bit" and (RECOVER[name].main == "factors" or name == "scales"):
            for new_factor, factor in zip((stored.low_rank.up, stored.low_rank.down), (old.low_rank.up, old.low_rank.down), strict=True):
                assert torch.equal(new_factor.codes, factor.codes) and new_factor.stored_bits() == factor.stored_bits()
    twin = llama()
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if k in twin.state_dict()}, strict=False)
    new = install(twin, {n: s for n, (s, _) in after.items()})
    for layer, (_, bias) in after.items():
        new[layer].bias = None if bias is None else torch.nn.Parameter(bias)
    if attached.extra_modules is not None:
        attached.extra_modules().hang(twin)
    with torch.no_grad():
        logits = twin(ids).logits
    assert (logits - trained).abs().max() <= (0.2 if kind == "everything" else 1e-4)  # a last bit may flip an activation's rounding


@pytest.mark.parametrize(("method", "own"), [("lora", {"rank": 4}), ("scales", {})])
def test_scales_train_wherever_there_is_a_grid(method: str, own: dict[str, Any]):
    """scales=true is refused where a linear has none, auto leaves that one out; on a quantized model the two are one."""

    def trained(kind: str, scales: object, dense: str = "") -> set[str]:
        model = compressed(kind)
        if dense:
            plain = model.get_submodule(dense)
            install(model, {dense: compress(plain.stored.dense(), "dense")})
        attached = attach(method, model, SHORT | own | {"scales": scales})
        return {name for name in attached.trainables if name.endswith("scales")}

    one = "model.layers.0.mlp.up_proj"
    everywhere = trained("3-bit", True)
    assert len(everywhere) == len(compressed_linears(compressed("3-bit"))) and trained("3-bit", "auto") == everywhere
    assert trained("3-bit", "auto", one) == {name for name in everywhere if not name.startswith(one)}
    actual = [kinds(compress(torch.randn(16, 32), kind)) for kind in ("dense", "3-bit")]
    assert refusal(method, actual, SHORT | own | {"scales": "auto"}) is None
    assert "some of the chosen linears are dense" in str(refusal(method, actual, SHORT | own | {"scales": True}))
    if method == "lora":
        assert trained("dense", "auto") == set()
    else:
        assert "quantize first" in str(refusal(method, actual[:1], SHORT | {"scales": "auto"}))
