from typing import Any

import pytest
import torch
from bitmend.compress import normal_float
from bitmend.compress.weights import UniformWeight, to_tensors
from bitmend.recover.compressed_linear import CompressedLinear
from bitmend.recover.increments import GridIncrement
from bitmend.recover.scales import RelativeScales, double_quantize
from bitmend.recover.trainable import through
from bitmend.recover.whole_matrices import LatentGrid, MaskedDense
from torch.testing import assert_close

from .conftest import compress

W = torch.randn(24, 32, generator=torch.Generator().manual_seed(5))
GRIDS = ("3-bit", "nf4", "nf4-nested", "2:4+4-bit", "act-order")


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("kind", GRIDS)
def test_gradients_are_those_of_autograd(kind, zeros):
    stored = compress(W, kind)
    if zeros and not isinstance(stored.base, UniformWeight):
        with pytest.raises(ValueError, match="no zero points"):
            RelativeScales(stored, zeros)
        return
    linear = CompressedLinear(stored)
    linear.reweight = RelativeScales(stored, zeros)
    torch.nn.init.normal_(linear.reweight.delta, std=0.1)
    if zeros:
        torch.nn.init.normal_(linear.reweight.zeta, std=0.1)
    parameters = list(linear.reweight.parameters())
    x = torch.randn(9, 32, requires_grad=True)
    g = torch.randn(9, 24)
    ours = torch.autograd.grad(linear(x), [x, *parameters], g)
    twin = torch.autograd.grad(x @ linear.reweight.weights(linear.base(), *parameters).T, [x, *parameters], g)
    for a, b in zip(ours, twin, strict=True):
        assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", GRIDS)
def test_only_the_gradient_that_is_summed_over_groups_may_be_short(kind, monkeypatch):
    asked: list[int] = []

    def short(left, right):
        asked.append(left.shape[0])
        return left @ right

    monkeypatch.setattr("bitmend.recover.compressed_linear.summed", short)
    stored = compress(W, kind)
    for reweight, expected in ((RelativeScales(stored), [24]), (LatentGrid(stored), []), (None, [])):
        linear = CompressedLinear(stored)
        linear.reweight = reweight
        linear(torch.randn(5, 32, requires_grad=True)).sum().backward()
        assert asked == expected
        asked.clear()


@pytest.mark.parametrize("kind", GRIDS)
def test_a_trained_scale_is_stored_rounded_and_masked_weights_stay_zero(kind):
    stored = compress(W, kind)
    reweight = RelativeScales(stored, zeros=isinstance(stored.base, UniformWeight))
    torch.nn.init.uniform_(reweight.delta, -0.3, 0.3)
    if reweight.zeta is not None:
        torch.nn.init.uniform_(reweight.zeta, -0.3, 0.3)
    folded: Any = reweight.fold(stored)
    seen = [reweight.as_stored(reweight.delta.detach())] + ([] if reweight.zeta is None else [reweight.zeta.detach()])
    expected = reweight.weights(stored.base_dense(), *seen)
    assert_close(folded.base_dense(), expected, atol=1e-5, rtol=1e-4)
    mask = stored.mask_OI()
    if mask is not None:
        assert not bool(folded.base_dense()[~mask].any())
    assert torch.equal(folded.base.codes, stored.base.codes)


@pytest.mark.parametrize(
    ("delta", "reason"),
    [(-1.0, "went to 0 times"), (-1.5, "went to -0.5 times"), (float("nan"), "not finite"), (1e7, "float16 holds")],
)
def test_a_scale_that_cannot_be_stored_is_named(delta, reason):
    stored = compress(W, "3-bit")
    reweight = RelativeScales(stored)
    reweight.delta.data[3, 1] = delta
    assert reason in (reweight.problem(reweight.extremes(reweight.delta.detach()).tolist()) or "")
    with pytest.raises(ValueError, match="cannot be stored as torch"):
        reweight.fold(stored)


def test_untouched_scales_fold_to_the_very_same_record():
    for kind in GRIDS:
        stored = compress(W, kind)
        folded: Any = RelativeScales(stored).fold(stored)
        before, after = to_tensors(stored), to_tensors(folded)
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_double_quantization_errs_at_most_half_a_level():
    absmax = torch.rand(40, 30) + 0.5
    codes, scales, offset = double_quantize(absmax)
    assert codes.dtype == torch.uint8 and scales.shape == (5,)
    back = normal_float.dequantize_absmax(codes, scales, offset)
    levels = normal_float.dynamic_map()
    assert (back - absmax).abs().max() <= (levels.diff().max() / 2 * scales.max()) + 1e-6


@pytest.mark.parametrize("kind", ["3-bit", "2:4+4-bit", "act-order", "nf4"])
@pytest.mark.parametrize("build", [LatentGrid, MaskedDense, "lr_qat", "lota"])
def test_straight_through_gradients(kind, build):
    """Rounding passes the gradient on; what lies beyond the grid or under the mask gets none."""
    stored = compress(W, kind)
    if build in ("lr_qat", "lota"):
        if kind == "nf4":
            return
        reweight = GridIncrement(stored, 4, None if build == "lr_qat" else 0.2, torch.Generator().manual_seed(0))
        torch.nn.init.uniform_(reweight.up, -1, 1)
    else:
        reweight = build(stored)
    g = torch.randn(24, 32)
    actual = reweight.pull_back(None, g.clone())
    parameters = list(reweight.parameters())
    assert [f.shape for f in actual] == [p.shape for p in parameters]
    mask = stored.mask_OI()
    if isinstance(reweight, MaskedDense):
        assert torch.equal(actual[0], g if mask is None else g * mask)
        return
    if isinstance(reweight, LatentGrid):
        kept = torch.ones_like(g, dtype=torch.bool) if mask is None else mask
        assert not bool(actual[0][~kept].any()) and bool((actual[0][kept] != 0).all())
        reweight.latent.data.copy_(torch.full_like(g, 99.0))
        assert not bool(reweight.pull_back(None, g.clone())[0].any())
        return
    codes = reweight.codes(*[p.detach() for p in parameters])
    assert torch.equal(codes, codes.round()) and codes.min() >= 0 and codes.max() < 1 << stored.base.bits
    assert all(bool(f.any()) for f in actual)


@pytest.mark.parametrize("kind", ["3-bit", "2:4+4-bit", "act-order"])
def test_lr_qat_trains_the_scales_of_the_codes_it_makes(kind):
    """δ's gradient is that of the matrix as it is with the increments in it, and what is folded is what was trained."""
    stored = compress(W, kind)
    reweight = GridIncrement(stored, 4, None, torch.Generator().manual_seed(0), scales=True)
    torch.nn.init.uniform_(reweight.up, -1, 1)
    assert reweight.scales is not None
    torch.nn.init.uniform_(reweight.scales.delta, -0.2, 0.2)
    up, down, delta = reweight.parameters()
    g = torch.randn(24, 32)
    weight = reweight.weights(None, up.detach(), down.detach(), delta)
    (expected,) = torch.autograd.grad(weight, delta, g)
    assert_close(reweight.pull_back(None, g.clone())[2], expected, atol=1e-4, rtol=1e-4)
    folded = reweight.fold(stored)
    assert_close(folded.base_dense(), weight.detach(), atol=2e-3, rtol=1e-3)  # scales in 16 bits
    assert torch.equal(folded.base.codes_OI().float(), reweight.codes(up.detach(), down.detach()))


def test_storage_rounding():
    value = torch.tensor([1.0001])
    assert through(torch.float32)(value) is value
    assert torch.equal(through(torch.float16)(value), value.half().float())
