"""Groups of rows under moments of their own, against plain GPTQ of each group alone on the moment written out."""

from dataclasses import replace

import pytest
import torch
from bitmend.compress.gptq import GptqConfig, by_rows, gptq, gptq_group
from bitmend.compress.guided import MOST, row_groups, token_weights, weighted
from bitmend.compress.statistics import InputStatistics, LayerStatistics
from bitmend.compress.weights import DenseWeight, StoredWeight
from torch import Tensor

MOMENT = frozenset({"second_moment"})
COLUMNS, T = 64, 300


def moments(x_TI: Tensor, weights_TK: Tensor) -> tuple[InputStatistics, ...]:
    out = [InputStatistics(COLUMNS, MOMENT) for _ in range(weights_TK.shape[1])]
    for part in (slice(0, 100), slice(100, None)):
        weighted(out, x_TI[part], weights_TK[part])
    return tuple(out)


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(W [26, I], x [T, I] with correlated columns, squares [T, 4] with heavy tails)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(COLUMNS) + 0.2 * torch.randn(COLUMNS, COLUMNS, generator=generator)
    x = torch.randn(T, COLUMNS, generator=generator) @ mix
    return torch.randn(26, COLUMNS, generator=generator) * 0.05, x, torch.randn(T, 4, generator=generator).mul(2).exp()


@pytest.mark.parametrize("act_order", ["static_groups", "none"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grid", ["uniform", "q4_0"])
def test_every_group_is_plain_gptq_on_its_own_moment(act_order: str, masked: bool, grid: str) -> None:
    if grid != "uniform" and act_order == "none":
        pytest.skip("a grid of ggml is fitted before the sweep")
    (weight, x, squares), settings = (
        drawn(),
        {"bits": 4, "act_order": act_order, "grid": grid, "group_size": 32, "symmetric": grid != "uniform"},
    )
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.7 if masked else None
    record = StoredWeight(DenseWeight(weight))
    record = record if mask is None else record.with_mask(mask)
    weights_TK = token_weights(squares)
    plain = InputStatistics(COLUMNS, MOMENT)
    plain.update(x)
    actual, metrics = gptq(record, weight, LayerStatistics(plain, guided=moments(x, weights_TK)), GptqConfig(guided=4, **settings))
    lost = 0.0
    for k, rows in enumerate(row_groups(26, 4)):
        moment_II = (x * weights_TK[:, k : k + 1]).T.double() @ x.double() / T
        alone = StoredWeight(DenseWeight(weight[rows]))
        alone = alone if mask is None else alone.with_mask(mask[rows])
        expected, said = gptq(alone, weight[rows], LayerStatistics(plain.with_moment(moment_II)), GptqConfig(**settings))
        torch.testing.assert_close(actual.dense()[rows], expected.dense(), rtol=1e-5, atol=1e-6)
        lost += said["squared_error"]
    assert metrics["squared_error"] == pytest.approx(lost, rel=1e-4)


def test_equal_weights_are_the_plain_path() -> None:
    weight, x, _ = drawn()
    plain = InputStatistics(COLUMNS, MOMENT)
    plain.update(x)
    known = LayerStatistics(plain, guided=moments(x, torch.ones(T, 3)))
    config = GptqConfig(bits=3, group_size=32)
    expected, actual = (gptq(StoredWeight(DenseWeight(weight)), weight, known, c)[0] for c in (config, replace(config, guided=3)))
    torch.testing.assert_close(actual.dense(), expected.dense())


def test_a_group_errs_less_where_its_loss_feels_it() -> None:
    weight, x, squares = drawn()
    weights_TK = token_weights(squares)
    plain = InputStatistics(COLUMNS, MOMENT)
    plain.update(x)
    known, config = LayerStatistics(plain, guided=moments(x, weights_TK)), GptqConfig(bits=3, group_size=32)
    felt = []
    for chosen in (config, replace(config, guided=4)):
        lost_TO = x @ (weight - gptq(StoredWeight(DenseWeight(weight)), weight, known, chosen)[0].dense()).T
        felt.append(sum(float((lost_TO[:, rows].square() * weights_TK[:, k : k + 1]).mean()) for k, rows in enumerate(row_groups(26, 4))))
    assert felt[1] < 0.98 * felt[0]


def test_matrices_of_one_input_have_their_own_moments() -> None:
    weight, x, squares = drawn()
    plain = InputStatistics(COLUMNS, MOMENT)
    plain.update(x)
    known = {n: LayerStatistics(plain, guided=moments(x, token_weights(squares[:, c]))) for n, c in (("q", [0, 1]), ("k", [2, 3]))}
    records, targets, config = (
        {n: StoredWeight(DenseWeight(weight)) for n in known},
        dict.fromkeys(known, weight),
        GptqConfig(guided=2, bits=3),
    )
    together, _ = gptq_group(records, targets, known, config)
    for name, record in records.items():
        torch.testing.assert_close(together[name].dense(), gptq(record, weight, known[name], config)[0].dense())
    assert not torch.equal(together["q"].dense(), together["k"].dense())
    assert not by_rows(config)
    with pytest.raises(ValueError, match=r"^k: guided needs 2 second moments .* 0 were collected"):
        gptq_group(records, targets, known | {"k": LayerStatistics(plain)}, config)


def test_weights_of_tokens() -> None:
    squares = torch.tensor([[1.0, 0.0, 1e-12], [4.0, 0.0, 4e-12], [9.0, 0.0, 9e-12]])
    actual = token_weights(squares, power=0.5)
    torch.testing.assert_close(actual[:, 0], torch.tensor([0.5, 1.0, 1.5]))
    torch.testing.assert_close(actual[:, 1], torch.ones(3))
    torch.testing.assert_close(actual[:, 2], actual[:, 0])
    one = torch.ones(1000, 1)
    one[3] = 1e6
    actual = token_weights(one)
    assert float(actual[3] / actual[0]) == pytest.approx(MOST * (1000 + 999) / 1000, rel=0.01), "cut at so many times the mean of the roots"
    assert float(actual.mean()) == pytest.approx(1.0)


def test_row_groups() -> None:
    assert row_groups(10, 4) == [slice(0, 3), slice(3, 6), slice(6, 8), slice(8, 10)]
    with pytest.raises(ValueError, match="3 rows cannot be 4 groups"):
        row_groups(3, 4)


@pytest.mark.parametrize("settings", [{"correction": 0.5}, {"refit": 0.0}, {"act_order": "full"}])
def test_what_does_not_go_with_it(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="guided 4: every group of rows has a second moment of its own"):
        GptqConfig(guided=4, **settings)  # type: ignore[arg-type]
