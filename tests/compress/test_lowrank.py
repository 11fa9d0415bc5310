"""Closed form = the papers' route (root, inverse, full SVD), on both sides, by both algorithms, and on singular moments."""

import numpy as np
import pytest
import scipy.linalg
import torch
from bitmend.compress import lowrank
from bitmend.compress.lowrank import Metric, WeightedError, balance, best_low_rank, spectrum, squared_error


def moment(features: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """A second moment as calibration leaves it: channels of very unequal size, one of them huge."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) / features**0.5 + torch.eye(features)
    size = torch.logspace(-1, 1, features)
    size[3] = 60.0
    x = torch.randn(tokens, features, generator=generator) @ mix * size
    return x.T @ x / tokens


def noise(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def by_root_and_inverse(error: torch.Tensor, second: torch.Tensor, rank: int, row: torch.Tensor | None = None) -> torch.Tensor:
    """QERA, theorem 1, as its authors compute it: SVD of E·R^½ in full, then back through the inverse root."""
    root = np.real(scipy.linalg.sqrtm(second.double().numpy()))
    rows = np.ones(len(error)) if row is None else row.double().numpy()
    u, s, vh = np.linalg.svd(rows[:, None] * error.double().numpy() @ root, full_matrices=False)
    low = (u[:, :rank] * s[:rank]) @ vh[:rank] @ np.linalg.inv(root)
    return torch.from_numpy(low / rows[:, None])


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (64, 64)])
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_exact_step_is_the_papers_minimum(shape, rank):
    error, second = noise(*shape), moment(shape[1], 1000)
    up, down = best_low_rank(error, Metric(moment_II=second), rank)
    slow = by_root_and_inverse(error, second, rank)
    torch.testing.assert_close((up @ down).double(), slow, rtol=1e-4, atol=1e-6)
    ours, theirs = (squared_error(error - low, Metric(moment_II=second)) for low in (up @ down, slow))
    assert ours <= theirs * (1 + 1e-6)


@pytest.mark.parametrize("shape", [(48, 80), (80, 48)])
def test_row_and_column_weights_are_the_full_case_with_a_diagonal(shape):
    error = noise(*shape)
    row, column = torch.rand(shape[0]) + 0.1, torch.rand(shape[1]) + 0.1
    up, down = best_low_rank(error, Metric(row, column), 5)
    slow = by_root_and_inverse(error, column.square().diag(), 5, row)
    torch.testing.assert_close((up @ down).double(), slow, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_plain_metric_is_the_truncated_svd(shape):
    error = noise(*shape)
    u, s, vh = torch.linalg.svd(error, full_matrices=False)
    up, down = best_low_rank(error, Metric(), 6)
    torch.testing.assert_close(up @ down, (u[:, :6] * s[:6]) @ vh[:6], rtol=1e-4, atol=1e-6)


METRICS = ["plain", "row_column", "moment"]


def metric_for(kind: str, shape: tuple[int, int]) -> Metric:
    row, column = torch.rand(shape[0]) + 0.1, torch.rand(shape[1]) + 0.1
    return {"plain": Metric(), "row_column": Metric(row, column), "moment": Metric(moment_II=moment(shape[1], 1000))}[kind]


@pytest.mark.parametrize("shape", [(48, 80), (80, 48)])
@pytest.mark.parametrize("kind", METRICS)
def test_what_a_term_leaves_is_the_squared_error_of_the_difference(shape, kind):
    """From thin products; for the best term, for one that does nothing and for one that does harm."""
    error, metric = noise(*shape), metric_for(kind, shape)
    known = WeightedError(error, metric)
    up, down = known.best(7)
    for term in ((up, down), (up * 0, down), (up * 3, down), (torch.randn(shape[0], 2), torch.randn(2, shape[1]))):
        assert known.left_by(*term) == pytest.approx(squared_error(error - torch.mm(*term), metric), rel=1e-6)
    assert known.squared == pytest.approx(known.squared_O.sum().item()) and len(known.squared_O) == shape[0]


@pytest.mark.parametrize("side", [16, 512])
@pytest.mark.parametrize("kind", METRICS)
def test_the_vectors_of_a_larger_rank_hold_those_of_a_smaller_one(kind, side, monkeypatch):
    monkeypatch.setattr(lowrank, "KRYLOV_SIDE", side)
    error, metric, solved = noise(160, 224), metric_for(kind, (160, 224)), []
    plain = WeightedError._left_vectors
    monkeypatch.setattr(WeightedError, "_left_vectors", lambda self, rank: solved.append(rank) or plain(self, rank))
    known = WeightedError(error, metric)
    known.best(8)
    left = known.left_by(*known.best(3))
    assert solved == [8]
    assert left == pytest.approx(squared_error(error - torch.mm(*best_low_rank(error, metric, 3)), metric), rel=1e-5)


@pytest.mark.parametrize("kind", METRICS)
def test_a_known_product_changes_nothing(kind, monkeypatch):
    """The Krylov space takes F·R where it is there already."""
    monkeypatch.setattr(lowrank, "KRYLOV_SIDE", 16)
    error, metric = noise(160, 224), metric_for(kind, (160, 224))
    known = WeightedError(error, metric)
    assert known.squared > 0
    torch.testing.assert_close(torch.mm(*known.best(8)), torch.mm(*best_low_rank(error, metric, 8)), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shape", [(160, 224), (224, 160), (192, 192)])
@pytest.mark.parametrize("kind", METRICS)
def test_krylov_space_errs_as_little_as_the_eigensolve(shape, kind, monkeypatch):
    error, metric = noise(*shape), metric_for(kind, shape)
    dense = squared_error(error - torch.mm(*best_low_rank(error, metric, 8)), metric)
    monkeypatch.setattr(lowrank, "KRYLOV_SIDE", 16)
    calls = []
    monkeypatch.setattr(lowrank, "_krylov", lambda *a, inner=lowrank._krylov: calls.append(1) or inner(*a))
    krylov = squared_error(error - torch.mm(*best_low_rank(error, metric, 8)), metric)
    assert calls
    assert krylov == pytest.approx(dense, rel=1e-6)


@pytest.mark.parametrize("overlap", [0.0, 0.1, 1.0])
def test_the_moment_beyond_a_term_weighs_what_the_best_up_leaves(overlap):
    second, error = moment(48, 400), noise(32, 48)
    down = noise(6, 48, 5)
    left = Metric(moment_II=second).beyond(down, overlap)
    root = np.real(scipy.linalg.sqrtm(second.double().numpy()))
    weighted, reached = error.double().numpy() @ root, down.double().numpy() @ root
    up = np.linalg.lstsq(reached.T, weighted.T, rcond=None)[0].T
    least, whole = np.square(weighted - up @ reached).sum(), np.square(weighted).sum()
    expected = least + overlap * (whole - least)
    assert squared_error(error, Metric(moment_II=left)) == pytest.approx(expected, rel=1e-4)
    assert bool((left.diagonal() >= 0).all())


def test_error_past_a_rank_is_read_off_the_spectrum():
    for shape in ((48, 80), (80, 48)):
        error, metric = noise(*shape), Metric(torch.rand(shape[0]) + 0.5, moment_II=moment(shape[1], 500))
        values = spectrum(error, metric)
        assert len(values) == 48
        for rank in (1, 5, 20):
            left = squared_error(error - torch.mm(*best_low_rank(error, metric, rank)), metric)
            assert left == pytest.approx(values[rank:].sum().item(), rel=1e-4)
        assert squared_error(error, metric) == pytest.approx(values.sum().item(), rel=1e-6)


@pytest.mark.parametrize("shape", [(48, 80), (80, 48)])
def test_singular_moment_is_solved_without_nan_and_to_the_tail_of_its_spectrum(shape):
    error, second = noise(*shape), moment(shape[1], 12)
    second[:, 5] = second[5] = 0
    metric = Metric(moment_II=second)
    for rank in (4, 30):
        up, down = best_low_rank(error, metric, rank)
        assert torch.isfinite(up).all() and torch.isfinite(down).all()
        left = squared_error(error - up @ down, metric)
        assert left <= spectrum(error, metric)[rank:].sum().item() + 1e-9 * squared_error(error, metric)


def test_zero_error_gives_zero_factors():
    up, down = best_low_rank(torch.zeros(20, 30), Metric(moment_II=moment(30, 100)), 3)
    assert not up.any() and not down.any()


def test_scaled_metric_is_the_metric_of_the_smoothed_matrix():
    error, smooth = noise(24, 32), torch.rand(32) + 0.2
    for metric in (Metric(moment_II=moment(32, 100)), Metric(column_I=torch.rand(32)), Metric()):
        assert squared_error(error * smooth, metric.scaled(smooth)) == pytest.approx(squared_error(error, metric), rel=1e-5)


def test_balanced_factors_have_the_same_product_and_equal_gram_matrices():
    up, down = torch.randn(20, 4) * 1e3, torch.randn(4, 30) * 1e-3
    left, right = balance(up, down)
    torch.testing.assert_close(left @ right, up @ down, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(left.T @ left, right @ right.T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 33])
def test_impossible_rank_is_named(rank):
    with pytest.raises(ValueError, match=rf"rank {rank} does not fit a 32×64 matrix; choose 1…32"):
        best_low_rank(torch.randn(32, 64), Metric(), rank)
