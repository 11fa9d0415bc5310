"""One right factor for matrices that read one input: the exact optimum of the stack, stored and counted once, given up when it is no longer true."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from bitmend.compress.decompose import decompose, decompose_shared
from bitmend.compress.factors import FactorForm
from bitmend.compress.grids import UniformGrid
from bitmend.compress.lowrank import Metric, best_low_rank, squared_error
from bitmend.compress.methods import DECOMPOSE
from bitmend.compress.rounding import round_uniform
from bitmend.compress.sharing import SHARED, holder_of, own_tensors, settled
from bitmend.compress.statistics import Fisher, InputStatistics, LayerStatistics
from bitmend.compress.weights import LowRank, StoredWeight, UniformWeight, describe, from_tensors, to_tensors
from torch import Tensor

ROWS = {"q": 48, "k": 16, "v": 16}
COLUMNS = 64
SHARING = [name for name, row in DECOMPOSE.items() if row.solve_group is not None and name != "lq_lora"]


def targets() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(rows, COLUMNS, generator=generator) * 0.05 for name, rows in ROWS.items()}


def inputs() -> InputStatistics:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5 + torch.eye(COLUMNS)
    actual = InputStatistics(COLUMNS, frozenset({"absmean", "second_moment"}))
    actual.update(torch.randn(600, COLUMNS, generator=generator) @ mix * torch.logspace(-1, 0.5, COLUMNS))
    return actual


def shared(method: str = "qera_exact", **chosen: Any) -> tuple[dict[str, StoredWeight], dict[str, dict[str, float]]]:
    row, wanted, known = DECOMPOSE[method], targets(), LayerStatistics(inputs())
    weights = {name: StoredWeight(round_uniform(target, UniformGrid(3, 32), "power")) for name, target in wanted.items()}
    iterations = {"iterations": 2} if row.defaults.get("requantize") else {}
    config = row.config(**{**row.defaults, **iterations, "rank": 6, "shared": True, **chosen})
    assert row.solve_group is decompose_shared
    return row.solve_group(weights, wanted, dict.fromkeys(weights, known), config)


@pytest.mark.parametrize("method", SHARING)
def test_every_preset_shares_one_factor_and_stores_it_once(method: str) -> None:
    records, metrics = shared(method)
    terms = [record.low_rank for record in records.values() if record.low_rank is not None]
    assert [term.shared for term in terms] == [None, "q", "q"]
    first = terms[0].factors()[1]
    assert all(torch.equal(term.factors()[1], first) for term in terms)
    assert all(actual["relative_error"] < actual["relative_error_before"] for actual in metrics.values())
    form = FactorForm(16 if isinstance(terms[0].up, Tensor) else terms[0].up.bits)
    bits = sum(record.stored_bits() - record.base.stored_bits() for record in records.values())
    assert bits == form.stored_bits(terms[0].rank, sum(ROWS.values()), COLUMNS)


def test_the_factor_is_the_best_of_the_stack() -> None:
    records, _ = shared()
    wanted, metric = targets(), Metric(moment_II=inputs().second_moment_II)
    bases = {name: replace(record, low_rank=None).dense() for name, record in records.items()}
    error = torch.cat([wanted[name] - bases[name] for name in ROWS])
    best = squared_error(error - torch.mm(*best_low_rank(error, metric, 6)), metric)
    actual = sum(squared_error(wanted[name] - records[name].dense(), metric) for name in ROWS)
    assert actual == pytest.approx(best, rel=1e-3)  # factors in float16
    apart = sum(squared_error(wanted[n] - bases[n] - torch.mm(*best_low_rank(wanted[n] - bases[n], metric, 6)), metric) for n in ROWS)
    assert actual > apart


def test_alone_it_is_the_plain_decomposition() -> None:
    wanted, known = targets()["q"], LayerStatistics(inputs())
    weight = StoredWeight(round_uniform(wanted, UniformGrid(3, 32), "power"))
    config = DECOMPOSE["best"].config(**{**DECOMPOSE["best"].defaults, "rank": 6, "shared": True})
    grouped, _ = decompose_shared({"q": weight}, {"q": wanted}, {"q": known}, config)
    alone, _ = decompose(weight, wanted, known, replace(config, shared=False))
    one, other = to_tensors(grouped["q"]), to_tensors(alone)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_stored_comes_back_with_the_holders_factor() -> None:
    for method in ("qera_exact", "caldera"):
        records, _ = shared(method)
        tensors = {name: own_tensors(record) for name, record in records.items()}
        assert any(n.startswith(SHARED) for n in tensors["q"]) and not any(n.startswith(SHARED) for n in tensors["k"])
        description = describe(records["k"])
        assert holder_of(describe(records["q"])) is None and holder_of(description) == "q"
        actual = from_tensors(description, tensors["k"] | {n: t for n, t in tensors["q"].items() if n.startswith(SHARED)})
        assert torch.equal(actual.dense(), records["k"].dense())
        assert torch.equal(records["k"].to("cpu").dense(), actual.dense())


@pytest.mark.parametrize("method", ["qera_exact", "caldera"])
def test_a_claim_that_no_longer_holds_is_given_up_and_counted(method: str) -> None:
    records, _ = shared(method)
    assert all(settled(records)[name] is record for name, record in records.items())
    held = records["q"].low_rank
    assert held is not None
    down = held.down * 2 if isinstance(held.down, Tensor) else replace(held.down, scales=held.down.scales * 2)
    moved = records | {"q": replace(records["q"], low_rank=LowRank(held.up, down))}
    for others in (moved, {n: r for n, r in records.items() if n != "q"}, records | {"q": replace(records["q"], low_rank=None)}):
        actual = settled(others)
        for name in ("k", "v"):
            low_rank = actual[name].low_rank
            assert low_rank is not None and low_rank.shared is None
            assert actual[name].stored_bits() > records[name].stored_bits()
            assert torch.equal(actual[name].dense(), records[name].dense())


def test_factors_on_a_grid_are_cut_by_rows() -> None:
    records, _ = shared(factor_bits=4)
    stacked = torch.cat([record.low_rank.factors()[0] for record in records.values() if record.low_rank is not None])
    assert stacked.shape == (80, 6)
    for record in records.values():
        assert record.low_rank is not None and isinstance(record.low_rank.up, UniformWeight)


def test_what_cannot_be_shared_is_refused() -> None:
    generator = torch.Generator().manual_seed(2)
    known = LayerStatistics(inputs(), Fisher(torch.rand(48, generator=generator), torch.rand(COLUMNS, generator=generator)))
    weight, config = StoredWeight(round_uniform(targets()["q"], UniformGrid(3, 32), "power")), DECOMPOSE["lq_lora"].config
    with pytest.raises(ValueError, match="fisher weighs the columns of every matrix its own way"):
        decompose_shared({"q": weight}, {"q": targets()["q"]}, {"q": known}, config(metric="fisher", shared=True))
    with pytest.raises(ValueError, match="rank 65 does not fit a 80×64 matrix"):
        shared(rank=65)
