"""What is kept dense of a model's compressed linears changes no bit, and fits into its budget."""

from dataclasses import replace

import pytest
import torch
from bitmend.compress.weights import SparseDelta, to_tensors
from bitmend.recover.compressed_linear import CompressedLinear
from bitmend.recover.compressed_model import cache_dense, steady
from bitmend.recover.scales import RelativeScales
from bitmend.recover.super_scales import SuperScales
from bitmend.recover.whole_matrices import LatentGrid
from torch import nn

from .conftest import compress


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
@pytest.mark.parametrize(
    ("method", "kind"), [("scales", k) for k in ("3-bit", "nf4", "2:4+4-bit", "q4_1", "nf4 + delta")] + [("latents", "2:4+4-bit")]
)
def test_a_held_matrix_gives_the_same_bits_and_is_built_once(method, kind, dtype, monkeypatch):
    """Three micro-batches of a step, whatever is kept of them; then values move, and so does what is multiplied."""
    calls, effective = [], CompressedLinear.effective
    monkeypatch.setattr(CompressedLinear, "effective", lambda *args: calls.append(0) or effective(*args))
    results = []
    for budget, built in ((0, 6), (24 * 32 * dtype.itemsize, 1), (1e9, 1)):
        linear, trained = trained_by(method, kind, dtype)
        assert (cache_dense({"a": linear}, budget) > 0) == (budget > 0) == linear.holds
        actual = []
        for step in range(2):
            calls.clear()
            with steady([linear]):
                for number in range(3):
                    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(number)).to(dtype).requires_grad_(True)
                    y = linear(x)
                    actual += [y, *torch.autograd.grad(y.float().square().sum(), [x, *trained.values()])]
            assert len(calls) == built, (budget, step)
            for parameter in trained.values():
                parameter.data.mul_(2.0)
        results.append(actual)
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
