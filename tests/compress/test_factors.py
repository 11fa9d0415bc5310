"""Stored factors: their bytes to the bit, what rounding costs, and that solving again makes it cost less."""

import pytest
import torch
from bitmend.compress.factors import FactorForm, store_factors
from bitmend.compress.feedback import inverse_factor
from bitmend.compress.grids import UniformGrid
from bitmend.compress.lowrank import Metric, WeightedError, best_low_rank, squared_error
from bitmend.compress.rounding import round_uniform


def problem(rows: int = 64, columns: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(900, columns, generator=generator) @ mix * torch.logspace(-1, 0.5, columns)
    return torch.randn(rows, columns, generator=generator) * 0.02, x.T @ x / 900


@pytest.mark.parametrize("rank", [1, 5, 8, 16, 64])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("shape", [(64, 128), (72, 96)])
def test_a_form_prices_exactly_what_is_stored(rank, bits, shape):
    error, form = torch.randn(*shape), FactorForm(bits)
    up, down = best_low_rank(error, Metric(), rank)
    assert store_factors(up, down, form, WeightedError(error, Metric())).stored_bits() == form.stored_bits(rank, *shape)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_largest_rank_fits_the_budget_and_the_next_does_not(bits):
    form = FactorForm(bits)
    for budget in (1, 20_000, 100_000, 10**9):
        rank = form.largest_rank(budget, 160, 192)
        assert rank == 0 or form.stored_bits(rank, 160, 192) <= budget
        after = rank + 1 if rank < 32 else rank + 8
        assert after > 160 or form.stored_bits(after, 160, 192) > budget


def test_sixteen_bits_are_the_factors_rounded():
    error, moment = problem()
    up, down = best_low_rank(error, Metric(moment_II=moment), 8)
    half = store_factors(up, down, FactorForm(16, "float16"), WeightedError(error, Metric(moment_II=moment)))
    brain = store_factors(up, down, FactorForm(16, "bfloat16"), WeightedError(error, Metric(moment_II=moment)))
    for stored, kind in ((half, torch.float16), (brain, torch.bfloat16)):
        for factor, exact in ((stored.up, up), (stored.down, down)):
            assert isinstance(factor, torch.Tensor) and torch.equal(factor, exact.to(kind))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["plain", "row_column", "moment"])
def test_rounded_factors_err_less_than_rounding_each_alone(bits, kind):
    error, moment = problem()
    row, column = torch.rand(64) + 0.1, torch.rand(128) + 0.1
    metric = {"plain": Metric(), "row_column": Metric(row, column), "moment": Metric(moment_II=moment)}[kind]
    up, down = best_low_rank(error, metric, 16)
    feedback = inverse_factor(moment, 0.01, True) if kind == "moment" else None
    stored = store_factors(up, down, FactorForm(bits), WeightedError(error, metric), feedback)
    grid = UniformGrid(bits, -1, True), UniformGrid(bits, 64, True)
    naive = round_uniform(up, grid[0], "power").dense() @ round_uniform(down, grid[1], "power").dense()
    floor, ours, alone = (squared_error(error - low, metric) for low in (up @ down, stored.dense(), naive))
    whole = squared_error(error, metric)
    assert floor <= ours < alone
    assert (ours - floor) / (whole - floor) < {8: 2e-4, 4: 3e-2}[bits]


def test_a_zero_error_leaves_zero_factors_on_a_grid():
    error, moment = torch.zeros(16, 64), problem()[1][:64, :64]
    metric = Metric(moment_II=moment)
    up, down = best_low_rank(error, metric, 4)
    assert not store_factors(up, down, FactorForm(4), WeightedError(error, metric), inverse_factor(moment)).dense().any()
