"""SVDQuant: the record computes what was optimised, smoothing is shared and pays, and nothing gets worse."""

import pytest
import torch
from bitmend.compress.activation_grid import fake_quantize
from bitmend.compress.block import BlockProblem
from bitmend.compress.grids import UniformGrid
from bitmend.compress.masks import masked_base, pattern_mask
from bitmend.compress.methods import DECOMPOSE
from bitmend.compress.rounding import round_normal_float, round_uniform
from bitmend.compress.smooth import SvdQuantConfig, part_of, smoothing, split, svdquant
from bitmend.compress.statistics import InputStatistics, LayerStatistics
from bitmend.compress.weights import ActivationGrid, DenseWeight, StoredWeight, UniformWeight

NEEDS = frozenset({"absmax", "samples", "second_moment"})


def outlier_inputs(features: int = 128, tokens: int = 400, seed: int = 0) -> InputStatistics:
    """Inputs as language models have them: a few channels fifty times the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator)
    x[:, torch.randperm(features, generator=generator)[:6]] *= 50
    statistics = InputStatistics(features, NEEDS)
    statistics.update(x)
    return statistics


def samples(actual: InputStatistics) -> torch.Tensor:
    assert actual.samples_TI is not None
    return actual.samples_TI


def matrix(rows: int, columns: int = 128, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def dense(target: torch.Tensor) -> StoredWeight:
    return StoredWeight(DenseWeight(target))


def output(stored: StoredWeight, x: torch.Tensor) -> torch.Tensor:
    """What a kernel computes from the record, by the kernels' own reference for the inputs."""
    smoothed = x if stored.smooth is None else x / stored.smooth.float()
    if stored.activations is not None:
        smoothed = fake_quantize(smoothed, stored.activations.bits, stored.activations.group_size)
    y = smoothed @ stored.base_dense().T
    return y if stored.low_rank is None else y + x @ stored.low_rank.dense().T


def relative_error(stored: StoredWeight, target: torch.Tensor, x: torch.Tensor) -> float:
    return (torch.linalg.norm(output(stored, x) - x @ target.T) / torch.linalg.norm(x @ target.T)).item()


def test_the_first_round_is_the_papers_decomposition_of_the_smoothed_weight():
    target, statistics = matrix(96), LayerStatistics(outlier_inputs())
    part = part_of(dense(target), target, statistics, SvdQuantConfig(rank=8, iterations=1))
    smooth, _ = smoothing([part])
    assert smooth is not None
    stored, _ = split(part, smooth)
    u, s, vh = torch.linalg.svd(target * smooth.float(), full_matrices=False)
    low = (u[:, :8] * s[:8]) @ vh[:8]
    assert stored.low_rank is not None and stored.smooth is not None and torch.equal(stored.smooth, smooth)
    torch.testing.assert_close(stored.low_rank.dense() * smooth.float(), low, rtol=1e-2, atol=2e-3 * low.abs().max().item())
    rest = round_uniform((target - stored.low_rank.dense()) * smooth.float(), UniformGrid(4, 64, True), "power").dense()
    assert torch.equal(stored.base_dense(), rest)


@pytest.mark.parametrize("activation_bits", [4, 8])
def test_smoothing_and_term_beat_the_term_alone_and_rounding_alone(activation_bits):
    target, statistics = matrix(96), LayerStatistics(outlier_inputs())
    part = part_of(dense(target), target, statistics, SvdQuantConfig(rank=16, activation_bits=activation_bits))
    smooth, alpha = smoothing([part])
    assert smooth is not None and alpha is not None and 0 < alpha <= 1
    errors = [split(part, s)[1]["relative_error"] for s in (smooth, None)]
    assert errors[0] < 0.8 * errors[1]
    assert errors[1] < split(part, None)[1]["relative_error_before"]


def test_metrics_are_those_of_the_record_as_a_kernel_runs_it():
    target, actual = matrix(96), outlier_inputs()
    part = part_of(dense(target), target, LayerStatistics(actual), SvdQuantConfig(rank=8))
    stored, metrics = split(part, smoothing([part])[0])
    assert actual.samples_TI is not None
    assert metrics["relative_error"] == pytest.approx(relative_error(stored, target, actual.samples_TI), rel=1e-4)
    assert metrics["relative_error_before"] == pytest.approx(relative_error(part.weight, target, actual.samples_TI), rel=1e-4)
    wide = part_of(dense(target), target, LayerStatistics(actual), SvdQuantConfig(rank=8, activation_bits=16))
    assert wide.weight.activations is None


def block(
    targets: dict[str, torch.Tensor], inputs: dict[str, InputStatistics], weights: dict[str, StoredWeight] | None = None
) -> BlockProblem:
    nothing = torch.zeros(0, 0, 0)
    statistics = {name: LayerStatistics(actual) for name, actual in inputs.items()}
    return BlockProblem(weights or {n: dense(t) for n, t in targets.items()}, targets, lambda m, h: h, nothing, nothing, statistics)


