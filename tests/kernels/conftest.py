"""What the kernels' tests share: the device they run on, a cache of their own, records to multiply with, poisoned memory."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitmend.compress.grids import UniformGrid, min_max, round_to_grid, to_record
from bitmend.compress.weights import LowRank, NormalFloatWeight, UniformWeight
from bitmend.kernels import choices, cpu
from torch import Tensor


@pytest.fixture
def device() -> str:
    """CUDA where there is one, else the CPU through Triton's interpreter (tests/conftest.py sets TRITON_INTERPRET)."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITMEND_CACHE", str(tmp_path_factory.getbasetemp() / "kernels-cache"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Packed forms are always kept, so that the timings of a busy machine decide nothing."""
    monkeypatch.setattr(cpu, "PACKED_PATIENCE", 1e9)
    monkeypatch.setenv("BITMEND_CACHE", str(tmp_path_factory.mktemp("patient")))
    choices.forget()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, or an impossible integer, so that a place that a kernel forgot to write is seen."""
    plain = torch.empty

    def empty(*size: Any, **options: Any) -> Tensor:
        made = plain(*size, **options)
        return made.fill_(math.nan if made.is_floating_point() else -111)

    monkeypatch.setattr(torch, "empty", empty)


def _uniform(out: int, inp: int, bits: int = 4, group: int = 64, symmetric: bool = False) -> UniformWeight:
    weight, grid = torch.randn(out, inp) / inp**0.5, UniformGrid(bits, group, symmetric)
    rows = weight.view(-1, grid.size(inp))
    scale, zero = min_max(rows, grid)
    codes = round_to_grid(rows, scale, zero, grid).view(out, inp)
    return to_record(codes, scale.view(out, -1), zero.view(out, -1), grid)


def _normal_float(out: int, inp: int, bits: int = 4, block: int = 64) -> NormalFloatWeight:
    packed = UniformWeight.from_codes(torch.randint(0, 1 << bits, (out, inp)), torch.ones(out, 1), None, bits, inp).codes
    return NormalFloatWeight(packed, bits, block, inp, torch.rand(out, inp // block) + 0.1)


def _pair(out: int, inp: int, rank: int, dtype: torch.dtype = torch.float16) -> LowRank:
    return LowRank((torch.randn(out, rank) / rank**0.5).to(dtype), (torch.randn(rank, inp) / inp**0.5).to(dtype))


@pytest.fixture
def uniform() -> Callable[..., UniformWeight]:
    return _uniform


@pytest.fixture
def normal_float() -> Callable[..., NormalFloatWeight]:
    return _normal_float


@pytest.fixture
def pair() -> Callable[..., LowRank]:
    return _pair


@pytest.fixture
def within_budget() -> Callable[..., None]:
    """Asserts that `value` errs at most `slack` × what `eager` errs, both against `truth` in float64, in norm and at the worst place."""

    def check(value: Tensor, eager: Tensor, truth: Tensor, slack: float = 2.0) -> None:
        assert truth.dtype == torch.float64
        got, allowed = value.double() - truth, eager.double() - truth
        floor = torch.finfo(value.dtype).eps * truth.norm()
        assert value.isfinite().all(), "a place was not written, or overflowed"
        assert got.norm() <= slack * torch.maximum(allowed.norm(), floor / 4), f"{got.norm():.3e} against {allowed.norm():.3e}"
        assert got.abs().max() <= 2 * slack * torch.maximum(allowed.abs().max(), torch.finfo(value.dtype).eps * truth.abs().max() / 2)

    return check
