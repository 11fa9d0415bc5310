"""Bytes as records store them, to the bit; predicted errors against the records themselves; the joint program end to end."""

import pytest
import torch
from bitmend.compress.allocate import choose
from bitmend.compress.decompose import Decomposition, decompose
from bitmend.compress.factors import FactorForm, store_factors
from bitmend.compress.ggml_types import GGML_TYPES
from bitmend.compress.lowrank import Metric, WeightedError, best_low_rank, squared_error
from bitmend.compress.methods import DECOMPOSE, QUANTIZE
from bitmend.compress.metrics import gradient_squares
from bitmend.compress.options import Grid, Setting, costs_bytes, error_table, ggml_grid, mask_on, overrides, settings
from bitmend.compress.statistics import Fisher, InputStatistics, LayerStatistics
from bitmend.compress.weights import DenseWeight, StoredWeight

SHAPES = [(96, 128), (128, 64), (40, 192)]


def statistics(features: int, rows: int = 96, seed: int = 0) -> LayerStatistics:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) / features**0.5 + torch.eye(features)
    inputs = InputStatistics(features, frozenset({"norms", "second_moment"}))
    inputs.update(torch.randn(4 * features, features, generator=generator) @ mix * torch.logspace(-1, 0.5, features))
    return LayerStatistics(inputs, Fisher(torch.rand(rows, generator=generator), torch.rand(features, generator=generator)))


def matrix(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def quantized(target: torch.Tensor, grid: Grid, actual: LayerStatistics, quantizer: str) -> StoredWeight:
    """What a quantize stage makes of the matrix on this grid, after Wanda's mask where it has a pattern."""
    name = quantizer if grid.kind != "normal_float" else {"rtn": "normal_float", "gptq": "gptq_nf"}[quantizer]
    weight = StoredWeight(DenseWeight(target))
    if grid.pattern != "dense":
        weight = weight.with_mask(mask_on(target, actual.inputs.norm_I, grid))
    row = QUANTIZE[name]
    return row.function(weight, target, actual, row.config(**overrides(Setting(grid))["quantize"]))[0]


def every_grid() -> list[Grid]:
    uniform = [Grid("uniform", b, g, s) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, -1) for s in (False, True)]
    books = [Grid("normal_float", b, g, False, d) for b in (2, 3, 4, 8) for g in (32, 64) for d in (False, True)]
    sparse = [Grid("uniform", 4, 64, pattern="2:4", sparsity=0.5), Grid("normal_float", 3, 64, pattern="unstructured", sparsity=0.5)]
    return uniform + books + sparse + [ggml_grid(kind) for kind in GGML_TYPES] + [ggml_grid("q6_k", "2:4", 0.5)]


@pytest.mark.parametrize("shape", [*SHAPES, (8, 256)])
def test_bits_are_those_of_the_record(shape):
    actual, target = statistics(shape[1], shape[0]), matrix(*shape)
    for grid in every_grid():
        record = quantized(target, grid, actual, "rtn")
        assert record.stored_bits() == grid.stored_bits(*shape), grid
        assert round(record.sparsity() * target.numel()) == grid.removed(*shape), grid


