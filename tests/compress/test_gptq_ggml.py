"""GPTQ on the types of ggml, against the twin that knows no blocks of columns."""

import pytest
import torch
from bitmend.compress.feedback import inverse_factor
from bitmend.compress.ggml_grids import nearest_codes, round_ggml
from bitmend.compress.ggml_types import GGML_TYPES, as_settings
from bitmend.compress.gptq import GptqConfig, gptq, gptq_group
from bitmend.compress.gptq_sweeps import SweepConfig, gptq_ggml
from bitmend.compress.rounding import RtnConfig, rtn
from bitmend.compress.weights import DenseWeight, StoredWeight, to_tensors

from .test_gptq import column_by_column, layer


def settings(name: str) -> dict:
    return as_settings(name) | {"grid": name}


@pytest.mark.parametrize("name, masked", [("q2_k", False), ("q3_k", True), ("q4_k", False), ("q5_0", True), ("q4_1", False)])
def test_blocked_equals_column_by_column(name, masked):
    case = layer(rows=8, columns=256)
    mask = torch.rand(case.weight_OI.shape, generator=torch.Generator().manual_seed(9)) < 0.6 if masked else torch.ones(8, 256, dtype=torch.bool)
    grid = round_ggml(case.weight_OI.float().where(mask, 0), name)

    def round_column(step: int, column: int, updated, value):
        codes = nearest_codes(value.float().unsqueeze(1).expand(-1, 256), grid)
        scale, minima = grid.scales_OG()[:, column // grid.group_size], grid.minima_OG()
        level = (codes[:, column].float() - grid.layout.zero) * scale - (0 if minima is None else minima[:, column // grid.group_size])
        return level.where(mask[:, column], 0).to(value)

    order = case.moment_II.diagonal().argsort(descending=True, stable=True).tolist()
    expected = column_by_column(case.weight_OI, case.moment_II, order, round_column)
    factor = inverse_factor(case.moment_II, 0.01, True)
    record, loss_O = gptq_ggml(case.weight_OI, factor, name, SweepConfig("power"), mask_OI=mask if masked else None)
    assert torch.allclose(record.dense(torch.float64), expected, atol=1e-6)
    assert {key: t.shape for key, t in to_tensors(record).items()} == {key: t.shape for key, t in to_tensors(grid).items()}
    assert torch.equal(record.super_scales, grid.super_scales)
    lost, damped = case.weight_OI - expected, case.moment_II + 0.01 * case.moment_II.diagonal().mean() * torch.eye(256, dtype=torch.float64)
    assert loss_O.tolist() == pytest.approx(((lost @ damped) * lost).sum(1).tolist(), rel=1e-4)
    if masked:
        assert not record.dense()[~mask].any()


@pytest.mark.parametrize("name", GGML_TYPES)
def test_better_than_rounding_to_nearest(name):
    case = layer(columns=256, dtype=torch.float32)
    dense = StoredWeight(DenseWeight(case.weight_OI))
    plain, _ = rtn(dense, case.weight_OI, case.statistics, RtnConfig(**settings(name)))
    weighted, _ = rtn(dense, case.weight_OI, case.statistics, RtnConfig(**settings(name), clip="hessian"))
    actual, metrics = gptq(dense, case.weight_OI, case.statistics, GptqConfig(**settings(name)))
    assert case.error(actual.dense()) < case.error(weighted.dense()) < case.error(plain.dense())
    assert actual.base.type == name and metrics["squared_error"] > 0


def test_matrices_of_one_input_are_solved_together_as_alone():
    cases = {name: layer(rows=rows, columns=256, seed=seed, dtype=torch.float32) for name, rows, seed in (("q", 8, 0), ("k", 5, 1))}
    statistics = dict.fromkeys(cases, cases["q"].statistics)
    weights = {name: StoredWeight(DenseWeight(case.weight_OI)) for name, case in cases.items()}
    targets = {name: case.weight_OI for name, case in cases.items()}
    actual, _ = gptq_group(weights, targets, statistics, GptqConfig(**settings("q4_k")))
    for name in cases:
        alone, _ = gptq(weights[name], targets[name], statistics[name], GptqConfig(**settings("q4_k")))
        assert torch.equal(actual[name].dense(), alone.dense()) and actual[name].shape == alone.shape


@pytest.mark.parametrize("changes", [{"act_order": "full"}, {"act_order": "none"}, {"refit": 0.5}])
def test_what_needs_a_grid_fitted_on_the_way_is_refused(changes):
    with pytest.raises(ValueError, match="grid q4_k is fitted before the sweep"):
        GptqConfig(**settings("q4_k"), **changes)


def test_a_pruned_matrix_is_refused_by_name_on_a_grid_with_minima():
    case = layer(columns=256, dtype=torch.float32)
    weights = {"q": StoredWeight(DenseWeight(case.weight_OI)), "k": StoredWeight(DenseWeight(case.weight_OI)).with_mask(case.weight_OI > 0)}
    with pytest.raises(ValueError, match="k: q5_k has no code for 0"):
        gptq_group(
            weights, dict.fromkeys(weights, case.weight_OI), dict.fromkeys(weights, case.statistics), GptqConfig(**settings("q5_k"))
        )
