"""Training a block ends on the grid, inside the mask, and never above its start."""

from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest
import torch
from bitmend.compress.block import BlockProblem
from bitmend.compress.ggml_types import as_settings
from bitmend.compress.latents import Latent
from bitmend.compress.methods import QUANTIZE
from bitmend.compress.statistics import InputStatistics, LayerStatistics
from bitmend.compress.weights import DenseWeight, GgmlWeight, LowRank, StoredWeight, UniformWeight
from torch import Tensor

METHODS = ("learned_rounding", "block_training")


def problem(masked: bool = False, seed: int = 0) -> BlockProblem:
    """A two-layer perceptron as the block: up [64, 32], down [32, 64], inputs with a few loud channels; each layer is a sub-block."""
    generator = torch.Generator().manual_seed(seed)
    targets = {"up": torch.randn(64, 32, generator=generator), "down": torch.randn(32, 64, generator=generator)}
    inputs = torch.randn(8, 16, 32, generator=generator) * (1 + 5 * (torch.arange(32) % 7 == 0))

    def forward(matrices: dict[str, Tensor], x: Tensor) -> Tensor:
        return x + torch.nn.functional.silu(x @ matrices["up"].T) @ matrices["down"].T

    statistics = {"up": InputStatistics(32, frozenset({"second_moment"})), "down": InputStatistics(64, frozenset({"second_moment"}))}
    statistics["up"].update(inputs)
    statistics["down"].update(torch.nn.functional.silu(inputs @ targets["up"].T))
    weights = {name: StoredWeight(DenseWeight(w)) for name, w in targets.items()}
    if masked:
        weights = {n: s.with_mask(torch.rand(s.shape, generator=generator) > 0.5) for n, s in weights.items()}
    layers = {name: LayerStatistics(actual) for name, actual in statistics.items()}
    return BlockProblem(weights, targets, forward, inputs, forward(targets, inputs), layers, seed, (("up",), ("down",)))


def solve(method: str, given: BlockProblem, **settings: Any) -> tuple[dict[str, StoredWeight], dict[str, dict[str, float]]]:
    config = QUANTIZE[method].config(**{"bits": 3, "group_size": 16, "steps": 40, **settings})
    return QUANTIZE[method].function(given, dict.fromkeys(given.weights, config))


def loss(given: BlockProblem, records: dict[str, StoredWeight]) -> float:
    out = given.forward({n: r.dense() for n, r in records.items()}, given.inputs_NTD)
    return float((out - given.outputs_NTD).square().mean())


def latent_of(record: StoredWeight, target: Tensor) -> Latent:
    """Halfway through a training: everything has moved, and some codes have left the range."""
    latent, generator = Latent.of(record, target), torch.Generator().manual_seed(5)
    latent.offset_OI = torch.randn(latent.u_OI.shape, generator=generator)
    latent.range_OG = torch.randn(latent.scale_OG.shape, generator=generator) * 0.1
    if not latent.base.symmetric:
        latent.shift_OG = torch.randn(latent.scale_OG.shape, generator=generator)
    for parameter in latent.parameters():
        parameter.requires_grad_(True)
    return latent


