"""GPTQ against a twin that knows neither Cholesky factors nor blocks: one column, one fresh inverse, at a time."""

from dataclasses import dataclass, replace

import pytest
import torch
from bitmend.compress import feedback, gptq_sweeps
from bitmend.compress import normal_float as nf
from bitmend.compress.block import BlockShare
from bitmend.compress.feedback import inverse_factor
from bitmend.compress.gptq import GptqConfig, GptqNormalFloatConfig, corrected_target, gptq, gptq_group, gptq_nf
from bitmend.compress.gptq_sweeps import SweepConfig, gptq_book, gptq_uniform
from bitmend.compress.grids import Clip, UniformGrid, fit, round_to_grid
from bitmend.compress.rounding import RtnConfig, round_uniform, rtn
from bitmend.compress.statistics import InputStatistics, LayerStatistics
from bitmend.compress.weights import DenseWeight, LowRank, NormalFloatWeight, StoredWeight, UniformWeight, describe, to_tensors
from torch import Tensor


def dequantized(codes_OS, scale_O1, zero_O1):
    return (codes_OS - zero_O1) * scale_O1


@dataclass
class Layer:
    weight_OI: Tensor
    moment_II: Tensor
    statistics: LayerStatistics

    def error(self, other_OI: Tensor) -> float:
        """E‖(W − other)x‖² / E‖Wx‖²."""
        lost, moment_II = self.weight_OI - other_OI.to(self.weight_OI), self.moment_II
        return (((lost @ moment_II) * lost).sum() / ((self.weight_OI @ moment_II) * self.weight_OI).sum()).item()


