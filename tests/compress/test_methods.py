"""Every row of PRUNE and QUANTIZE: runs on exactly the statistics it names, keeps its promises about masks, grids, shapes and bad input."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from bitmend.compress.methods import PRUNE, QUANTIZE
from bitmend.compress.packing import unpack_mask
from bitmend.compress.statistics import NEEDS, InputStatistics, LayerStatistics
from bitmend.compress.weights import ActivationGrid, DenseWeight, LowRank, NormalFloatWeight, StoredWeight, UniformWeight, to_tensors

MATRIX_ROWS = {name: row for name, row in QUANTIZE.items() if row.scope == "matrix"}
ROWS = {**PRUNE, **MATRIX_ROWS}
WEIGHT = torch.randn(48, 192, generator=torch.Generator().manual_seed(0)) * 0.05
MASK = torch.rand(48, 192, generator=torch.Generator().manual_seed(1)) < 0.5
BIT_ROWS = [(name, bits) for name, row in MATRIX_ROWS.items() if "bits" in {f.name for f in fields(row.config)} for bits in (2, 3, 4, 5, 6, 8)]


def configured(row, **settings):
    return row.config(**(dict(row.defaults) | settings))


def statistics(needs: frozenset[str], scale: float = 1.0) -> LayerStatistics:
    """An input of uneven, correlated features, of which only `needs` is collected."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(500, 192, generator=generator) @ (torch.eye(192) + 0.1 * torch.randn(192, 192, generator=generator)) * scale
    x = x * torch.logspace(-0.7, 0.7, 192)[torch.randperm(192, generator=generator)]
    actual = InputStatistics(192, needs)
    actual.update(x, x * 1.01)
    return LayerStatistics(actual)


def run(row, weight: StoredWeight | None = None, target: torch.Tensor = WEIGHT, **settings: Any):
    config = configured(row, **settings)
    return row.function(weight or StoredWeight(DenseWeight(WEIGHT)), target, statistics(row.needs(config)), config)


def output_error(actual: torch.Tensor) -> float:
    """√(E‖(W − Ŵ)x‖² / E‖Wx‖²)."""
    moment, lost = statistics(frozenset({"second_moment"})).inputs.second_moment_II, WEIGHT - actual
    return (((lost @ moment) * lost).sum() / ((WEIGHT @ moment) * WEIGHT).sum()).sqrt().item()


def levels_per_group(base, size: int = 64) -> int:
    """The largest number of different values that any group of a row holds."""
    groups = base.dense().view(-1, size).sort(-1)[0]
    return int((groups.diff(dim=-1) != 0).sum(-1).max()) + 1


@pytest.mark.parametrize("name", ROWS)
def test_defaults_run_on_what_the_row_needs(name):
    row = ROWS[name]
    assert row.needs(configured(row)) <= NEEDS
    record, metrics = run(row)
    assert record.shape == (48, 192)
    assert all(isinstance(value, float) for value in metrics.values())
    assert torch.isfinite(record.dense()).all()


@pytest.mark.parametrize("name", ROWS)
def test_the_same_input_gives_the_same_bits(name):
    row = ROWS[name]
    first, second = to_tensors(run(row)[0]), to_tensors(run(row)[0])
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", PRUNE)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_pruning_stores_its_mask_and_exact_zeros_in_the_dtype_it_found(name, pattern):
    actual, metrics = run(PRUNE[name], StoredWeight(DenseWeight(WEIGHT.bfloat16())), pattern=pattern)
    assert isinstance(actual.base, DenseWeight)
    assert actual.base.weight.dtype == torch.bfloat16
    assert actual.mask is not None
    mask = unpack_mask(actual.mask, 192)
    assert bool((actual.base.weight[~mask] == 0).all())
    assert actual.sparsity() == metrics["sparsity"] == pytest.approx(0.5, abs=1e-3)
    if pattern != "unstructured":
        kept, of = (int(n) for n in pattern.split(":"))
        assert bool((mask.view(48, -1, of).sum(-1) == kept).all())


