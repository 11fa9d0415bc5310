"""The integer program against all choices; budgets kept to the byte; infeasible ones say what would do."""

from itertools import product

import numpy as np
import pytest
from bitmend.compress.allocate import InfeasibleBudget, choose


def table(matrices: int, settings: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.integers(100, 10_000, (matrices, settings)), generator.lognormal(0, 3, (matrices, settings))


def by_trying_all(costs, losses, budget, removed=None, least=0.0):
    rows = range(len(costs))
    best = np.inf
    for choice in product(range(costs.shape[1]), repeat=len(costs)):
        if sum(costs[m, k] for m, k in zip(rows, choice, strict=True)) > budget:
            continue
        if removed is not None and sum(removed[m, k] for m, k in zip(rows, choice, strict=True)) < least:
            continue
        best = min(best, sum(losses[m, k] for m, k in zip(rows, choice, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(12))
def test_choice_is_the_best_of_all(seed):
    costs, losses = table(5, 6, seed)
    budget = int(costs.min(1).sum() * 1.2 + costs.max(1).sum() * 0.2)
    actual = choose(costs, losses, budget, gap=0.0)
    assert actual.total_loss == pytest.approx(by_trying_all(costs, losses, budget), rel=1e-9)
    assert actual.total_bytes == sum(costs[m, k] for m, k in enumerate(actual.choice)) <= budget
    assert actual.gap <= 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_sparsity_can_be_required_together_with_a_budget(seed):
    costs, losses = table(4, 6, seed)
    removed = np.random.default_rng(seed + 100).integers(0, 2, costs.shape) * 500
    removed[:, 0] = 500
    least, budget = 1000, int(costs[:, 0].sum() + costs.max(1).sum() * 0.2)
    actual = choose(costs, losses, budget, removed, least, gap=0.0)
    assert actual.total_loss == pytest.approx(by_trying_all(costs, losses, budget, removed, least), rel=1e-9)
    assert sum(removed[m, k] for m, k in enumerate(actual.choice)) >= least


def test_losses_of_ten_orders_of_magnitude_are_still_told_apart():
    costs, losses = table(6, 5, 3)
    losses = 10.0 ** np.random.default_rng(3).uniform(-9, 1, losses.shape)
    losses[:, 0], costs[:, 0] = 1e3, 1
    budget = int(costs.max(1).sum() * 0.6)
    assert choose(costs, losses, budget, gap=0.0).total_loss == pytest.approx(by_trying_all(costs, losses, budget), rel=1e-6)


def test_settings_that_do_not_fit_a_matrix_are_never_chosen():
    costs, losses = table(3, 4, 0)
    losses[0, :3], losses[1, 1] = np.inf, np.nan
    costs[0, 3] = 1
    actual = choose(costs, losses, costs.sum())
    assert actual.choice[0] == 3 and actual.choice[1] != 1
    losses[0, 3] = np.inf
    with pytest.raises(ValueError, match="no setting fits matrix 0"):
        choose(costs, losses, costs.sum())


def test_infeasible_budget_says_the_smallest_feasible_one():
    costs, losses = table(4, 5, 1)
    smallest = int(costs.min(1).sum())
    with pytest.raises(InfeasibleBudget, match=f"smallest feasible one is {smallest:,} bytes") as caught:
        choose(costs, losses, smallest - 1)
    assert caught.value.smallest_bytes == smallest
    assert choose(costs, losses, smallest).total_bytes == smallest


def test_impossible_sparsity_says_what_the_settings_allow():
    costs, losses = table(3, 4, 2)
    removed = np.full(costs.shape, 10)
    with pytest.raises(ValueError, match="removes 31 weights; the settings allow 30 at most"):
        choose(costs, losses, costs.sum(), removed, 31)


def test_the_solver_writes_nothing_to_stdout(capfd):
    """HiGHS leaves a note there for this program, among others."""
    generator = np.random.default_rng(2)
    size, bits = (
        np.array([16384, 8192, 8192, 16384, 32768, 32768, 32768] * 4),
        np.array([2.47, 2.7, 3.5, 3.8, 4.7, 2.8, 3.0, 3.9, 4.1, 5.0]),
    )
    costs = np.round(size[:, None] * bits / 8).astype(int)
    losses = generator.lognormal(0, 1, (28, 1)) * 4.0**-bits * generator.lognormal(0, 0.1, (28, 10))
    share = np.linspace(0.7, 0.99, 12)[4]
    print("before")
    choose(costs, losses, int(costs.min(1).sum() * (1 - share) + costs.max(1).sum() * share))
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"


def test_seven_billion_parameters_and_432_settings_keep_budget_and_gap():
    """224 matrices as a 7B model has them: losses fall four-fold a bit, with matrices of very different sensitivity."""
    generator = np.random.default_rng(0)
    size = np.tile([4096 * 4096] * 4 + [4096 * 11008] * 3, 32)
    bits = generator.uniform(2.0, 9.0, 432)
    costs = np.round(size[:, None] * bits / 8).astype(np.int64)
    losses = generator.lognormal(0, 2, (224, 1)) * 4.0**-bits * generator.lognormal(0, 0.1, (224, 432))
    budget = int(size.sum() * 2.75 / 8)
    actual = choose(costs, losses, budget)
    assert actual.gap <= 1e-3 and actual.total_bytes <= budget
    assert actual.settings < 224 * 432 / 3  # the dominated ones are gone
    uniform = losses[:, bits <= 2.75][:, np.argmax(bits[bits <= 2.75])].sum()
    assert actual.total_loss < uniform
    assert actual.total_bytes > budget * 0.999