def layer(rows: int = 24, columns: int = 96, tokens: int = 400, seed: int = 0, dtype: torch.dtype = torch.float64) -> Layer:
    """Correlated inputs of uneven size; the dense model's inputs differ a little from the compressed one's."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + torch.randn(columns, columns, generator=generator) * 0.1
    x = (torch.randn(tokens, columns, generator=generator) @ mix) * torch.logspace(-1, 1, columns)[
        torch.randperm(columns, generator=generator)
    ]
    statistics = InputStatistics(columns, frozenset({"second_moment", "cross_moment"}))
    statistics.update(x, x + 0.3 * torch.randn(tokens, columns, generator=generator) * x.std(0))
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    return Layer(weight.to(dtype), statistics.second_moment_II.to(dtype), LayerStatistics(statistics))


def column_by_column(weight_OI: Tensor, moment_II: Tensor, order: list[int], round_column, damp: float = 0.01, pull: float = 0.0) -> Tensor:
    """After each column the free ones move to where, given all rounded ones, the output error is least. With `pull` a column first goes
    back by that share of what it was moved, and that share of the rest is taken off its error."""
    damped = moment_II + damp * moment_II.diagonal().mean() * torch.eye(len(moment_II), dtype=moment_II.dtype)
    weight, out = weight_OI.clone(), torch.zeros_like(weight_OI)
    for step, column in enumerate(order):
        free = torch.tensor(order[step:])
        inverse = torch.linalg.inv(damped[free][:, free])
        moved = (1 - pull) * (weight[:, column] - weight_OI[:, column])
        value = weight_OI[:, column] + moved
        out[:, column] = round_column(step, column, weight, value)
        lost = value - pull * moved - out[:, column]
        weight[:, free] -= lost.unsqueeze(1) * (inverse[0] / inverse[0, 0])
    return out


def twin(case: Layer, grid: UniformGrid, act_order: str, clip: Clip = "none", mask: Tensor | None = None, pull: float = 0.0) -> Tensor:
    weight, size = case.weight_OI, grid.size(case.weight_OI.shape[1])
    columns = weight.shape[1]
    order = list(range(columns)) if act_order == "none" else case.moment_II.diagonal().argsort(descending=True, stable=True).tolist()
    keep = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    importance = case.moment_II.diagonal()
    actual: dict[int, tuple[Tensor, Tensor]] = {}

    def round_column(step: int, column: int, updated: Tensor, value: Tensor) -> Tensor:
        group = column // size if act_order == "static_groups" else step // size
        if group not in actual:
            if act_order == "static_groups":
                members, source = torch.arange(group * size, (group + 1) * size), weight
            else:
                members, source = torch.tensor(order[step : step + size]), updated
            actual[group] = fit(source[:, members].where(keep[:, members], 0), grid, clip, importance[members])
        scale, zero = actual[group]
        rounded = dequantized(round_to_grid(value.unsqueeze(1), scale, zero, grid), scale, zero).view(-1)
        return rounded.where(keep[:, column], 0)

    return column_by_column(weight, case.moment_II, order, round_column, pull=pull)


CASES = [
    (96, 32, "none"),
    (96, 48, "static_groups"),
    (200, 40, "none"),
    (200, 8, "none"),
    (200, 100, "full"),
    (200, -1, "full"),
    (200, -1, "static_groups"),
    (256, 64, "none"),
    (256, 128, "full"),
    (288, 96, "none"),
    (192, 192, "none"),
]


@pytest.mark.parametrize(("columns", "group_size", "act_order"), CASES)
@pytest.mark.parametrize("masked", [False, True])
def test_blocked_equals_column_by_column(columns, group_size, act_order, masked):
    case, grid = layer(rows=12, columns=columns), UniformGrid(3, group_size)
    mask = torch.rand(case.weight_OI.shape, generator=torch.Generator().manual_seed(9)) < 0.6 if masked else None
    factor = inverse_factor(case.moment_II, 0.01, act_order != "none")
    record, loss = gptq_uniform(case.weight_OI, factor, grid, SweepConfig(static=act_order == "static_groups"), mask_OI=mask)
    expected = twin(case, grid, act_order, mask=mask)
    assert torch.allclose(record.dense(torch.float64), expected, atol=1e-6)
    damped = case.moment_II + 0.01 * case.moment_II.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    lost = case.weight_OI - expected
    assert loss.tolist() == pytest.approx(((lost @ damped) * lost).sum(1).tolist(), rel=1e-5)
    if mask is not None:
        assert bool((record.dense()[~mask] == 0).all())


@pytest.mark.parametrize("clip", ["power", "hessian", "joint"])
@pytest.mark.parametrize("act_order", ["none", "static_groups", "full"])
@pytest.mark.parametrize(("symmetric", "float_zeros"), [(False, False), (True, False), (False, True)])
def test_clip_searches_see_the_groups_the_twin_sees(clip, act_order, symmetric, float_zeros):
    case, grid = layer(rows=8, columns=160, seed=3), UniformGrid(4, 32, symmetric, float_zeros)
    factor = inverse_factor(case.moment_II, 0.01, act_order != "none")
    record, _ = gptq_uniform(case.weight_OI, factor, grid, SweepConfig(clip, act_order == "static_groups"), case.moment_II.diagonal())
    assert torch.allclose(record.dense(torch.float64), twin(case, grid, act_order, clip), atol=1e-6)
    assert (record.symmetric, record.float_zeros) == (symmetric, float_zeros)


@pytest.mark.parametrize("act_order", ["none", "static_groups", "full"])
@pytest.mark.parametrize("float_zeros", [False, True])
def test_with_a_first_order_term_blocked_equals_column_by_column(act_order, float_zeros):
    case, grid = layer(rows=8, columns=160, seed=3), UniformGrid(3, 32, False, float_zeros)
    factor = inverse_factor(case.moment_II, 0.01, act_order != "none")
    record, _ = gptq_uniform(case.weight_OI, factor, grid, SweepConfig(static=act_order == "static_groups", first_order=0.2))
    assert torch.allclose(record.dense(torch.float64), twin(case, grid, act_order, pull=0.2), atol=1e-6)
    plain, _ = gptq_uniform(case.weight_OI, factor, grid, SweepConfig(static=act_order == "static_groups"))
    assert not torch.equal(plain.codes, record.codes)


@pytest.mark.parametrize("block", [32, 100, 128, 1000])
def test_the_block_size_changes_nothing(block):
    case = layer(columns=200)
    factor = inverse_factor(case.moment_II)
    actual = [gptq_uniform(case.weight_OI, factor, UniformGrid(3, 40), SweepConfig(static=False, block=b))[0] for b in (1, block)]
    assert torch.equal(actual[0].codes, actual[1].codes)
    assert torch.equal(actual[0].scales, actual[1].scales)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_on_a_code_book_blocked_equals_column_by_column(bits):
    case = layer(rows=10, columns=192)
    mask = torch.rand(case.weight_OI.shape, generator=torch.Generator().manual_seed(9)) < 0.6
    absmax = nf.absmax_of(case.weight_OI, 64).double()
    codes, _ = gptq_book(case.weight_OI, inverse_factor(case.moment_II, 0.01, True), absmax, bits, mask)
    book = nf.code_book(bits).double()

    def round_column(step: int, column: int, updated: Tensor, value: Tensor) -> Tensor:
        choices = book * absmax[:, column // 64].unsqueeze(1)
        nearest = (choices - value.unsqueeze(1)).abs().argmin(1, keepdim=True)
        return choices.gather(1, nearest).view(-1).where(mask[:, column], 0)

    order = case.moment_II.diagonal().argsort(descending=True, stable=True).tolist()
    expected = column_by_column(case.weight_OI, case.moment_II, order, round_column)
    assert torch.allclose(book[codes.long()] * absmax.repeat_interleave(64, dim=1), expected, atol=1e-9)


SETTLED = ({}, {"masked": True}, {"float_zeros": True}, {"narrow": 0}, {"narrow": 0, "masked": True, "bits": 2}, {"at_once": 90})


@pytest.mark.parametrize("kind", SETTLED, ids=str)
def test_columns_settled_at_once_are_those_of_the_loop(kind, monkeypatch):
    """The twin: one column after the other, each error carried on before the next is looked at."""
    rows, columns, group, generator = 300, 200, 40, torch.Generator().manual_seed(1)
    monkeypatch.setattr(feedback, "_NARROW", kind.get("narrow", 1024))
    monkeypatch.setattr(feedback, "_ROWS", kind.get("at_once", 8192))
    x = torch.randn(800, columns, generator=generator) @ (torch.eye(columns) + 0.1 * torch.randn(columns, columns, generator=generator))
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    grid = UniformGrid(kind.get("bits", 3), group, float_zeros=kind.get("float_zeros", False))
    factor = inverse_factor(x.T @ x / len(x), 0.01, True)
    scale, zero = (actual.squeeze(-1).T.contiguous() for actual in fit(weight.view(rows, -1, group), grid, "power"))
    keep = torch.rand(columns, rows, generator=generator) < 0.6 if kind.get("masked") else None
    start, group_I = weight.T[factor.order_I].contiguous(), factor.order_I // group

    def open_columns(first, last, updated):
        groups, kept = group_I[first:last], None if keep is None else keep[first:last]
        return feedback.uniform_rounding(scale[groups], zero[groups], grid.top, grid.float_zeros, kept)

    left, left_by_loop = start.clone(), start.clone()
    expected, lost_by_loop = feedback.feed_back_(left_by_loop, factor, open_columns, ())
    given = feedback.GivenGrids(scale, zero, group_I, keep, grid.top, grid.float_zeros)
    levels, lost = feedback.feed_back_uniform_(left, factor, given)
    same = (levels - expected).abs() < 0.5  # levels of a grid with float zeros are no whole numbers
    assert same.float().mean() >= 0.9999 and len(levels.unique()) >= 1 << grid.bits
    assert keep is None or not levels[~keep].any()
    assert lost.sum().item() == pytest.approx(lost_by_loop.sum().item(), rel=1e-4)
    alike = same.all(0)  # where a code differs, those behind it may
    torch.testing.assert_close(left[:, alike], left_by_loop[:, alike], rtol=1e-4, atol=1e-5)


def test_correction_hands_to_later_columns_what_they_can_reproduce():
    """GPTAQ's definition: at each column, least squares of w·(x_dense − x) on the inputs that come later."""
    case = layer(rows=5, columns=40)
    order = case.moment_II.diagonal().argsort(descending=True, stable=True).tolist()
    shift = (case.statistics.inputs.cross_moment_II - case.statistics.inputs.second_moment_II).double()
    damped = case.moment_II + 0.01 * case.moment_II.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    expected = case.weight_OI.clone()
    for step, column in enumerate(order[:-1]):
        later = torch.tensor(order[step + 1 :])
        expected[:, later] += (
            0.7 * case.weight_OI[:, column : column + 1] * torch.linalg.solve(damped[later][:, later], shift[column, later])
        )
    actual = corrected_target(case.weight_OI, shift, inverse_factor(case.moment_II, 0.01, True), 0.7)
    assert torch.allclose(actual, expected, atol=1e-9)


