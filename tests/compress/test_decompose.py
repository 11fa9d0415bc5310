"""Every preset against its paper's objective, solved slowly; never worse than L = 0; best iterate; masks; bad input."""

from dataclasses import replace

import pytest
import torch
from bitmend.compress.decompose import Decomposition, decompose
from bitmend.compress.factors import FactorForm, follow_factors
from bitmend.compress.grids import UniformGrid
from bitmend.compress.lowrank import Metric, WeightedError, squared_error
from bitmend.compress.masks import masked_base, pattern_mask
from bitmend.compress.methods import DECOMPOSE
from bitmend.compress.requantize import requantize
from bitmend.compress.rounding import round_normal_float, round_uniform
from bitmend.compress.statistics import Fisher, InputStatistics, LayerStatistics
from bitmend.compress.weights import DenseWeight, LowRank, NormalFloatWeight, StoredWeight, UniformWeight

EVERYTHING = frozenset({"norms", "absmax", "absmean", "second_moment", "samples"})
MATRIX_ROWS = [name for name, row in DECOMPOSE.items() if row.scope == "matrix"]


def inputs(features: int = 128, tokens: int = 700, seed: int = 0) -> InputStatistics:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) / features**0.5 + torch.eye(features)
    size = torch.logspace(-1, 0.7, features)[torch.randperm(features, generator=generator)]
    statistics = InputStatistics(features, EVERYTHING)
    statistics.update(torch.randn(tokens, features, generator=generator) @ mix * size)
    return statistics


def matrix(rows: int = 96, columns: int = 128, seed: int = 1) -> torch.Tensor:
    """A weight with some structure: noise and a dozen strong directions."""
    generator = torch.Generator().manual_seed(seed)
    strong = torch.randn(rows, 12, generator=generator) @ torch.randn(12, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator) * 0.05 + strong * 0.02


def fisher(rows: int = 96, columns: int = 128) -> Fisher:
    generator = torch.Generator().manual_seed(5)
    return Fisher(torch.rand(rows, generator=generator).square() + 1e-3, torch.rand(columns, generator=generator).square() + 1e-3)


def uniform(target: torch.Tensor, bits: int = 3, mask: torch.Tensor | None = None) -> StoredWeight:
    base = round_uniform(target if mask is None else target.where(mask, 0), UniformGrid(bits, 64), "power")
    return StoredWeight(base if mask is None else masked_base(base, mask)).with_mask(mask)


def run(name: str, weight: StoredWeight, target: torch.Tensor, statistics: LayerStatistics, **chosen):
    row = DECOMPOSE[name]
    return row.function(weight, target, statistics, row.config(**{**row.defaults, **chosen}))


def short(name: str) -> dict[str, int]:
    """A few rounds are enough for what does not depend on their number."""
    return {"iterations": 3} if DECOMPOSE[name].defaults.get("requantize") else {}


