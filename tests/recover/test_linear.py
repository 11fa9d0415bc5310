from dataclasses import replace

import pytest
import torch
from bitmend.compress.activation_grid import fake_quantize
from bitmend.compress.weights import ActivationGrid, DenseWeight, StoredWeight
from bitmend.kernels.operators import ReferenceOperator
from bitmend.recover.compressed_linear import CompressedLinear
from bitmend.recover.compressed_model import compressed_linears, install
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
