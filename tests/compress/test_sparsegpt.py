"""SparseGPT against a twin with one fresh inverse per column; exact counts; the joint sweep keeps mask and grid."""

import pytest
import torch
from bitmend.compress.feedback import inverse_factor
from bitmend.compress.grids import UniformGrid, fit, round_to_grid
from bitmend.compress.masks import WandaConfig, keep_highest, parse_pattern, wanda
from bitmend.compress.sparsegpt import GridSearch, SparseGptConfig, sparsegpt, sparsegpt_sweep
from bitmend.compress.statistics import InputStatistics, LayerStatistics
from bitmend.compress.weights import ActivationGrid, DenseWeight, StoredWeight, UniformWeight
from torch import Tensor


def dequantized(codes_OS, scale_O1, zero_O1):
    return (codes_OS - zero_O1) * scale_O1


def layer(rows: int = 16, columns: int = 96, seed: int = 0) -> tuple[Tensor, LayerStatistics]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + torch.randn(columns, columns, generator=generator) * 0.1
    size = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    statistics = InputStatistics(columns, frozenset({"second_moment"}))
    statistics.update((torch.randn(500, columns, generator=generator) @ mix) * size)
    return torch.randn(rows, columns, generator=generator) * 0.05, LayerStatistics(statistics)


def error(weight: Tensor, other: Tensor, statistics: LayerStatistics) -> float:
    lost = weight - other
    return ((lost @ statistics.inputs.second_moment_II) * lost).sum().item()


def twin(weight: Tensor, moment: Tensor, sparsity: float, pattern: str, grid: UniformGrid | None, allowed: Tensor | None = None):
    """(values, mask): the mask of 128 columns, or of each M, is chosen when the first is reached; then column by column."""
    rows, columns = weight.shape
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(columns, dtype=moment.dtype)
    inverses = [torch.linalg.inv(damped[j:, j:]) for j in range(columns)]
    weight, out = weight.clone(), torch.zeros_like(weight)
    mask = torch.ones(rows, columns, dtype=torch.bool) if allowed is None else allowed.clone()
    parsed = parse_pattern(pattern)
    span = 128 if parsed is None else parsed[1]
    size = columns if grid is None else grid.size(columns)
    scale = zero = torch.ones(rows, 1)
    for j in range(columns):
        if j % span == 0:
            members = range(j, min(j + span, columns))
            score = torch.stack([weight[:, k].square() / inverses[k][0, 0] for k in members], dim=1)
            score = score.where(mask[:, j : j + span], -1.0)
            if parsed is None:
                chosen = keep_highest(score.T.reshape(-1), round(score.numel() * sparsity)).view(len(members), rows).T
            else:
                chosen = keep_highest(score, parsed[1] - parsed[0])
            mask[:, j : j + span] = chosen
        if grid is not None and j % size == 0:
            scale, zero = fit(weight[:, j : j + size].where(mask[:, j : j + size], 0), grid, "none")
        value = weight[:, j] if grid is None else dequantized(round_to_grid(weight[:, j : j + 1], scale, zero, grid), scale, zero).view(-1)
        out[:, j] = value.where(mask[:, j], 0)
        lost = weight[:, j] - out[:, j]
        weight[:, j:] -= lost.unsqueeze(1) * (inverses[j][0] / inverses[j][0, 0])
    return out, mask


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8", "1:4"])
@pytest.mark.parametrize("columns", [96, 200, 320])
def test_blocked_equals_column_by_column(columns, pattern):
    weight, statistics = layer(columns=columns)
    parsed = parse_pattern(pattern)
    sparsity = 0.6 if parsed is None else 1 - parsed[0] / parsed[1]
    moment = statistics.inputs.second_moment_II.double()
    levels, sweep, _ = sparsegpt_sweep(weight.double(), inverse_factor(moment), sparsity, pattern)
    values, mask = twin(weight.double(), moment, sparsity, pattern, None)
    assert torch.equal(sweep.keep_IO.T, mask)
    assert torch.allclose(levels.where(mask, 0), values, atol=1e-9)