def test_bits_of_a_setting_count_the_term():
    target, actual = matrix(96, 128), statistics(128)
    for bits in (4, 8, 16):
        setting = Setting(Grid("uniform", 3, 64), 12, bits)
        record = quantized(target, setting.grid, actual, "rtn")
        error = target - record.dense()
        up, down = best_low_rank(error, Metric(), 12)
        term = store_factors(up, down, FactorForm(bits), WeightedError(error, Metric()))
        assert setting.stored_bits(96, 128) == record.stored_bits() + term.stored_bits()
        assert setting.stored_bytes(96, 128) == -(-setting.stored_bits(96, 128) // 8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_predicted_errors_are_those_of_the_records(shape, quantizer):
    target, actual = matrix(*shape), statistics(shape[1], shape[0])
    metric = Metric(moment_II=actual.inputs.second_moment_II)
    choices = settings(bits=(2, 4), group_sizes=(32, 64), ranks=(0, 4, 16), factor_bits=(16, 4), sparsities=(("dense", 0.0), ("2:4", 0.5)))
    predicted = error_table(target, metric, actual, choices, lambda grid: quantized(target, grid, actual, quantizer))[0]
    for setting, error in zip(choices, predicted.tolist(), strict=True):
        record = quantized(target, setting.grid, actual, quantizer)
        if setting.rank:
            config = Decomposition(rank=setting.rank, factor_bits=setting.factor_bits)
            record = decompose(record, target, actual, config)[0]
        measured = squared_error(target - record.dense(), metric)
        assert error == pytest.approx(measured, rel=1e-3 if setting.factor_bits == 16 else 0.05), setting


def test_settings_that_do_not_fit_are_infinitely_bad():
    target, actual = matrix(40, 192), statistics(192, 40)
    choices = [Setting(Grid("uniform", 4, 128)), Setting(Grid("uniform", 4, 64), 41), Setting(Grid("uniform", 4, 64), 40)]
    metric = Metric(moment_II=actual.inputs.second_moment_II)
    errors = error_table(target, metric, actual, choices, lambda grid: quantized(target, grid, actual, "rtn"))
    assert errors.isinf().tolist() == [[True, True, False]]
    assert costs_bytes([(40, 192)], choices)[0][:2] == [0, 0]
    with pytest.raises(ValueError, match="192 columns are not a multiple of group size 128"):
        choices[0].grid.stored_bits(40, 192)


def test_the_product_holds_every_setting_once():
    chosen = settings(double_quantized=(False, True))
    assert len(chosen) == len(set(chosen)) == (4 * 3 + 4 * 3 * 2) * (1 + 4 * 3)


def test_joint_choice_beats_every_uniform_setting_of_at_most_its_bytes():
    shapes = SHAPES * 2
    actual = [statistics(s[1], s[0], seed) for seed, s in enumerate(shapes)]
    targets = [matrix(*s, seed) * 3.0**seed for seed, s in enumerate(shapes)]
    choices = settings(bits=(2, 3, 4), group_sizes=(32, 64), ranks=(0, 8), factor_bits=(16, 4))
    tables = [
        error_table(t, Metric(moment_II=f.inputs.second_moment_II), f, choices, lambda grid, t=t, f=f: quantized(t, grid, f, "rtn"))
        for t, f in zip(targets, actual, strict=True)
    ]
    losses = torch.cat(tables)
    costs = torch.tensor(costs_bytes(shapes, choices))
    uniform = [k for k in range(len(choices)) if bool(torch.isfinite(losses[:, k]).all())]
    assert len(uniform) == len(choices)
    for k in uniform:
        budget = int(costs[:, k].sum())
        chosen = choose(costs, losses, budget)
        assert chosen.total_bytes <= budget
        assert chosen.total_loss <= float(losses[:, k].sum()) * (1 + 1e-3)
    middle = int(costs.float().mean() * len(shapes))
    spread = {choices[k] for k in choose(costs, losses, middle).choice}
    assert len(spread) > 1


def test_types_that_do_not_fit_are_infinitely_bad():
    """Rows of 48 are no blocks of 32; a type with minima has no code for what a mask removes."""
    assert [Setting(ggml_grid(kind)).fits(8, 48) for kind in ("q4_k", "q8_0")] == [False, False]
    assert [Setting(ggml_grid(kind, "2:4", 0.5)).fits(8, 256) for kind in ("q3_k", "q4_k")] == [True, False]
    assert Setting(ggml_grid("q5_k", "2:4", 0.5)).fits(8, 128) is False, "its fallback q5_1 has minima, too"


def test_choice_goes_back_to_the_stages():
    assert overrides(Setting(ggml_grid("q3_k"), 4, 8)) == {
        "quantize": {"grid": "q3_k", "bits": 3, "group_size": 16, "symmetric": True, "float_zeros": False},
        "decompose": {"rank": 4, "factor_bits": 8},
    }
    assert overrides(Setting(Grid("uniform", 3, 64), 8, 4)) == {
        "quantize": {"bits": 3, "group_size": 64, "symmetric": False},
        "decompose": {"rank": 8, "factor_bits": 4},
    }
    sparse = Grid("normal_float", 4, 64, double_quantized=True, pattern="2:4", sparsity=0.5)
    assert overrides(Setting(sparse)) == {
        "quantize": {"bits": 4, "block_size": 64, "double_quantize": True},
        "prune": {"pattern": "2:4", "sparsity": 0.5},
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_views_weigh_the_rows_of_the_same_records(shape):
    """The slow twin: the records themselves, their errors weighed row by row."""
    target, actual = matrix(*shape), statistics(shape[1], shape[0])
    moment = actual.inputs.second_moment_II.double()
    weights = torch.stack((torch.ones(shape[0]), torch.rand(shape[0], generator=torch.Generator().manual_seed(5))))
    choices = settings(bits=(2, 4), group_sizes=(64,), ranks=(0, 4, 16), factor_bits=(16,))
    table = error_table(target, Metric(moment_II=moment), actual, choices, lambda grid: quantized(target, grid, actual, "rtn"), weights)
    for setting, errors in zip(choices, table.T, strict=True):
        record = quantized(target, setting.grid, actual, "rtn")
        if setting.rank:
            record = decompose(record, target, actual, Decomposition(rank=setting.rank))[0]
        error = (target - record.dense()).double()
        by_row = ((error @ moment) * error).sum(1)
        assert errors.tolist() == pytest.approx((weights.double() @ by_row).tolist(), rel=1e-3), setting


def test_gradient_squares_come_from_the_fisher_diagonal():
    """F_oj = G_o·R_jj exactly, where outputs' gradients and inputs do not depend on each other."""
    actual = statistics(128)
    squares = torch.rand(96, generator=torch.Generator().manual_seed(3)).double()
    moments = actual.inputs.second_moment_II.diagonal().double()
    known = LayerStatistics(actual.inputs, Fisher((squares * moments.mean()).float(), (squares.mean() * moments).float()))
    assert gradient_squares(known).tolist() == pytest.approx(squares.tolist(), rel=1e-5)
    with pytest.raises(ValueError, match="Fisher diagonal, which was not collected"):
        gradient_squares(LayerStatistics(actual.inputs))


def test_errors_of_lq_iterates_are_those_of_what_the_schedule_leaves():
    """LQ-LoRA's own table: a setting with a rank errs by what its decomposition leaves, in every view; without one as ever."""
    target, actual = matrix(96, 128), statistics(128)
    metric = Metric(moment_II=actual.inputs.second_moment_II)
    choices = settings(bits=(2, 3), group_sizes=(64,), double_quantized=(True,), ranks=(0, 8), factor_bits=(16,))
    views = torch.stack((torch.ones(96), torch.rand(96))).double()

    def solve(setting, base):
        lq_lora = DECOMPOSE["lq_lora"].defaults | {"rank": setting.rank, "factor_bits": setting.factor_bits}
        return decompose(base, target, actual, Decomposition(**lq_lora))[0]

    def rounded(grid):
        return quantized(target, grid, actual, "rtn")

    rounding, iterates = (error_table(target, metric, actual, choices, rounded, views, s) for s in (None, solve))
    for k, setting in enumerate(choices):
        if not setting.rank:
            assert torch.allclose(rounding[:, k], iterates[:, k], rtol=1e-6)
            continue
        error = WeightedError(target - solve(setting, rounded(setting.grid)).dense(), metric)
        assert torch.allclose(iterates[:, k], views @ error.squared_O)
        assert not torch.allclose(iterates[:, k], rounding[:, k], rtol=1e-2)