def test_matrices_of_one_input_share_their_smoothing_and_others_do_not():
    attention, mlp = outlier_inputs(), outlier_inputs(seed=9)
    targets = {"q": matrix(96, seed=1), "k": matrix(32, seed=2) * 3, "v": matrix(32, seed=3), "gate": matrix(64, seed=4)}
    inputs = {"q": attention, "k": attention, "v": attention, "gate": mlp}
    config = SvdQuantConfig(rank=8, activation_bits=4)
    records, metrics = svdquant(block(targets, inputs), dict.fromkeys(targets, config))
    assert set(records) == set(metrics) == set(targets)
    smooth = {name: record.smooth for name, record in records.items() if record.smooth is not None}
    assert torch.equal(smooth["q"], smooth["k"]) and torch.equal(smooth["q"], smooth["v"])
    assert not torch.equal(smooth["q"], smooth["gate"])
    assert len({s.data_ptr() for s in smooth.values()}) == 4
    for name, record in records.items():
        assert record.activations == ActivationGrid(4, 64) and isinstance(record.base, UniformWeight) and record.base.symmetric
        assert metrics[name]["relative_error"] < metrics[name]["relative_error_before"]
        assert metrics[name]["relative_error"] == pytest.approx(relative_error(record, targets[name], samples(inputs[name])), rel=1e-4)


def test_inputs_without_outliers_and_with_few_bits_lost_may_go_unsmoothed():
    actual = InputStatistics(128, NEEDS)
    actual.update(torch.randint(0, 2, (300, 128), generator=torch.Generator().manual_seed(0)) * 2.0 - 1)
    target = matrix(64)
    part = part_of(dense(target), target, LayerStatistics(actual), SvdQuantConfig(rank=4, activation_bits=8))
    smooth, alpha = smoothing([part])
    unsmoothed = split(part, None)[1]["relative_error"]
    assert (smooth is None) == (alpha is None)
    assert split(part, smooth)[1]["relative_error"] <= unsmoothed * 1.02


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
@pytest.mark.parametrize("kind", ["asymmetric", "normal_float", "masked"])
def test_a_quantized_or_masked_record_keeps_its_grid_and_mask(kind, quantizer):
    target, actual = matrix(64), outlier_inputs()
    mask = pattern_mask(target.abs(), 2, 4)
    masked = StoredWeight(masked_base(round_uniform(target.where(mask, 0), UniformGrid(4, 64)), mask)).with_mask(mask)
    start = {
        "asymmetric": StoredWeight(round_uniform(target, UniformGrid(3, 64))),
        "normal_float": StoredWeight(round_normal_float(target)),
        "masked": masked,
    }[kind]
    records, metrics = svdquant(block({"o": target}, {"o": actual}, {"o": start}), {"o": SvdQuantConfig(rank=8, quantizer=quantizer)})
    stored = records["o"]
    assert type(stored.base) is type(start.base) and stored.base.stored_bits() == start.base.stored_bits()
    assert metrics["o"]["relative_error"] < metrics["o"]["relative_error_before"]
    if kind == "masked":
        kept = stored.mask_OI()
        assert kept is not None and torch.equal(kept, mask) and not stored.base_dense()[~mask].any()


def test_a_matrix_no_token_reached_is_only_rounded_and_reported():
    target, empty = matrix(64), InputStatistics(128, NEEDS)
    records, metrics = svdquant(block({"expert": target}, {"expert": empty}), {"expert": SvdQuantConfig(rank=8)})
    assert metrics["expert"]["statistics_zero"] == 1
    assert records["expert"].low_rank is None and records["expert"].smooth is None
    assert torch.isfinite(records["expert"].dense()).all()


def test_a_dead_channel_and_zero_inputs_leave_finite_records():
    target, actual = matrix(64), InputStatistics(128, NEEDS)
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 0
    actual.update(x)
    zero = InputStatistics(128, NEEDS)
    zero.update(torch.zeros(10, 128))
    records, metrics = svdquant(block({"a": target, "b": target}, {"a": actual, "b": zero}), dict.fromkeys("ab", SvdQuantConfig(rank=8)))
    for name in "ab":
        assert torch.isfinite(records[name].dense()).all() and all(v == v for v in metrics[name].values())


def test_a_rank_beyond_the_matrix_is_refused():
    with pytest.raises(ValueError, match="rank 65 does not fit a 64×128 matrix"):
        part_of(dense(matrix(64)), matrix(64), LayerStatistics(outlier_inputs()), SvdQuantConfig(rank=65))


def test_the_row_is_a_block_method_with_the_statistics_it_reads():
    row = DECOMPOSE["svdquant"]
    assert row.scope == "block" and row.function is svdquant
    assert row.needs(SvdQuantConfig()) == {"absmax", "samples"}
    assert "second_moment" in row.needs(SvdQuantConfig(quantizer="gptq"))