@pytest.mark.parametrize("name", ["magnitude", "wanda"])
@pytest.mark.parametrize("quantizer", ["rtn", "nf4"])
def test_pruning_a_quantized_weight_moves_no_kept_code(name, quantizer):
    quantized, _ = run(QUANTIZE[quantizer])
    actual, _ = run(PRUNE[name], quantized)
    mask = actual.mask_OI()
    assert mask is not None
    assert type(actual.base) is type(quantized.base)
    assert torch.equal(actual.base.dense(), quantized.base.dense().where(mask, 0))


@pytest.mark.parametrize("name", PRUNE)
def test_pruning_twice_never_brings_a_weight_back(name):
    first, _ = run(PRUNE[name], sparsity=0.3)
    second, _ = run(PRUNE[name], first, sparsity=0.6)
    before, after = first.mask_OI(), second.mask_OI()
    assert before is not None and after is not None
    assert not bool((after & ~before).any())
    assert second.sparsity() == pytest.approx(0.6, abs=5e-3)


@pytest.mark.parametrize(("name", "bits"), BIT_ROWS)
def test_values_lie_on_a_grid_of_that_many_levels_and_err_accordingly(name, bits):
    actual, _ = run(MATRIX_ROWS[name], bits=bits)
    assert isinstance(actual.base, UniformWeight | NormalFloatWeight)
    assert actual.base.bits == bits
    assert levels_per_group(actual.base) <= 1 << bits
    assert output_error(actual.dense()) < {2: 0.6, 3: 0.25, 4: 0.12, 5: 0.07, 6: 0.04, 8: 0.02}[bits]
    assert bits < actual.bits_per_weight() < bits + 0.6


@pytest.mark.parametrize("name", MATRIX_ROWS)
def test_masks_survive_quantization_with_the_target_dense(name):
    """Masked weights are exactly 0 in the codes themselves, whatever the target holds there."""
    start = StoredWeight(DenseWeight(WEIGHT.where(MASK, 0))).with_mask(MASK)
    for target in (WEIGHT, WEIGHT.where(MASK, 0)):
        actual, _ = run(MATRIX_ROWS[name], start, target)
        assert actual.mask is not None and start.mask is not None
        assert torch.equal(actual.mask, start.mask)
        assert bool((actual.base.dense()[~MASK] == 0).all())
        assert bool((actual.base.dense()[MASK] != 0).any())


@pytest.mark.parametrize("name", MATRIX_ROWS)
def test_what_an_earlier_stage_made_of_the_weights_is_what_gets_quantized(name):
    """SparseGPT moved the kept weights and training may have: quantization must not go back to the baseline's."""
    pruned, _ = run(PRUNE["sparsegpt"])
    trained = StoredWeight(DenseWeight(WEIGHT * 1.5))
    settings = {"bits": 8} if "bits" in {f.name for f in fields(MATRIX_ROWS[name].config)} else {}
    for start, share in ((pruned, 0.3), (trained, 0.3)):
        actual, _ = run(MATRIX_ROWS[name], start, WEIGHT, **settings)
        assert (actual.dense() - start.dense()).norm() < share * (WEIGHT - start.dense()).norm()


def test_feedback_makes_up_for_what_wanda_dropped():
    pruned, _ = run(PRUNE["wanda"])
    actual, _ = run(QUANTIZE["gptq"], pruned, bits=8)
    nearest, _ = run(QUANTIZE["rtn"], pruned, bits=8)
    assert output_error(nearest.dense()) > 0.999 * output_error(pruned.dense())
    assert output_error(actual.dense()) < 0.98 * output_error(pruned.dense())


