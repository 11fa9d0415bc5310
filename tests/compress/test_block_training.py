"""Training a block ends on the grid, inside the mask, and never above its start."""

from typing import Any

import pytest
import torch
from bitmend.compress.block import BlockProblem
from bitmend.compress.methods import QUANTIZE
from bitmend.compress.statistics import InputStatistics, LayerStatistics
from bitmend.compress.weights import DenseWeight, StoredWeight, UniformWeight
from torch import Tensor

METHODS = ("learned_rounding", "block_training")


def problem(masked: bool = False, seed: int = 0) -> BlockProblem:
    """A two-layer perceptron as the block: up [64, 32], down [32, 64], inputs with a few loud channels."""
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
    layers = {name: LayerStatistics(found) for name, found in statistics.items()}
    return BlockProblem(weights, targets, forward, inputs, forward(targets, inputs), layers, seed)


def solve(method: str, given: BlockProblem, **settings: Any) -> tuple[dict[str, StoredWeight], dict[str, dict[str, float]]]:
    config = QUANTIZE[method].config(**{"bits": 3, "group_size": 16, "steps": 40, **settings})
    return QUANTIZE[method].function(given, dict.fromkeys(given.weights, config))


def loss(given: BlockProblem, records: dict[str, StoredWeight]) -> float:
    out = given.forward({n: r.dense() for n, r in records.items()}, given.inputs_NTD)
    return float((out - given.outputs_NTD).square().mean())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", ["gptq", "rtn"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lower_loss_than_its_start_on_an_ordinary_grid(method: str, start: str, bits: int) -> None:
    given = problem()
    plain = {
        n: QUANTIZE[start].function(
            given.weights[n], given.targets[n], given.statistics[n], QUANTIZE[start].config(bits=bits, group_size=16)
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


def test_the_first_iterate_is_gptqs() -> None:
    """Zero rates: the latents must hold GPTQ's codes, also where those are not the nearest ones."""
    given = problem()
    config = QUANTIZE["gptq"].config(bits=3, group_size=16)
    plain = {n: QUANTIZE["gptq"].function(given.weights[n], given.targets[n], given.statistics[n], config)[0] for n in given.weights}
    records, _ = solve("block_training", given, steps=1, learning_rate=0.0, scale_rate=1e-12)
    for name in plain:
        found, expected = records[name].base, plain[name].base
        assert isinstance(found, UniformWeight) and isinstance(expected, UniformWeight)
        assert torch.equal(found.codes_OI(), expected.codes_OI())


def test_stored_start_wants_a_grid() -> None:
    with pytest.raises(ValueError, match="start=stored needs a uniform grid"):
        solve("block_training", problem(), start="stored")
    given = problem()
    first, metrics = solve("learned_rounding", given, outliers=0.0)
    again = BlockProblem(first, given.targets, given.forward, given.inputs_NTD, given.outputs_NTD, given.statistics)
    second, more = solve("block_training", again, start="stored", outliers=0.0)
    assert more["up"]["block_loss_start"] == pytest.approx(metrics["up"]["block_loss_best"], rel=1e-4)
    assert loss(given, second) <= loss(given, first)