@pytest.mark.parametrize("kind", [{}, {"symmetric": True}, {"float_zeros": True}])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_straight_through_estimator(kind: dict[str, bool], masked: bool) -> None:
    """The slow twin rounds by x + (round(x) − x).detach() and leaves the rest to autograd."""
    if masked and "float_zeros" in kind:
        return
    given = problem(masked)
    record, _ = QUANTIZE["rtn"].function(
        given.weights["up"], given.targets["up"], given.statistics["up"], QUANTIZE["rtn"].config(bits=2, group_size=16, **kind)
    )
    record = replace(record, smooth=torch.rand(32) + 0.5, low_rank=LowRank(torch.randn(64, 2), torch.randn(2, 32)))
    latent, weights = latent_of(record, given.targets["up"]), torch.randn(64, 32)

    def through(x: Tensor) -> Tensor:
        return x + (x.round() - x).detach()

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(16, dim=1)

    def twin() -> Tensor:
        zero = latent.zero_OG + latent.shift_OG
        zero = spread(zero if "float_zeros" in kind else through(zero).clamp(1, 3))
        position = latent.u_OI + latent.offset_OI
        codes = through(position + zero) if "float_zeros" in kind else through(position) + zero
        base = (codes.clamp(0, 3) - zero) * spread(latent.scale_OG * (1 + latent.range_OG))
        keep = record.mask_OI()
        assert record.smooth is not None and record.low_rank is not None
        return (base if keep is None else base * keep) / record.smooth + record.low_rank.dense()

    assert torch.allclose(latent.effective(), twin(), atol=1e-6)
    actual, expected = (torch.autograd.grad((matrix() * weights).sum(), latent.parameters()) for matrix in (latent.effective, twin))
    clamped = (latent.zero_OG + latent.shift_OG).round()
    free = torch.ones_like(clamped) if "float_zeros" in kind else ((clamped >= 1) & (clamped <= 3)).float()
    for one, other in zip(actual[:2], expected[:2], strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert torch.allclose(actual[2] * free, expected[2] * free, atol=1e-5)  # outside the twin's clamp stops it, ours draws it back


@pytest.mark.parametrize("kind", [{}, {"symmetric": True}, {"float_zeros": True}])
def test_a_record_is_the_matrix_that_was_trained(kind: dict[str, bool]) -> None:
    given = problem()
    config = QUANTIZE["rtn"].config(bits=3, group_size=16, **kind)
    record, _ = QUANTIZE["rtn"].function(given.weights["up"], given.targets["up"], given.statistics["up"], config)
    latent = Latent.of(record, given.targets["up"])
    assert torch.equal(latent.record().dense(), record.dense())
    assert torch.allclose(latent.effective(), record.dense(), atol=1e-6)
    latent = latent_of(record, given.targets["up"])
    assert torch.allclose(latent.record().dense(), latent.effective(), rtol=1e-3, atol=0.05 if "float_zeros" in kind else 2e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", ["gptq", "rtn"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lower_loss_than_its_start_on_an_ordinary_grid(method: str, start: str, bits: int) -> None:
    given = problem()
    plain = {
        n: QUANTIZE[start].function(
            given.weights[n], given.targets[n], given.statistics[n], QUANTIZE[start].config(bits=bits, group_size=16, clip="hessian")
        )[0]
        for n in given.weights
    }
    records, metrics = solve(method, given, start=start, bits=bits, outliers=0.0)
    share = 0.9 if start == "rtn" else 1.0  # GPTQ leaves little on this problem, and must not be lost
    assert loss(given, records) <= share * loss(given, plain) * (1 + 1e-5)
    assert metrics["up"]["block_loss_start"] == pytest.approx(loss(given, plain), rel=1e-4)
    for record in records.values():
        assert isinstance(record.base, UniformWeight) and record.base.bits == bits
        assert record.base.scales.dtype == torch.float16


@pytest.mark.parametrize("method", METHODS)
def test_the_start_is_kept_when_training_hurts(method: str) -> None:
    given = problem()
    rates = {"learning_rate": 50.0} | ({"range_rate": 0.5} if method == "learned_rounding" else {"scale_rate": 5.0})
    records, metrics = solve(method, given, steps=4, outliers=0.0, **rates)
    assert metrics["up"]["best_step"] == 0
    assert metrics["up"]["block_loss_best"] == metrics["up"]["block_loss_start"] == pytest.approx(loss(given, records), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_masked_weights_stay_exactly_zero_and_the_mask_is_kept(method: str) -> None:
    given = problem(masked=True)
    records, _ = solve(method, given)
    for name, record in records.items():
        keep = given.weights[name].mask_OI()
        assert keep is not None and record.mask is not None
        kept = record.mask_OI()
        assert kept is not None and torch.equal(kept, keep)
        assert not record.base.dense()[~keep].any()


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits(method: str) -> None:
    first, second = solve(method, problem())[0], solve(method, problem())[0]
    for name in first:
        one, two = first[name].base, second[name].base
        assert isinstance(one, UniformWeight) and isinstance(two, UniformWeight)
        assert torch.equal(one.codes, two.codes)
        assert torch.equal(one.scales, two.scales)


@pytest.mark.parametrize("method", METHODS)
def test_sub_blocks_train_in_turn_and_end_below_their_start(method: str) -> None:
    given = problem()
    seen: list[set[str]] = []

    def forward(matrices: dict[str, Tensor], x: Tensor) -> Tensor:
        seen.append({name for name, matrix in matrices.items() if matrix.requires_grad})
        return given.forward(matrices, x)

    records, metrics = solve(method, replace(given, forward=forward), window="sub_block", start="rtn", outliers=0.0)
    assert [part for part, _ in groupby(part for part in seen if part)] == [{"up"}, {"down"}]
    assert metrics["up"]["block_loss_best"] == pytest.approx(loss(given, records), rel=1e-4)
    assert metrics["up"]["block_loss_best"] < 0.9 * metrics["up"]["block_loss_start"]
    whole, _ = solve(method, given, window="block", start="rtn", outliers=0.0)
    assert loss(given, whole) != loss(given, records)


@pytest.mark.parametrize("method", METHODS)
def test_sub_blocks_keep_the_start_when_training_hurts(method: str) -> None:
    given = problem()
    rates = {"learning_rate": 50.0} | ({"range_rate": 0.5} if method == "learned_rounding" else {"scale_rate": 5.0})
    records, metrics = solve(method, given, steps=4, outliers=0.0, window="sub_block", **rates)
    assert metrics["up"]["block_loss_best"] == metrics["up"]["block_loss_start"] == pytest.approx(loss(given, records), rel=1e-4)


def test_a_training_can_be_ended_between_steps() -> None:
    calls: list[int] = []

    def pause() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve("learned_rounding", replace(problem(), pause=pause))


@pytest.mark.parametrize("method", METHODS)
def test_float_zeros_end_in_sixteen_bits(method: str) -> None:
    given = problem()
    records, metrics = solve(method, given, float_zeros=True, outliers=0.0, **({"zero_rate": 1e-2} if method == "block_training" else {}))
    for record in records.values():
        assert isinstance(record.base, UniformWeight) and record.base.zeros is not None
        assert record.base.zeros.dtype == torch.float16
    assert loss(given, records) == pytest.approx(metrics["up"]["block_loss_best"], rel=1e-4)
    assert loss(given, records) < loss(given, solve(method, given, outliers=0.0)[0])
    with pytest.raises(ValueError, match="set float_zeros: false for a pruned model"):
        solve(method, problem(masked=True), float_zeros=True)


def test_the_first_iterate_is_gptqs() -> None:
    """Zero rates: the latents must hold GPTQ's codes, also where those are not the nearest ones."""
    given = problem()
    config = QUANTIZE["gptq"].config(bits=3, group_size=16)
    plain = {n: QUANTIZE["gptq"].function(given.weights[n], given.targets[n], given.statistics[n], config)[0] for n in given.weights}
    records, _ = solve("block_training", given, steps=1, learning_rate=0.0, scale_rate=1e-12)
    for name in plain:
        actual, expected = records[name].base, plain[name].base
        assert isinstance(actual, UniformWeight) and isinstance(expected, UniformWeight)
        assert torch.equal(actual.codes_OI(), expected.codes_OI())


def test_stored_start_wants_a_grid() -> None:
    with pytest.raises(ValueError, match="start=stored needs a uniform grid"):
        solve("block_training", problem(), start="stored")
    given = problem()
    first, metrics = solve("learned_rounding", given, outliers=0.0)
    again = BlockProblem(first, given.targets, given.forward, given.inputs_NTD, given.outputs_NTD, given.statistics)
    second, more = solve("block_training", again, start="stored", outliers=0.0)
    assert more["up"]["block_loss_start"] == pytest.approx(metrics["up"]["block_loss_best"], rel=1e-4)
    assert loss(given, second) <= loss(given, first)


@pytest.mark.parametrize("method", METHODS)
def test_coarser_products_train_the_updates_alone(method: str) -> None:
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    given = problem()

    def forward(matrices: dict[str, Tensor], x: Tensor) -> Tensor:
        seen[torch.is_grad_enabled()].add(torch.get_float32_matmul_precision())
        return given.forward(matrices, x)

    before = torch.get_float32_matmul_precision()
    with torch.no_grad():  # as the stage calls it
        solve(method, replace(given, forward=forward), matmul="medium", steps=5)
    assert seen == {True: {"medium"}, False: {before}}
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("start", ["rtn", "gptq", "stored"])
@pytest.mark.parametrize("grid", ["q2_k", "q3_k", "q4_1"])
@pytest.mark.parametrize("method", METHODS)
def test_a_type_of_ggml_trains_its_codes_and_super_blocks(method: str, grid: str, start: str) -> None:
    given = wide_problem()
    own: dict[str, Any] = {"grid": grid, **as_settings(grid)}
    if start == "stored":
        rtn = QUANTIZE["rtn"]
        rounded = {n: rtn.function(given.weights[n], given.targets[n], given.statistics[n], rtn.config(**own))[0] for n in given.weights}
        given, own = replace(given, weights=rounded), {}
    config = QUANTIZE[method].config(**{"steps": 10, "start": start, **own})
    records, metrics = QUANTIZE[method].function(given, dict.fromkeys(given.weights, config))
    start_config = QUANTIZE["gptq" if start == "gptq" else "rtn"].config(**{"grid": grid, **as_settings(grid), "clip": "hessian" if start != "stored" else "power"})
    for name, record in records.items():
        first, _ = QUANTIZE["gptq" if start == "gptq" else "rtn"].function(
            problem_weights(given, name), given.targets[name], given.statistics[name], start_config
        )
        assert isinstance(record.base, GgmlWeight) and isinstance(first.base, GgmlWeight) and record.base.type == grid
        assert (record.base.small_codes is None) == (first.base.small_codes is None)
        assert record.base.small_codes is None or torch.equal(record.base.small_codes, first.base.small_codes)
    won = metrics["up"]["block_loss_start"] - metrics["up"]["block_loss_best"]
    assert won >= 0 if start == "gptq" else won > 0  # GPTQ leaves next to nothing of 64 tokens
    assert loss(given, records) == pytest.approx(metrics["up"]["block_loss_best"], rel=0.02)


@pytest.mark.parametrize("grid", ["q2_k", "q3_k", "q5_1"])
def test_a_record_of_a_type_of_ggml_is_the_matrix_that_was_trained(grid: str) -> None:
    given, rtn = wide_problem(), QUANTIZE["rtn"]
    config = rtn.config(grid=grid, **as_settings(grid))
    record, _ = rtn.function(given.weights["up"], given.targets["up"], given.statistics["up"], config)
    latent = Latent.of(record, given.targets["up"])
    assert torch.equal(latent.record().dense(), record.dense())
    assert torch.allclose(latent.effective(), record.dense(), atol=1e-6)
    generator = torch.Generator().manual_seed(5)
    latent.offset_OI = torch.randn(latent.u_OI.shape, generator=generator).requires_grad_(True)
    latent.range_OG = (torch.randn(latent.range_OG.shape, generator=generator) * 0.1).requires_grad_(True)
    assert latent.range_OG.shape == record.base.super_scales.shape
    assert torch.allclose(latent.record().dense(), latent.effective(), rtol=1e-3, atol=1e-3)  # d and m in float16
    weights = torch.randn(256, 256, generator=generator)
    (actual,) = torch.autograd.grad((latent.effective() * weights).sum(), [latent.range_OG])
    per_block = (latent.effective().detach() * weights).view(256, actual.shape[1], -1).sum(-1) / (1 + latent.range_OG.detach())
    assert torch.allclose(actual, per_block, atol=1e-3)


def problem_weights(given: BlockProblem, name: str) -> StoredWeight:
    return StoredWeight(DenseWeight(given.targets[name]))


def wide_problem() -> BlockProblem:
    """`problem` with matrices as wide as a super-block."""
    generator = torch.Generator().manual_seed(1)
    targets = {"up": torch.randn(256, 256, generator=generator) * 0.1, "down": torch.randn(256, 256, generator=generator) * 0.1}
    inputs = torch.randn(4, 16, 256, generator=generator) * (1 + 5 * (torch.arange(256) % 7 == 0))

    def forward(matrices: dict[str, Tensor], x: Tensor) -> Tensor:
        return x + torch.nn.functional.silu(x @ matrices["up"].T) @ matrices["down"].T

    statistics = {name: InputStatistics(256, frozenset({"second_moment"})) for name in targets}
    statistics["up"].update(inputs)
    statistics["down"].update(torch.nn.functional.silu(inputs @ targets["up"].T))
    weights = {name: StoredWeight(DenseWeight(w)) for name, w in targets.items()}
    layers = {name: LayerStatistics(actual) for name, actual in statistics.items()}
    return BlockProblem(weights, targets, forward, inputs, forward(targets, inputs), layers, 0, (("up",), ("down",)))


def test_a_flat_group_does_not_train() -> None:
    given = wide_problem()
    codes, small = torch.zeros(256, 256, dtype=torch.uint8), torch.zeros(256, 1, 32, dtype=torch.uint8)
    flat = StoredWeight(GgmlWeight.from_codes(codes, torch.ones(256, 1), torch.ones(256, 1), small, "q2_k"))
    with pytest.raises(ValueError, match="up: start=stored needs a uniform grid with contiguous groups, or a type of ggml without flat groups"):
        config = QUANTIZE["learned_rounding"].config(start="stored", steps=1)
        QUANTIZE["learned_rounding"].function(replace(given, weights={"up": flat, "down": flat}), dict.fromkeys(given.weights, config))
