from dataclasses import replace

import pytest
import torch
from bitmend.compress.activation_grid import fake_quantize
from bitmend.compress.weights import ActivationGrid, DenseWeight, SparseDelta, StoredWeight, to_tensors
from bitmend.kernels.operators import ReferenceOperator
from bitmend.recover.compressed_linear import CompressedLinear, cache_dense, compressed_linears, install, steady
from bitmend.recover.scales import RelativeScales
from bitmend.recover.super_scales import SuperScales
from bitmend.recover.whole_matrices import LatentGrid
from torch import nn
from torch.testing import assert_close

from .conftest import KINDS, MODELS, batch, compress, records


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_input_gradient_are_those_of_the_effective_weight(kind):
    torch.manual_seed(1)
    stored, bias = compress(torch.randn(24, 32), kind), torch.randn(24)
    if stored.activations is not None:
        stored = replace(stored, activations=None)
    linear = CompressedLinear(stored, bias)
    x = torch.randn(2, 5, 32, requires_grad=True)
    y = linear(x)
    truth = nn.functional.linear(x, stored.dense(), bias)
    assert_close(y, truth, atol=2e-5, rtol=1e-5)
    g = torch.randn_like(y)
    assert_close(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(truth, x, g)[0], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["3-bit", "nf4", "2:4+4-bit+lq", "everything"])
def test_cached_is_bit_identical_and_to_stored_is_the_identity(kind):
    stored = compress(torch.randn(24, 32), kind)
    linear = CompressedLinear(stored)
    x = torch.randn(7, 32)
    before = linear(x)
    assert cache_dense({"a": linear}, 1e9) and linear.base() is linear.base()
    assert torch.equal(before, linear(x))
    back, bias = linear.to_stored()
    assert bias is None
    for name, tensor in to_tensors(stored).items():
        assert torch.equal(tensor, to_tensors(back)[name]), name


def test_cache_refuses_beyond_the_budget():
    linear = CompressedLinear(compress(torch.randn(24, 32), "3-bit"))
    assert not cache_dense({"a": linear}, 24 * 32 * 4 - 1)
    assert linear.base() is not linear.base()


def trained_by(method: str, kind: str, dtype: torch.dtype) -> tuple[CompressedLinear, dict[str, nn.Parameter]]:
    torch.manual_seed(3)
    stored = compress(torch.randn(24, 32), kind.removesuffix(" + delta"))
    if kind.endswith("delta"):
        stored = replace(stored, delta=SparseDelta(torch.tensor([3, 40], dtype=torch.int32), torch.tensor([0.3, -0.2])))
    linear = CompressedLinear(stored, None, dtype)
    if method == "scales":
        linear.reweight = SuperScales(linear.stored) if kind == "q4_1" else RelativeScales(linear.stored, zeros=kind == "3-bit")
    elif method == "latents":
        linear.reweight = LatentGrid(linear.stored)
    if linear.sparse is not None:
        linear.sparse.values.requires_grad_(True)
    for parameter in linear.reweight.parameters():
        parameter.data.add_(0.01 * torch.randn(parameter.shape))
        parameter.requires_grad_(True)
    return linear, {n: p for n, p in linear.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "kind"), [("scales", k) for k in ("3-bit", "nf4", "2:4+4-bit", "q4_1", "nf4 + delta")] + [("latents", "2:4+4-bit")])