@pytest.mark.parametrize(
    ("columns", "pattern", "group_size"),
    [
        (96, "unstructured", 32),
        (200, "2:4", 40),
        (320, "unstructured", 64),
        (384, "4:8", 192),
        (256, "unstructured", -1),
        (384, "unstructured", 96),
    ],
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_joint_sweep_equals_column_by_column(columns, pattern, group_size, symmetric):
    weight, statistics = layer(rows=8, columns=columns)
    grid, moment = UniformGrid(3, group_size, symmetric), statistics.inputs.second_moment_II.double()
    levels, sweep, _ = sparsegpt_sweep(weight.double(), inverse_factor(moment), 0.5, pattern, GridSearch(grid))
    values, mask = twin(weight.double(), moment, 0.5, pattern, grid)
    assert sweep.scale_GO is not None
    assert torch.equal(sweep.keep_IO.T, mask)
    actual = levels * sweep.scale_GO.T.repeat_interleave(grid.size(columns), dim=1)
    assert torch.allclose(actual, values, atol=1e-9)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_an_earlier_mask_survives(pattern):
    weight, statistics = layer()
    allowed = torch.rand(16, 96, generator=torch.Generator().manual_seed(1)) < 0.8
    start = StoredWeight(DenseWeight(weight)).with_mask(allowed)
    actual, _ = sparsegpt(start, weight, statistics, SparseGptConfig(pattern=pattern))
    mask = actual.mask_OI()
    assert mask is not None
    if pattern == "unstructured":
        assert not bool((mask & ~allowed).any())
        assert actual.sparsity() == pytest.approx(0.5, abs=1e-3)
    else:
        short = allowed.view(16, -1, 4).sum(-1) < 2
        assert not bool((mask & ~allowed).view(16, -1, 4).any(-1)[~short].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.7), ("2:4", 0.5), ("1:4", 0.75)])
def test_counts_are_exact_and_the_dtype_stays(dtype, pattern, sparsity):
    weight, statistics = layer(rows=20, columns=200)
    actual, metrics = sparsegpt(StoredWeight(DenseWeight(weight.to(dtype))), weight, statistics, SparseGptConfig(sparsity, pattern))
    assert isinstance(actual.base, DenseWeight)
    assert actual.base.weight.dtype == dtype
    mask = actual.mask_OI()
    assert mask is not None
    assert bool((actual.base.weight[~mask] == 0).all())
    assert metrics["sparsity"] == pytest.approx(sparsity, abs=1e-3)
    if pattern != "unstructured":
        kept, of = parse_pattern(pattern) or (0, 0)
        assert bool((mask.view(20, -1, of).sum(-1) == kept).all())


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_it_loses_less_than_wanda(pattern):
    weight, statistics = layer(rows=64, columns=256)
    start = StoredWeight(DenseWeight(weight))
    other, _ = wanda(start, weight, statistics, WandaConfig(pattern=pattern))
    actual, _ = sparsegpt(start, weight, statistics, SparseGptConfig(pattern=pattern))
    assert error(weight, actual.dense(), statistics) < 0.8 * error(weight, other.dense(), statistics)


@pytest.mark.parametrize("clip", ["none", "power", "hessian"])
def test_the_joint_sweep_gives_a_masked_grid_weight(clip):
    weight, statistics = layer(rows=32, columns=192)
    activations = ActivationGrid(8)
    actual, metrics = sparsegpt(
        StoredWeight(DenseWeight(weight)), weight, statistics, SparseGptConfig(0.5, "2:4", bits=4, clip=clip, activations=activations)
    )
    assert isinstance(actual.base, UniformWeight)
    assert actual.activations == activations
    mask = actual.mask_OI()
    assert mask is not None
    assert bool((mask.view(32, -1, 4).sum(-1) == 2).all())
    assert bool((actual.base.dense()[~mask] == 0).all())
    assert metrics["squared_error"] > 0


def test_a_dead_layer_is_pruned_by_magnitude_alone():
    weight, _ = layer(rows=8, columns=64)
    inputs = InputStatistics(64, frozenset({"second_moment"}))
    inputs.update(torch.zeros(9, 64))
    actual, metrics = sparsegpt(StoredWeight(DenseWeight(weight)), weight, LayerStatistics(inputs), SparseGptConfig(0.25))
    assert metrics["dead_layer"] == 1
    mask = actual.mask_OI()
    assert mask is not None
    assert torch.equal(mask, keep_highest(weight.abs().view(-1), 128).view(8, 64))
    assert torch.equal(actual.dense(), weight.where(mask, 0))


def test_what_cannot_be_is_refused():
    weight, statistics = layer(columns=100)
    start = StoredWeight(DenseWeight(weight))
    with pytest.raises(ValueError, match="in_features 100 is not a multiple of 8; pattern 4:8 cannot be met"):
        sparsegpt(start, weight, statistics, SparseGptConfig(0.5, "4:8"))
    with pytest.raises(ValueError, match=r"keeps 2 of 4, a sparsity of 0\.5, not 0\.6"):
        SparseGptConfig(0.6, "2:4")
    with pytest.raises(ValueError, match="activations are quantized only with quantized weights"):
        SparseGptConfig(activations=ActivationGrid(8))
    with pytest.raises(ValueError, match="in_features 100 is not a multiple of group_size 64"):
        sparsegpt(start, weight, statistics, SparseGptConfig(0.5, bits=4))
    quantized, _ = sparsegpt(start, weight, statistics, SparseGptConfig(0.5, bits=4, group_size=20))
    with pytest.raises(ValueError, match="prune before quantizing, or set bits"):
        sparsegpt(quantized, weight, statistics, SparseGptConfig(0.5))
    with pytest.raises(ValueError, match="target weight: 1 of 1600 values are NaN or Inf"):
        sparsegpt(
            start, weight.clone().index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(float("inf"))), statistics, SparseGptConfig()
        )