def test_correction_brings_the_output_nearer_to_the_dense_one():
    case = layer(rows=64, tokens=4000, dtype=torch.float32)
    inputs = case.statistics.inputs

    def to_dense_output(record: StoredWeight) -> float:
        """tr of E‖W·x_dense − Q·x‖², less what does not depend on Q."""
        dense = record.dense()
        return (((dense @ inputs.second_moment_II) * dense).sum() - 2 * ((case.weight_OI @ inputs.cross_moment_II) * dense).sum()).item()

    start = StoredWeight(DenseWeight(case.weight_OI))
    actual = [to_dense_output(gptq(start, case.weight_OI, case.statistics, GptqConfig(8, 32, correction=c))[0]) for c in (0.0, 0.5, 1.0)]
    assert actual[0] > actual[1] > actual[2]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("act_order", ["static_groups", "none", "full"])
def test_better_than_rounding_to_nearest(bits, act_order):
    case = layer(rows=64, columns=192, dtype=torch.float32)
    start = StoredWeight(DenseWeight(case.weight_OI))
    nearest, _ = rtn(start, case.weight_OI, case.statistics, RtnConfig(bits))
    fed_back, _ = gptq(start, case.weight_OI, case.statistics, GptqConfig(bits, act_order=act_order))
    assert case.error(fed_back.dense()) < 0.9 * case.error(nearest.dense())


