"""Training on the super-blocks of ggml's types: gradients, what is stored, and what is refused."""

import pytest
import torch
from bitmend.compress.weights import GgmlWeight, StoredWeight
from bitmend.recover.adapters import scale_rows
from bitmend.recover.compressed_linear import CompressedLinear
from bitmend.recover.merge import audit, merge_refusal
from bitmend.recover.super_scales import SuperScales
from bitmend.recover.whole_matrices import LatentGrid, MaskedDense
from torch.testing import assert_close

from .conftest import compress, low_rank_of, mask_of

W = torch.randn(12, 512, generator=torch.Generator().manual_seed(5)) * 0.05
TYPES = ("q2_k", "q3_k", "q4_k", "q6_k", "q5_0", "q4_1")


def stored_as(kind: str, masked: bool = False) -> StoredWeight:
    mask = mask_of(W, "2:4") if masked else None
    return compress(W if mask is None else W.where(mask, 0), kind).with_mask(mask)


def moved(kind: str, masked: bool = False) -> tuple[StoredWeight, SuperScales]:
    stored = stored_as(kind, masked)
    reweight = SuperScales(stored)
    for parameter, seed in zip(reweight.parameters(), (1, 2), strict=False):
        torch.nn.init.uniform_(parameter, -0.3, 0.3, generator=torch.Generator().manual_seed(seed))
    return stored, reweight


@pytest.mark.parametrize("kind", TYPES)
def test_gradients_are_those_of_autograd(kind):
    stored, reweight = moved(kind)
    linear = CompressedLinear(stored)
    linear.reweight = reweight
    parameters = list(reweight.parameters())
    assert len(parameters) == (2 if stored.base.super_minima is not None else 1)
    x, g = torch.randn(9, 512, requires_grad=True), torch.randn(9, 12)
    ours = torch.autograd.grad(linear(x), [x, *parameters], g)
    twin = torch.autograd.grad(x @ reweight.weights(linear.base(), *parameters).T, [x, *parameters], g)
    for a, b in zip(ours, twin, strict=True):
        assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind, masked", [*((kind, False) for kind in TYPES), ("q3_k", True)])
def test_d_and_m_move_alone_and_what_is_measured_is_what_is_stored(kind, masked):
    stored, reweight = moved(kind, masked)
    folded = reweight.fold(stored)
    base = folded.base
    assert isinstance(base, GgmlWeight) and isinstance(stored.base, GgmlWeight) and base.super_scales.dtype == torch.float16
    assert torch.equal(base.codes, stored.base.codes) and not torch.equal(base.super_scales, stored.base.super_scales)
    assert not audit({"x": stored}, {"x": folded})
    trained = [t.stored(t.parameter.detach()) for t in reweight.trainables().values()]
    assert_close(reweight.weights(stored.base_dense(), *trained), folded.base_dense(), atol=1e-6, rtol=1e-5)
    if stored.base.super_minima is not None:
        assert not torch.equal(base.super_minima, stored.base.super_minima)
    if masked:
        assert not folded.base_dense()[~folded.mask_OI()].any()
    untouched = SuperScales(stored)
    assert torch.equal(untouched.weights(stored.base_dense(), *(p.detach() for p in untouched.parameters())), stored.base_dense())
    assert torch.equal(untouched.fold(stored).dense(), stored.dense())


@pytest.mark.parametrize("value, reason", [(-1.0, "went to 0 times"), (float("nan"), "not finite"), (1e12, "float16 holds")])
def test_what_float16_cannot_hold_is_refused(value, reason):
    stored, reweight = moved("q4_k")
    assert reweight.zeta is not None
    reweight.zeta.data[3, 1] = value
    with pytest.raises(ValueError, match=f"the trained super_minima cannot be stored as float16: .*{reason}"):
        reweight.fold(stored)


def test_an_audit_sees_small_codes_and_types():
    stored = stored_as("q4_k")
    other = compress(W * 1.5 + 0.01, "q4_k")
    actual = audit({"x": stored}, {"x": other})
    assert any("codes changed" in line for line in actual) and any("small codes of q4_k" in line for line in actual)
    assert "x: the small codes of q5_1 changed, or it became q5_0" in audit({"x": stored_as("q5_1")}, {"x": stored_as("q5_0")}, True)
    with_term = CompressedLinear(stored).stored.__class__(stored.base, low_rank=low_rank_of(W - stored.dense()))
    assert "4-bit codes without rounding again" in str(merge_refusal(with_term))


@pytest.mark.parametrize("kind", ["q4_k", "q3_k"])
def test_the_grid_is_held_and_refitted(kind):
    stored = stored_as(kind)
    held = LatentGrid(stored)
    assert torch.equal(held.weights(None, held.latent.detach()), stored.base_dense())
    held.latent.data += 0.6
    folded = held.fold(stored)
    assert torch.equal(folded.base_dense(), held.weights(None, held.latent.detach())) and not torch.equal(folded.dense(), stored.dense())
    assert not audit({"x": stored}, {"x": folded}, codes_move=True)
    free = MaskedDense(stored)
    free.weight.data += 0.01
    assert (free.fold(stored).dense() - stored.dense() - 0.01).abs().max() < 0.05 and free.fold(stored).base.type == kind


def test_rows_are_scaled_by_d_and_m():
    stored = stored_as("q4_k")
    factor = torch.linspace(0.5, 2, 12)
    assert_close(scale_rows(stored, factor).dense(), stored.dense() * factor.unsqueeze(1), atol=2e-4, rtol=2e-3)