def test_a_held_matrix_gives_the_same_bits_and_is_built_once(method, kind, dtype, monkeypatch):
    """Three micro-batches of a step, whatever is kept of them; then values move, and so does what is multiplied."""
    calls, effective = [], CompressedLinear.effective
    monkeypatch.setattr(CompressedLinear, "effective", lambda *args: calls.append(0) or effective(*args))
    results = []
    for budget, built in ((0, 6), (24 * 32 * dtype.itemsize, 1), (1e9, 1)):
        linear, trained = trained_by(method, kind, dtype)
        assert (cache_dense({"a": linear}, budget) > 0) == (budget > 0) == linear.holds
        found = []
        for step in range(2):
            calls.clear()
            with steady([linear]):
                for number in range(3):
                    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(number)).to(dtype).requires_grad_(True)
                    y = linear(x)
                    found += [y, *torch.autograd.grad(y.float().square().sum(), [x, *trained.values()])]
            assert len(calls) == built, (budget, step)
            for parameter in trained.values():
                parameter.data.mul_(2.0)
        results.append(found)
    for kept in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], kept, strict=True))
    assert not torch.equal(results[0][0], results[0][len(results[0]) // 2])


def test_what_is_kept_follows_the_budget():
    linear, _ = trained_by("scales", "nf4", torch.bfloat16)
    still = CompressedLinear(linear.stored, None, torch.bfloat16)
    size, both = 24 * 32, {"moves": linear, "stays": still}
    for budget, bytes_, flags in (
        (size * 8, size * 8, (True, True, True)),
        (size * 8 - 1, size * 4, (False, True, True)),
        (size * 4 - 1, 0, (False, False, False)),
    ):
        assert cache_dense(both, budget) == bytes_
        assert (linear.cached, linear.holds, still.cached) == flags and not still.holds


def test_nothing_dense_is_kept_for_backward():
    """Packed weights + one dense layer: what autograd saves is x only when a parameter wants it."""
    linear = CompressedLinear(compress(torch.randn(64, 64), "3-bit"))
    saved = []
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        linear(x).sum().backward()
    assert max(saved, default=0) <= 3 * 64


@pytest.mark.parametrize("family", list(MODELS))
def test_installed_in_a_model_it_gives_the_same_logits(family):
    model, twin = MODELS[family](), MODELS[family]()
    stored = records(model, "2:4+4-bit+lq")
    dense = {name: StoredWeight(DenseWeight(record.dense())) for name, record in stored.items()}
    install(model, stored)
    install(twin, dense)
    ids = batch(0).ids
    assert_close(model(ids).logits, twin(ids).logits, atol=1e-4, rtol=1e-4)
    assert len(compressed_linears(model)) == len(stored)
    assert not any(p.requires_grad for p in model.parameters())


def test_bfloat16_computes_in_bfloat16():
    linear = CompressedLinear(compress(torch.randn(24, 32), "lq"), torch.zeros(24), torch.bfloat16)
    x = torch.randn(4, 32, requires_grad=True)
    y = linear(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["3-bit", "everything"])
def test_training_sees_the_very_rounding_that_serving_has(kind, bits):
    """Halves included: W4A8 trained under another rounding would be measured under this one."""
    stored = replace(compress(torch.randn(24, 32), kind), activations=ActivationGrid(bits, 16))
    linear, serving = CompressedLinear(stored), ReferenceOperator(stored, None)
    top = 2 ** (bits - 1) - 1
    halves = torch.arange(32).float().remainder(top) + 0.5  # in steps of the grid, as the largest of each group is `top`
    x = torch.stack((halves, -halves, halves.flip(0) / 8, torch.randn(32)))
    x[:, ::16] = top * torch.tensor([1.0, -1.0, 0.125, 1.0]).unsqueeze(1)
    x = (x if stored.smooth is None else x * stored.smooth).requires_grad_()
    inner = x.detach() if stored.smooth is None else x.detach() / stored.smooth
    assert torch.equal(linear.base_input(x), fake_quantize(inner, bits, 16))
    without_delta = replace(stored, delta=None)
    assert torch.equal(CompressedLinear(without_delta)(x), ReferenceOperator(without_delta, None)(x.detach()))
    assert_close(linear(x), serving(x.detach()), atol=1e-5, rtol=1e-6)
    (gradient,) = torch.autograd.grad(linear.base_input(x).sum(), x)
    assert torch.equal(gradient, torch.ones_like(x) if stored.smooth is None else (1 / stored.smooth).expand(4, 32))