def test_rows_do_not_know_each_other_so_stacking_matrices_of_one_input_changes_nothing():
    case = layer(rows=40, columns=128)
    factor = inverse_factor(case.moment_II, 0.01, True)
    whole, _ = gptq_uniform(case.weight_OI, factor, UniformGrid(4, 32), SweepConfig("power"))
    parts = [gptq_uniform(part, factor, UniformGrid(4, 32), SweepConfig("power"))[0] for part in case.weight_OI.split([16, 24])]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))


SETTINGS = (
    {}, {"act_order": "full", "clip": "joint"}, {"act_order": "none", "float_zeros": True}, {"symmetric": True, "bits": 3},
    {"first_order": 0.2}, {"correction": 0.5}, {"refit": 0.5},
)  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_together_or_one_by_one_is_the_same(settings, monkeypatch):
    case, config = layer(rows=84, columns=192, dtype=torch.float32), GptqConfig(group_size=32, **settings)
    mask = torch.rand(40, 192, generator=torch.Generator().manual_seed(9)) < 0.6
    targets = dict(zip("qkv", case.weight_OI.split([24, 20, 40]), strict=True))
    weights = {name: StoredWeight(DenseWeight(target)) for name, target in targets.items()}
    if not config.float_zeros:
        weights["v"] = weights["v"].with_mask(mask)
    known = dict.fromkeys(targets, case.statistics)
    apart = {name: gptq(weights[name], targets[name], case.statistics, config) for name in targets}
    sweeps = []
    for sweep in ("feed_back_", "feed_back_uniform_"):
        plain = getattr(gptq_sweeps, sweep)
        monkeypatch.setattr(gptq_sweeps, sweep, lambda work_IO, *rest, plain=plain: sweeps.append(work_IO.shape) or plain(work_IO, *rest))
    records, metrics = gptq_group(weights, targets, known, config)
    assert sweeps == [(192, 84)]
    for name, (record, actual) in apart.items():
        assert_same_record(records[name], record)
        assert metrics[name] == pytest.approx(actual, rel=1e-5)
    places = [tensor.untyped_storage().data_ptr() for record in records.values() for tensor in to_tensors(record).values()]
    assert len(set(places)) == len(places), "records that share memory cannot be saved"


@pytest.mark.parametrize("settings", [{"bits": 3, "correction": 0.5, "refit": 0.0}, {"symmetric": True, "first_order": 0.1}, {"bits": 2, "grid": "q2_k", "group_size": 16}])
def test_rows_swept_apart_are_those_of_one_sweep(settings, monkeypatch, side_by_side):
    """By three processes, by one that goes through the parts, and all at once as the CPU does."""
    monkeypatch.setattr(feedback, "_ROWS", 40)
    given, config = layer(90, 256, dtype=torch.float32), GptqConfig(**{"group_size": 32, **settings})
    mask_OI = None if settings.get("bits") != 3 else given.weight_OI.abs() > 0.01
    weights = {n: StoredWeight(DenseWeight(w)) for n, w in zip("ab", given.weight_OI.split(50), strict=True)}
    if mask_OI is not None:
        weights = {n: w.with_mask(m) for (n, w), m in zip(weights.items(), mask_OI.split(50), strict=True)}
    targets = dict(zip("ab", given.weight_OI.split(50), strict=True))

    def solved(share=None):
        records, metrics = gptq_group(weights, targets, dict.fromkeys("ab", given.statistics), config, share)
        return {f"{n}.{part}": tensor for n, record in records.items() for part, tensor in to_tensors(record).items()}, metrics

    def of_three(thread):
        return solved(BlockShare((), thread.rank, 3, thread.gathered, spread=lambda costs: [2, 0, 2]))

    expected, expected_metrics = solved()
    for tensors, metrics in [solved(BlockShare()), *side_by_side(3, of_three)]:
        assert metrics == expected_metrics and all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_together_what_cannot_be_is_refused_by_name_and_what_is_smoothed_goes_alone():
    case, config = layer(rows=48, columns=96, dtype=torch.float32), GptqConfig(group_size=32, float_zeros=True)
    targets = dict(zip("qk", case.weight_OI.split([24, 24]), strict=True))
    weights = {name: StoredWeight(DenseWeight(target)) for name, target in targets.items()}
    known = dict.fromkeys(targets, case.statistics)
    with pytest.raises(ValueError, match="k: float_zeros leave no code for 0"):
        gptq_group(weights | {"k": weights["k"].with_mask(targets["k"] > 0)}, targets, known, config)
    smooth = replace(weights["k"], smooth=torch.rand(96) + 0.5)
    records, _ = gptq_group(weights | {"k": smooth}, targets, known, config)
    assert_same_record(records["q"], gptq(weights["q"], targets["q"], case.statistics, config)[0])
    assert_same_record(records["k"], gptq(smooth, targets["k"], case.statistics, config)[0])


