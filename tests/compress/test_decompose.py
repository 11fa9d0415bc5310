"""Every preset against its paper's objective, solved slowly; never worse than L = 0; best iterate; masks; bad input."""

import pytest
import torch
from bitmend.compress.methods import DECOMPOSE
from bitmend.compress.requantize import requantize
from bitmend.compress.statistics import Fisher, InputStatistics, LayerStatistics
from bitmend.compress.weights import NormalFloatWeight, StoredWeight, UniformWeight

EVERYTHING = frozenset({"norms", "absmax", "absmean", "second_moment", "samples"})


def inputs(features: int = 128, tokens: int = 700, seed: int = 0) -> InputStatistics:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) / features**0.5 + torch.eye(features)
    size = torch.logspace(-1, 0.7, features)[torch.randperm(features, generator=generator)]
    statistics = InputStatistics(features, EVERYTHING)
    statistics.update(torch.randn(tokens, features, generator=generator) @ mix * size)
    return statistics


def matrix(rows: int = 96, columns: int = 128, seed: int = 1) -> torch.Tensor:
    """A weight with some structure: noise and a dozen strong directions."""
    generator = torch.Generator().manual_seed(seed)
    strong = torch.randn(rows, 12, generator=generator) @ torch.randn(12, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator) * 0.05 + strong * 0.02


def fisher(rows: int = 96, columns: int = 128) -> Fisher:
    generator = torch.Generator().manual_seed(5)
    return Fisher(torch.rand(rows, generator=generator).square() + 1e-3, torch.rand(columns, generator=generator).square() + 1e-3)


def uniform(target: torch.Tensor, bits: int = 3, mask: torch.Tensor | None = None) -> StoredWeight:
    rows, columns = target.shape
    empty = UniformWeight.from_codes(
        torch.zeros(rows, columns, dtype=torch.int64),
        torch.ones(rows, columns // 64).half(),
        torch.ones(rows, columns // 64, dtype=torch.int64),
        bits,
        64,
    )
    return requantize(StoredWeight(empty).with_mask(mask), target, "rtn")


def normal_float(target: torch.Tensor, bits: int = 4) -> StoredWeight:
    empty = NormalFloatWeight(torch.zeros(1), bits, 64, target.shape[1])
    return requantize(StoredWeight(empty, mask=None), target, "rtn")


def run(name: str, weight: StoredWeight, target: torch.Tensor, statistics: LayerStatistics, **chosen):
    row = DECOMPOSE[name]
    return row.function(weight, target, statistics, row.config(**{**row.defaults, **chosen}))


def truncated(a: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(a.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def root(second: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(second.double())
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def test_loftq_alternates_as_its_paper_and_returns_the_best_round():
    target, statistics = matrix(), LayerStatistics(inputs())
    start = uniform(target, 2)
    stored, metrics = run("loftq", start, target, statistics, rank=16)
    low, errors = torch.zeros_like(target), []
    for _ in range(5):
        base = requantize(start, target - low, "rtn").dense()
        low = truncated(target - base, 16).float()
        errors.append(torch.linalg.norm(target - base - low).item())
    first, _ = run("loftq", start, target, statistics, rank=16, iterations=1)
    assert torch.linalg.norm(target - first.dense()).item() == pytest.approx(errors[0], rel=1e-4)
    assert torch.linalg.norm(target - stored.dense()).item() == pytest.approx(min(errors), rel=5e-3)
    assert metrics["iterations"] == 5 and metrics["relative_error"] < metrics["relative_error_before"]


def test_lq_lora_starts_with_the_term_weighs_by_fisher_and_keeps_the_best():
    target, information = matrix(), fisher()
    start, statistics = normal_float(target), LayerStatistics(inputs(), information)
    stored, metrics = run("lq_lora", start, target, statistics, rank=16)
    d1, d2 = information.row_mean_O.double().sqrt().unsqueeze(1), information.column_mean_I.double().sqrt()
    low, errors = truncated(d1 * target * d2, 16) / d1 / d2, []
    while len(errors) < 2 or errors[-1] <= errors[-2]:
        base = requantize(start, target - low.float(), "rtn").dense()
        low = truncated(d1 * (target - base) * d2, 16) / d1 / d2
        errors.append(torch.linalg.norm(d1 * (target - base - low) * d2).item())
    error = torch.linalg.norm(d1 * (target - stored.dense()) * d2).item()
    first, _ = run("lq_lora", start, target, statistics, rank=16, iterations=1)
    assert torch.linalg.norm(d1 * (target - first.dense()) * d2).item() == pytest.approx(errors[0], rel=1e-4)
    assert error == pytest.approx(min(errors), rel=1e-2)  # rounding the factors sends later rounds another way
    assert metrics["iterations"] > metrics["best_iteration"] >= 1


@pytest.mark.parametrize("shape", [(96, 128), (192, 64)])
def test_qera_exact_reaches_the_optimum_for_the_given_q(shape):
    target, statistics = matrix(*shape), LayerStatistics(inputs(shape[1]))
    start = uniform(target)
    stored, metrics = run("qera_exact", start, target, statistics, rank=8)
    s = root(statistics.inputs.second_moment_II)
    error = (target - start.dense()).double() @ s
    best = torch.linalg.norm(error - truncated(error, 8)).item()
    assert torch.linalg.norm((target - stored.dense()).double() @ s).item() == pytest.approx(best, rel=1e-4)
    assert torch.equal(stored.base_dense(), start.base_dense())
    assert stored.low_rank is not None and stored.low_rank.factors(torch.float16)[0].shape == (shape[0], 8)
    assert metrics["relative_error"] == pytest.approx(best / torch.linalg.norm(target.double() @ s).item(), rel=1e-4)
