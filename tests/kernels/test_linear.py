"""bind, bind_group: every kind of stored weight comes out as its definition says, by an operator that names itself."""

import pytest
import torch
from bitmend.compress.grids import UniformGrid, min_max, round_to_grid, to_record
from bitmend.compress.weights import ActivationGrid, DenseWeight, LowRank, NormalFloatWeight, SparseDelta, StoredWeight, UniformWeight
from bitmend.kernels.linear import bind
from bitmend.kernels.operators import rounded
from torch import Tensor

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def uniform(out: int, inp: int, bits: int, group: int = 64, symmetric: bool = False) -> UniformWeight:
    weight, grid = torch.randn(out, inp) / inp**0.5, UniformGrid(bits, group, symmetric)
    rows = weight.view(-1, grid.size(inp))
    scale, zero = min_max(rows, grid)
    codes = round_to_grid(rows, scale, zero, grid).view(out, inp)
    return to_record(codes, scale.view(out, -1), zero.view(out, -1), grid)


def pair(out: int, inp: int, rank: int, dtype: torch.dtype = torch.float16) -> LowRank:
    return LowRank((torch.randn(out, rank) / rank**0.5).to(dtype), (torch.randn(rank, inp) / inp**0.5).to(dtype))


def by_definition(stored: StoredWeight, bias: Tensor | None, x: Tensor) -> Tensor:
    """float64, from the records alone."""
    x64 = x.double()
    inner = x64 if stored.smooth is None else x64 / stored.smooth.double()
    y = rounded(inner.flatten(0, -2), stored.activations).view(inner.shape).double() @ stored.base_dense(torch.float64).t()
    if stored.low_rank is not None:
        y = y + x64 @ stored.low_rank.dense(torch.float64).t()
    if stored.delta is not None:
        y = y + x64 @ stored.delta.add_to_(torch.zeros(stored.shape, dtype=torch.float64)).t()
    return y if bias is None else y + bias.double()


def assert_close(y: Tensor, truth: Tensor, tolerance: float = 6e-3) -> None:
    """bfloat16 holds 8 bits: half of 2⁻⁸ for each of x, scale and y, against the size of the whole output."""
    assert y.isfinite().all()
    error = (y.double().cpu() - truth).norm() / truth.norm()
    assert error < tolerance, f"relative error {error:.2e}"


WEIGHTS = {
    "2 bits": lambda: StoredWeight(uniform(96, 192, 2), low_rank=pair(96, 192, 8)),
    "3 bits": lambda: StoredWeight(uniform(96, 192, 3), low_rank=pair(96, 192, 16, torch.bfloat16)),
    "4 bits": lambda: StoredWeight(uniform(96, 192, 4), low_rank=pair(96, 192, 16)),
    "4 bits, no rank": lambda: StoredWeight(uniform(96, 192, 4)),
    "8 bits": lambda: StoredWeight(uniform(96, 192, 8), low_rank=pair(96, 192, 8)),
    "symmetric": lambda: StoredWeight(uniform(96, 192, 4, symmetric=True)),
    "odd rows": lambda: StoredWeight(uniform(77, 192, 3), low_rank=pair(77, 192, 8)),
    "one group a row": lambda: StoredWeight(uniform(64, 192, 4, -1)),
    "group of 24": lambda: StoredWeight(uniform(64, 192, 4, 24)),
    "masked": lambda: StoredWeight(uniform(96, 192, 4), low_rank=pair(96, 192, 8)).with_mask(torch.rand(96, 192) > 0.5),
    "smooth": lambda: StoredWeight(uniform(96, 192, 4), low_rank=pair(96, 192, 8), smooth=torch.rand(192) + 0.5),
    "W4A8": lambda: StoredWeight(
        uniform(96, 192, 4), low_rank=pair(96, 192, 8), smooth=torch.rand(192) + 0.5, activations=ActivationGrid(8)
    ),
    "delta": lambda: StoredWeight(uniform(96, 192, 4), delta=SparseDelta(torch.randperm(96 * 192)[:50].int(), torch.randn(50))),
    "delta, W4A8": lambda: StoredWeight(
        uniform(96, 192, 4), delta=SparseDelta(torch.randperm(96 * 192)[:50].int(), torch.randn(50)), activations=ActivationGrid(8)
    ),
    "dense": lambda: StoredWeight(DenseWeight(torch.randn(96, 192).bfloat16()), low_rank=pair(96, 192, 8)),
    "factors on a grid": lambda: StoredWeight(uniform(96, 192, 4), low_rank=LowRank(uniform(96, 64, 8), uniform(64, 192, 8))),
    "act-order": lambda: StoredWeight(shuffled(uniform(96, 192, 4)), low_rank=pair(96, 192, 8)),
    "float zeros": lambda: StoredWeight(floating_zeros(uniform(96, 192, 4))),
    "float zeros, masked": lambda: StoredWeight(floating_zeros(uniform(96, 192, 4))).with_mask(torch.rand(96, 192) > 0.5),
    "nf4": lambda: StoredWeight(normal_float(96, 192), low_rank=pair(96, 192, 8)),
    "nf4, masked": lambda: StoredWeight(normal_float(96, 192)).with_mask(torch.rand(96, 192) > 0.5),
}


def shuffled(base: UniformWeight) -> UniformWeight:
    index = torch.arange(base.in_features) // base.group_size
    zeros = None if base.zeros is None else base.zeros_OG().long()
    order = torch.randperm(base.in_features)
    return UniformWeight.from_codes(base.codes_OI(), base.scales, zeros, base.bits, base.group_size, index[order])


def floating_zeros(base: UniformWeight) -> UniformWeight:
    return UniformWeight.from_codes(
        base.codes_OI(), base.scales, base.zeros_OG() + torch.rand_like(base.zeros_OG()) - 0.5, base.bits, base.group_size
    )


def normal_float(out: int, inp: int) -> NormalFloatWeight:
    packed = UniformWeight.from_codes(torch.randint(0, 16, (out, inp)), torch.ones(out, 1), None, 4, inp).codes
    return NormalFloatWeight(packed, 4, 64, inp, torch.rand(out, inp // 64) + 0.1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_bind_multiplies_as_defined(kind: str, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    stored = WEIGHTS[kind]()
    bias = torch.randn(stored.shape[0])
    module = bind(stored, bias, device=device, dtype=dtype)
    assert module.reason and module.backend in ("cpu-int4", "triton", "dense", "reference")
    for shape in ((1, 192), (2, 3, 192), (70, 192)):
        x = torch.randn(shape).to(dtype)
        y = module(x.to(device))
        assert y.dtype == dtype and y.shape == (*shape[:-1], stored.shape[0])
        assert_close(y, by_definition(stored, bias, x), 0.02 if stored.activations else 6e-3)