@pytest.mark.parametrize("name", MATRIX_ROWS)
def test_activations_and_everything_but_the_base_are_kept(name):
    pair = LowRank(torch.full((48, 2), 0.01), torch.full((2, 192), 0.01))
    start = StoredWeight(DenseWeight(WEIGHT), low_rank=pair, smooth=torch.full((192,), 2.0))
    actual, _ = run(MATRIX_ROWS[name], start, activations=ActivationGrid(8, 32))
    assert actual.activations == ActivationGrid(8, 32)
    assert actual.low_rank is pair
    assert actual.smooth is start.smooth
    assert output_error(actual.dense()) < 0.12
    assert run(MATRIX_ROWS[name])[0].activations is None


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_weights_are_refused(name, bad):
    row, broken = ROWS[name], WEIGHT.clone()
    broken[3, 7] = bad
    with pytest.raises(ValueError, match=r"weight: 1 of 9216 values are NaN or Inf"):
        run(row, StoredWeight(DenseWeight(broken)), broken)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_statistics_are_refused(name, bad):
    row = ROWS[name]
    has_clip = name in QUANTIZE and "clip" in {f.name for f in fields(row.config)}
    config = configured(row, **({"clip": "hessian"} if has_clip else {}))
    if not row.needs(config):
        return
    broken = statistics(row.needs(config))
    broken.inputs.update(torch.full((1, 192), bad), torch.ones(1, 192))
    with pytest.raises(ValueError, match="NaN or Inf"):
        row.function(StoredWeight(DenseWeight(WEIGHT)), WEIGHT, broken, config)


@pytest.mark.parametrize("name", ROWS)
def test_a_dead_layer_gets_through(name):
    row = ROWS[name]
    config = configured(row)
    record, metrics = row.function(StoredWeight(DenseWeight(WEIGHT)), WEIGHT, statistics(row.needs(config), scale=0.0), config)
    assert torch.isfinite(record.dense()).all()
    assert (record.dense() - WEIGHT).norm() < WEIGHT.norm()
    if row.needs(config):
        assert metrics["dead_layer"] == 1.0


@pytest.mark.parametrize("name", MATRIX_ROWS)
def test_zero_weights_stay_zero(name):
    actual, _ = run(MATRIX_ROWS[name], StoredWeight(DenseWeight(torch.zeros(48, 192))), torch.zeros(48, 192))
    assert bool((actual.dense() == 0).all())


@pytest.mark.parametrize("name", MATRIX_ROWS)
def test_a_group_that_does_not_divide_is_refused_with_those_that_do(name):
    row = MATRIX_ROWS[name]
    size = "group_size" if "group_size" in {f.name for f in fields(row.config)} else "block_size"
    with pytest.raises(ValueError, match=rf"in_features 192 is not a multiple of {size} 80; choose one of \[8, 12, 16, 24, 32"):
        row.function(StoredWeight(DenseWeight(WEIGHT)), WEIGHT, statistics(NEEDS - {"fisher"}), configured(row, **{size: 80}))


@pytest.mark.parametrize("name", ["rtn", "gptq"])
@pytest.mark.parametrize("clip", ["none", "power", "hessian", "joint"])
def test_float_zeros_err_less_and_are_refused_under_a_mask(name, clip):
    settings = {"bits": 3, "clip": clip, "group_size": 32}
    integer, floating = (run(QUANTIZE[name], float_zeros=choice, **settings)[0] for choice in (False, True))
    assert isinstance(floating.base, UniformWeight) and floating.base.float_zeros
    assert output_error(floating.dense()) < output_error(integer.dense())
    start = StoredWeight(DenseWeight(WEIGHT.where(MASK, 0))).with_mask(MASK)
    with pytest.raises(ValueError, match="set float_zeros: false for a pruned model"):
        run(QUANTIZE[name], start, float_zeros=True)


def test_correction_asks_for_the_dense_inputs():
    for name in ("gptq", "gptq_nf"):
        row = QUANTIZE[name]
        assert "cross_moment" not in row.needs(configured(row))
        config = configured(row, correction=0.3)
        assert row.needs(config) == {"second_moment", "cross_moment"}
        plain, moved = run(row)[0], run(row, correction=0.3)[0]
        assert not torch.equal(plain.dense(), moved.dense())


def test_configs_are_frozen_values():
    for row in (*PRUNE.values(), *QUANTIZE.values()):
        config = configured(row)
        assert replace(config) == config
        assert hash(config) == hash(replace(config))