def assert_same_record(one: StoredWeight, other: StoredWeight) -> None:
    mine, theirs = to_tensors(one), to_tensors(other)
    assert mine.keys() == theirs.keys() and describe(one) == describe(other)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_factor_is_computed_once_for_all_matrices_of_an_input():
    case = layer(dtype=torch.float32)
    start = StoredWeight(DenseWeight(case.weight_OI))
    gptq(start, case.weight_OI, case.statistics, GptqConfig(group_size=32))
    kept = dict(case.statistics.inputs.factors)
    gptq(start, case.weight_OI, case.statistics, GptqConfig(bits=3, group_size=32))
    assert [*map(id, case.statistics.inputs.factors.values())] == [*map(id, kept.values())]
    case.statistics.inputs.update(torch.ones(1, 96), torch.ones(1, 96))
    assert not case.statistics.inputs.factors


def test_dead_inputs_are_rounded_to_nearest_and_disturb_nobody():
    case = layer(dtype=torch.float32)
    inputs = InputStatistics(96, frozenset({"second_moment"}))
    x = torch.randn(300, 96, generator=torch.Generator().manual_seed(4))
    x[:, [3, 50]] = 0
    inputs.update(x)
    case.weight_OI[:, 3] *= 0.1  # no group's range hangs on it
    start, config = StoredWeight(DenseWeight(case.weight_OI)), GptqConfig(group_size=32, clip="none")
    actual, metrics = gptq(start, case.weight_OI, LayerStatistics(inputs), config)
    assert metrics["dead_inputs"] == 2
    assert metrics["dead_layer"] == 0
    nearest = round_uniform(case.weight_OI, UniformGrid(4, 32))
    assert torch.equal(actual.dense()[:, [3, 50]], nearest.dense()[:, [3, 50]])
    other = case.weight_OI.clone()
    other[:, 3] *= -1
    again, _ = gptq(StoredWeight(DenseWeight(other)), other, LayerStatistics(inputs), config)
    others = [i for i in range(96) if i != 3]
    assert torch.equal(actual.dense()[:, others], again.dense()[:, others])
    assert not torch.equal(actual.dense()[:, 3], again.dense()[:, 3])


def test_a_dead_layer_is_rounded_to_nearest_and_says_so():
    case, inputs = layer(dtype=torch.float32), InputStatistics(96, frozenset({"second_moment"}))
    inputs.update(torch.zeros(50, 96))
    start = StoredWeight(DenseWeight(case.weight_OI))
    for clip in ("none", "hessian"):
        actual, metrics = gptq(start, case.weight_OI, LayerStatistics(inputs), GptqConfig(group_size=32, clip=clip))
        assert metrics["dead_layer"] == 1
        assert torch.isfinite(actual.dense()).all()
    nearest = round_uniform(case.weight_OI, UniformGrid(4, 32))
    actual, _ = gptq(start, case.weight_OI, LayerStatistics(inputs), GptqConfig(group_size=32, clip="none"))
    assert torch.equal(actual.dense(), nearest.dense())