def truncated(a: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(a.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def root(second: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(second.double())
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def exact_low(error: torch.Tensor, statistics: LayerStatistics, rank: int) -> torch.Tensor:
    """argmin ‖(E − L)·R^½‖ through the root and its inverse."""
    s = root(statistics.inputs.second_moment_II)
    return truncated(error.double() @ s, rank) @ torch.linalg.inv(s)


def output_error(target: torch.Tensor, effective: torch.Tensor, statistics: LayerStatistics) -> float:
    return torch.linalg.norm((target - effective).double() @ root(statistics.inputs.second_moment_II)).item()


def test_loftq_alternates_as_its_paper_and_returns_the_best_round():
    target, statistics = matrix(), LayerStatistics(inputs())
    start = uniform(target, 2)
    low, errors = torch.zeros_like(target), []
    for _ in range(5):
        base = round_uniform(target - low, UniformGrid(2, 64), "power").dense()
        low = truncated(target - base, 16).float()
        errors.append(torch.linalg.norm(target - base - low).item())
    first, _ = run("loftq", start, target, statistics, rank=16, iterations=1)
    assert torch.linalg.norm(target - first.dense()).item() == pytest.approx(errors[0], rel=1e-4)
    stored, metrics = run("loftq", start, target, statistics, rank=16)
    assert torch.linalg.norm(target - stored.dense()).item() == pytest.approx(min(errors), rel=1e-2)
    assert metrics["iterations"] == 5 and metrics["relative_error"] < metrics["relative_error_before"]


def test_lq_lora_starts_with_the_term_weighs_by_fisher_and_keeps_the_best():
    target, information = matrix(), fisher()
    start, statistics = StoredWeight(round_normal_float(target)), LayerStatistics(inputs(), information)
    d1, d2 = information.row_mean_O.double().sqrt().unsqueeze(1), information.column_mean_I.double().sqrt()
    low, errors = truncated(d1 * target * d2, 16) / d1 / d2, []
    while len(errors) < 2 or errors[-1] <= errors[-2]:
        base = round_normal_float(target - low.float()).dense()
        low = truncated(d1 * (target - base) * d2, 16) / d1 / d2
        errors.append(torch.linalg.norm(d1 * (target - base - low) * d2).item())
    first, _ = run("lq_lora", start, target, statistics, rank=16, iterations=1)
    assert torch.linalg.norm(d1 * (target - first.dense()) * d2).item() == pytest.approx(errors[0], rel=1e-4)
    stored, metrics = run("lq_lora", start, target, statistics, rank=16)
    error = torch.linalg.norm(d1 * (target - stored.dense()) * d2).item()
    assert error == pytest.approx(min(errors), rel=1e-2)  # rounding the factors sends later rounds another way
    assert metrics["iterations"] > metrics["best_iteration"] >= 1


@pytest.mark.parametrize("name", ["qera_exact", "eora"])
@pytest.mark.parametrize("shape", [(96, 128), (192, 64)])
def test_exact_presets_reach_the_optimum_for_the_given_q(name, shape):
    target, statistics = matrix(*shape), LayerStatistics(inputs(shape[1]))
    start = uniform(target)
    stored, metrics = run(name, start, target, statistics, rank=8)
    best = output_error(target, start.dense() + exact_low(target - start.dense(), statistics, 8), statistics)
    assert output_error(target, stored.dense(), statistics) == pytest.approx(best, rel=1e-4)
    assert torch.equal(stored.base_dense(), start.base_dense())
    assert metrics["relative_error"] == pytest.approx(best / output_error(target, torch.zeros_like(target), statistics), rel=1e-4)


@pytest.mark.parametrize("name", ["zeroquant_v2", "lqer", "qera_approx"])
def test_diagonal_presets_truncate_the_scaled_error_of_the_given_q(name):
    target, statistics = matrix(), LayerStatistics(inputs())
    start, actual = uniform(target), statistics.inputs
    scales = {
        "zeroquant_v2": torch.ones(128),
        "lqer": actual.absmean_I / (actual.absmean_I.min() * actual.absmean_I.max()).sqrt(),
        "qera_approx": actual.second_moment_II.diagonal().sqrt(),
    }
    d = scales[name].double()
    stored, _ = run(name, start, target, statistics, rank=8)
    assert stored.low_rank is not None
    slow = truncated((target - start.dense()) * d, 8) / d
    torch.testing.assert_close(stored.low_rank.dense().double(), slow, rtol=2e-2, atol=2e-4)
    assert squared_error(target - stored.dense(), Metric(column_I=d)) <= squared_error(
        target - start.dense() - slow, Metric(column_I=d)
    ) * (1 + 1e-5)


def test_cloq_corrects_the_gptq_matrix_exactly():
    target, statistics = matrix(), LayerStatistics(inputs())
    start = uniform(target, 2)
    base = requantize(start, target, statistics, "gptq", "hessian").dense()
    best = output_error(target, base + exact_low(target - base, statistics, 8), statistics)
    stored, _ = run("cloq", start, target, statistics, rank=8)
    assert output_error(target, stored.dense(), statistics) == pytest.approx(best, rel=1e-4)
    assert torch.equal(stored.base_dense(), base)


def test_srr_holds_its_ranks_of_the_weight_and_corrects_with_the_rest():
    target, statistics = matrix(), LayerStatistics(inputs())
    start = uniform(target, 2)
    kept = exact_low(target, statistics, 5)
    base = round_uniform((target - kept).float(), UniformGrid(2, 64), "power").dense()
    low = kept + exact_low((target - kept - base).float(), statistics, 11)
    stored, _ = run("srr", start, target, statistics, rank=16, kept_rank=5, quantizer="rtn", clip="power")
    assert output_error(target, stored.dense(), statistics) == pytest.approx(output_error(target, base + low, statistics), rel=1e-3)


def test_srr_criterion_finds_the_rank_of_a_low_rank_weight():
    generator, actual = torch.Generator().manual_seed(3), InputStatistics(128, EVERYTHING)
    actual.update(torch.randn(2000, 128, generator=generator))
    strong = torch.randn(96, 4, generator=generator) @ torch.randn(4, 128, generator=generator)
    target = torch.randn(96, 128, generator=generator) * 0.02 + strong
    start, statistics = uniform(target, 2), LayerStatistics(actual)
    by_rank = {k: run("srr", start, target, statistics, rank=16, kept_rank=k)[1]["relative_error"] for k in (0, 2, 4, 8, 16)}
    chosen = run("srr", start, target, statistics, rank=16)[1]["relative_error"]
    assert min(by_rank.values()) * 1.05 > chosen and chosen < 0.5 * by_rank[0] and chosen < 0.5 * by_rank[2]


def test_caldera_rounds_its_factors_and_beats_rounding_them_afterwards():
    target, statistics = matrix(), LayerStatistics(inputs())
    start = uniform(target, 2)
    stored, metrics = run("caldera", start, target, statistics, rank=16, iterations=4)
    assert stored.low_rank is not None and isinstance(stored.low_rank.up, UniformWeight) and stored.low_rank.up.bits == 4
    assert stored.low_rank.stored_bits() == FactorForm(4).stored_bits(16, 96, 128)
    base = requantize(start, target, statistics, "gptq").dense()
    low = exact_low(target - base, statistics, 16)
    u, s, vh = torch.linalg.svd(low, full_matrices=False)
    up, down = (u[:, :16] * s[:16].sqrt()).float(), (vh[:16].T * s[:16].sqrt()).T.float()
    grid = UniformGrid(4, -1, True)
    afterwards = round_uniform(up, grid, "power").dense() @ round_uniform(down.contiguous(), UniformGrid(4, 64, True), "power").dense()
    assert output_error(target, stored.dense(), statistics) < output_error(target, base + afterwards, statistics)
    assert metrics["factor_bits"] == 4


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(96, 128), (192, 64), (64, 192)])
def test_best_is_never_worse_than_exact_on_the_same_q_and_costs_no_more(bits, shape):
    target, statistics = matrix(*shape), LayerStatistics(inputs(shape[1]))
    start = uniform(target, bits)
    exact, exact_metrics = run("qera_exact", start, target, statistics, rank=4)
    best, best_metrics = run("best", start, target, statistics, rank=4)
    assert best_metrics["relative_error"] < exact_metrics["relative_error"]
    assert best.low_rank is not None and exact.low_rank is not None
    assert best.stored_bits() <= exact.stored_bits()
    assert output_error(target, best.dense(), statistics) < output_error(target, exact.dense(), statistics)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("shape", [(96, 128), (192, 64), (64, 192)])
def test_best_errs_less_than_twenty_rounds_of_caldera_in_as_many_bytes(bits, shape):
    target, statistics = matrix(*shape), LayerStatistics(inputs(shape[1]))
    start = requantize(uniform(target, bits), target, statistics, "gptq", "hessian")
    best, metrics = run("best", start, target, statistics, rank=8)
    budget = FactorForm(16).stored_bits(8, *shape)
    caldera, theirs = run("caldera", start, target, statistics, rank=FactorForm(4).largest_rank(budget, *shape))
    assert best.stored_bits() <= caldera.stored_bits()
    assert metrics["relative_error"] < theirs["relative_error"]
    held, paid = run("best", start, target, statistics, rank=8, overlap=1.0)
    assert held.stored_bits() == best.stored_bits() and metrics["relative_error"] < paid["relative_error"]


def test_a_followed_term_is_one_round_of_alternating_least_squares():
    target, statistics = matrix(), LayerStatistics(inputs())
    metric = Metric(moment_II=statistics.inputs.second_moment_II)
    start = uniform(target, 3)
    before, after = WeightedError(target - start.dense(), metric), WeightedError(target - uniform(target * 1.01, 3).dense(), metric)
    term = LowRank(*before.best(8))
    actual = follow_factors(term, FactorForm(16), after)
    up, down, s = term.up.double(), actual.down.double(), root(statistics.inputs.second_moment_II)
    assert torch.allclose(down, torch.linalg.lstsq(up, after.error_OI.double()).solution, rtol=1e-2, atol=1e-4)
    solved = torch.linalg.lstsq((down @ s).T, (after.error_OI.double() @ s).T).solution.T
    assert torch.allclose(actual.up.double(), solved, rtol=1e-2, atol=1e-4)
    assert after.left_by(*after.best(8)) <= after.left_by(*actual.factors()) < after.left_by(*term.factors())


def test_order_of_the_metrics_measured_by_the_output():
    target, statistics = matrix(), LayerStatistics(inputs())
    start = uniform(target)
    errors = {
        n: output_error(target, run(n, start, target, statistics, rank=8)[0].dense(), statistics)
        for n in ("qera_exact", "qera_approx", "zeroquant_v2")
    }
    assert errors["qera_exact"] < errors["qera_approx"] < errors["zeroquant_v2"] < output_error(target, start.dense(), statistics)


@pytest.mark.parametrize("name", MATRIX_ROWS)
@pytest.mark.parametrize("kind", ["uniform", "symmetric", "normal_float", "masked", "dense_masked", "smoothed"])
def test_every_preset_on_every_record_keeps_grid_and_mask_and_never_loses_to_no_term(name, kind):
    target, statistics = matrix(), LayerStatistics(inputs(), fisher())
    mask = pattern_mask(target.abs(), 2, 4)
    start = {
        "uniform": uniform(target),
        "symmetric": StoredWeight(round_uniform(target, UniformGrid(3, 64, True), "power")),
        "normal_float": StoredWeight(round_normal_float(target, 3)),
        "masked": uniform(target, 4, mask),
        "dense_masked": StoredWeight(DenseWeight(target.where(mask, 0))).with_mask(mask),
        "smoothed": replace(uniform(target * torch.logspace(-0.5, 0.5, 128)), smooth=torch.logspace(-0.5, 0.5, 128)),
    }[kind]
    stored, metrics = run(name, start, target, statistics, rank=6, **short(name))
    assert metrics["relative_error"] < metrics["relative_error_before"]
    assert stored.low_rank is not None and type(stored.base) is type(start.base)
    assert stored.base.stored_bits() == start.base.stored_bits()
    if start.mask is not None:
        assert stored.mask is not None and torch.equal(stored.mask, start.mask)
        assert not stored.base_dense()[~mask].any()
    up, down = stored.low_rank.factors()
    assert torch.isfinite(up).all() and torch.isfinite(down).all()


def test_metrics_describe_the_record_that_is_returned():
    target, statistics = matrix(), LayerStatistics(inputs(), fisher())
    start = uniform(target, 2)
    measures = {"plain": Metric(), "fisher": Metric(fisher().row_mean_O.sqrt(), fisher().column_mean_I.sqrt())}
    for name in MATRIX_ROWS:
        stored, metrics = run(name, start, target, statistics, rank=7, **short(name))
        kind = DECOMPOSE[name].defaults.get("metric", "second_moment")
        metric = measures.get(kind, Metric(moment_II=statistics.inputs.second_moment_II))
        if kind in ("absmean", "diagonal"):
            metric = Metric(
                column_I=statistics.inputs.absmean_I if kind == "absmean" else statistics.inputs.second_moment_II.diagonal().sqrt()
            )
        whole = squared_error(target, metric)
        assert metrics["relative_error"] == pytest.approx((squared_error(target - stored.dense(), metric) / whole) ** 0.5, rel=1e-6)
        assert metrics["relative_error_before"] == pytest.approx((squared_error(target - start.dense(), metric) / whole) ** 0.5, rel=1e-6)


def test_mask_with_the_full_moment_beats_the_diagonal():
    target, statistics = matrix(), LayerStatistics(inputs())
    mask = pattern_mask(target.abs() * statistics.inputs.norm_I, 2, 4)
    start = uniform(target, 4, mask)
    before, diagonal, exact = (
        output_error(target, w.dense(), statistics)
        for w in (start, *(run(n, start, target, statistics, rank=8)[0] for n in ("qera_approx", "qera_exact")))
    )
    assert exact < diagonal < before


@pytest.mark.parametrize("name", MATRIX_ROWS)
def test_a_weight_already_exact_keeps_a_term_without_effect(name):
    statistics = LayerStatistics(inputs(), fisher())
    start = uniform(matrix())
    stored, metrics = run(name, start, start.dense(), statistics, rank=4, **short(name))
    assert metrics["relative_error"] == 0 and metrics["relative_error_before"] == 0 and metrics["best_iteration"] == 0
    assert torch.equal(stored.dense(), start.dense())


def test_a_term_in_the_record_is_replaced_not_added_to():
    target, statistics = matrix(), LayerStatistics(inputs())
    once, _ = run("qera_exact", uniform(target), target, statistics, rank=8)
    twice, metrics = run("qera_exact", once, target, statistics, rank=4)
    fresh, _ = run("qera_exact", uniform(target), target, statistics, rank=4)
    assert torch.equal(twice.dense(), fresh.dense()) and metrics["rank"] == 4


@pytest.mark.parametrize("name", MATRIX_ROWS)
@pytest.mark.parametrize("kind", ["few_tokens", "dead_channel", "nothing"])
def test_poor_statistics_give_finite_factors_and_are_reported(name, kind):
    target, actual = matrix(), InputStatistics(128, EVERYTHING)
    x = torch.randn(20 if kind == "few_tokens" else 500, 128, generator=torch.Generator().manual_seed(0))
    x[:, 7] *= kind != "dead_channel"
    actual.update(x * (kind != "nothing"))
    zero = torch.zeros(96), torch.zeros(128)
    statistics = LayerStatistics(
        actual, Fisher(*zero) if kind == "nothing" else Fisher(torch.ones(96) * (torch.arange(96) > 3), torch.ones(128))
    )
    config = DECOMPOSE[name].config(**DECOMPOSE[name].defaults)
    stored, metrics = run(name, uniform(target, 2), target, statistics, rank=6, **short(name))
    assert torch.isfinite(stored.dense()).all() and all(v == v and abs(v) < float("inf") for v in metrics.values())
    assert metrics["relative_error"] < metrics["relative_error_before"]
    if config.metric == "plain":
        return
    if kind == "nothing":
        assert metrics["statistics_zero"] == 1
    elif config.metric == "fisher":
        assert metrics["fisher_rows_zero"] == 4
    elif kind == "few_tokens":
        assert metrics["tokens_short_of"] == 128
    if config.metric == "second_moment" and kind != "nothing":
        assert metrics["moment_singular"] == 1


def test_well_conditioned_statistics_say_nothing():
    _, metrics = run("qera_exact", uniform(matrix()), matrix(), LayerStatistics(inputs()), rank=4)
    assert not {"tokens_short_of", "moment_singular", "statistics_zero"} & set(metrics)


def test_bad_input_is_refused_with_what_is_wrong():
    target, actual = matrix(), inputs()
    with pytest.raises(ValueError, match="rank 97 does not fit a 96×128 matrix; choose 1…96"):
        run("qera_exact", uniform(target), target, LayerStatistics(actual), rank=97)
    with pytest.raises(ValueError, match="Fisher diagonal of this weight, which was not collected"):
        run("lq_lora", uniform(target), target, LayerStatistics(actual))
    with pytest.raises(ValueError, match="holds NaN, Inf or negative"):
        run("lq_lora", uniform(target), target, LayerStatistics(actual, Fisher(torch.full((96,), float("nan")), torch.ones(128))))
    actual.update(torch.full((1, 128), float("inf")))
    with pytest.raises(ValueError, match=r"calibration statistic .* holds NaN or Inf"):
        run("qera_exact", uniform(target), target, LayerStatistics(actual), rank=4)
    with pytest.raises(ValueError, match=r"kept_rank 5 must lie in 0…rank \(4\)"):
        Decomposition(rank=4, kept_rank=5)


def test_rows_need_what_their_metric_and_quantizer_read():
    needs = {name: DECOMPOSE[name].needs(DECOMPOSE[name].config(**DECOMPOSE[name].defaults)) for name in MATRIX_ROWS}
    assert needs["loftq"] == needs["zeroquant_v2"] == frozenset()
    assert needs["lq_lora"] == {"fisher"} and needs["lqer"] == {"absmean"} and needs["qera_approx"] == {"norms"}
    assert all(needs[n] == {"second_moment"} for n in ("qera_exact", "eora", "cloq", "caldera", "srr", "best"))
    assert DECOMPOSE["loftq"].needs(Decomposition(metric="plain", requantize=True, quantizer="gptq")) == {"second_moment"}


def test_overlap_is_refused_where_no_second_moment_rounds():
    for chosen in (
        {"overlap": 0.1},
        {"overlap": 0.1, "requantize": True},
        {"overlap": 0.1, "requantize": True, "quantizer": "gptq", "metric": "plain"},
    ):
        with pytest.raises(ValueError, match="overlap"):
            Decomposition(**chosen)


def test_same_input_same_bits():
    target, statistics = matrix(), LayerStatistics(inputs())
    first, second = (decompose(uniform(target), target, statistics, Decomposition(rank=8))[0] for _ in range(2))
    assert torch.equal(first.dense(), second.dense())
    assert isinstance(first.base, UniformWeight) and not isinstance(first.base, NormalFloatWeight)