def test_a_singular_moment_is_damped_until_it_factors_and_the_damping_is_reported():
    case, inputs = layer(dtype=torch.float32), InputStatistics(96, frozenset({"second_moment"}))
    inputs.update(torch.randn(5, 96, generator=torch.Generator().manual_seed(4)) * 100)
    start = StoredWeight(DenseWeight(case.weight_OI))
    actual, metrics = gptq(start, case.weight_OI, LayerStatistics(inputs), GptqConfig(group_size=32, damp=0.0))
    assert metrics["damp"] > 0
    assert torch.isfinite(actual.dense()).all()
    _, metrics = gptq(start, case.weight_OI, LayerStatistics(inputs), GptqConfig(group_size=32, damp=0.01))
    assert metrics["damp"] == 0.01


def test_a_moment_that_nothing_mends_is_refused():
    with pytest.raises(ValueError, match="no Cholesky factor even with damp 10; it is not positive semi-definite"):
        inverse_factor(torch.tensor([[1.0, 50.0], [50.0, 1.0]]))
    with pytest.raises(ValueError, match="second moment holds NaN or Inf"):
        inverse_factor(torch.tensor([[1.0, float("nan")], [float("nan"), 1.0]]))


@pytest.mark.parametrize("count", [1, 96, 257, 700])
def test_the_factor_is_the_cholesky_factor_of_the_inverse(count):
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(2 * count, count, generator=generator, dtype=torch.float64) * torch.rand(count, generator=generator)
    moment = x.T @ x
    factor = inverse_factor(moment, 0.02, True)
    damped = moment + 0.02 * moment.diagonal().mean() * torch.eye(count, dtype=torch.float64)
    inverse = torch.linalg.inv(damped[factor.order_I][:, factor.order_I])
    expected = torch.linalg.cholesky(inverse, upper=True)
    assert torch.allclose(factor.unit_II * factor.diagonal_I.unsqueeze(1), expected, rtol=1e-8, atol=1e-10 * expected.abs().max().item())
    assert torch.equal(factor.order_I[factor.place_I], torch.arange(count))


def test_the_base_compensates_the_low_rank_term_and_delta():
    case = layer(rows=32, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    pair = LowRank(torch.randn(32, 4, generator=generator) * 0.1, torch.randn(4, 96, generator=generator) * 0.1)
    smooth = torch.rand(96, generator=generator) + 0.5
    weight = StoredWeight(DenseWeight(case.weight_OI), low_rank=pair, smooth=smooth)
    actual, _ = gptq(weight, case.weight_OI, case.statistics, GptqConfig(8, 32))
    assert case.error(actual.dense()) < 1e-4
    assert actual.low_rank is pair


def test_the_full_order_stores_a_group_index_and_the_others_none():
    case = layer(dtype=torch.float32)
    start = StoredWeight(DenseWeight(case.weight_OI))
    bases = {}
    for act_order in ("static_groups", "none", "full"):
        base = gptq(start, case.weight_OI, case.statistics, GptqConfig(group_size=32, act_order=act_order))[0].base
        assert isinstance(base, UniformWeight)
        bases[act_order] = base
    assert bases["static_groups"].group_index is None
    assert bases["none"].group_index is None
    index = bases["full"].group_index
    assert index is not None
    assert index.bincount().tolist() == [32, 32, 32]


@pytest.mark.parametrize("double_quantize", [False, True])
def test_gptq_on_normal_float_beats_rounding_and_keeps_the_mask(double_quantize):
    case = layer(rows=64, columns=192, dtype=torch.float32)
    mask = torch.rand(64, 192, generator=torch.Generator().manual_seed(2)) < 0.5
    start = StoredWeight(DenseWeight(case.weight_OI))
    config = GptqNormalFloatConfig(3, double_quantize=double_quantize)
    actual, metrics = gptq_nf(start, case.weight_OI, case.statistics, config)
    assert isinstance(actual.base, NormalFloatWeight)
    nearest = nf.round_to_book(case.weight_OI, nf.absmax_of(case.weight_OI, 64), 3)
    values = nf.code_book(3)[nearest.long()] * nf.absmax_of(case.weight_OI, 64).repeat_interleave(64, dim=1)
    assert case.error(actual.dense()) < 0.8 * case.error(values)
    assert metrics["squared_error"] > 0
    masked, _ = gptq_nf(start.with_mask(mask), case.weight_OI, case.statistics, config)
    assert bool((masked.base.dense()[~mask] == 0).all())


def test_settings_that_exclude_each_other_are_refused():
    with pytest.raises(ValueError, match="a symmetric grid stores no zero points"):
        GptqConfig(symmetric=True, float_zeros=True)
