"""A right factor that several linears share: one parameter while all of them train, given up by those that stay behind."""

import torch
from bitmend.compress.decompose import Decomposition, decompose_shared
from bitmend.compress.grids import UniformGrid
from bitmend.compress.rounding import round_uniform
from bitmend.compress.sharing import settled
from bitmend.compress.statistics import InputStatistics, LayerStatistics
from bitmend.compress.weights import StoredWeight
from bitmend.recover.compressed_linear import CompressedLinear
from bitmend.recover.site import train_factors

NAMES = ("q", "k", "v")


def linears(factor_bits: int = 16) -> dict[str, CompressedLinear]:
    generator = torch.Generator().manual_seed(0)
    inputs = InputStatistics(32, frozenset({"second_moment"}))
    inputs.update(torch.randn(200, 32, generator=generator))
    targets = {name: torch.randn(24, 32, generator=generator) * 0.1 for name in NAMES}
    weights = {name: StoredWeight(round_uniform(target, UniformGrid(2, 32), "power")) for name, target in targets.items()}
    config = Decomposition(rank=4, shared=True, factor_bits=factor_bits)
    records, _ = decompose_shared(weights, targets, dict.fromkeys(NAMES, LayerStatistics(inputs)), config)
    return {name: CompressedLinear(record) for name, record in records.items()}


def step_(chosen: dict[str, CompressedLinear]) -> list[str]:
    """One step of gradient descent on what these train; the names of the parameters."""
    trainables = train_factors(chosen)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    torch.stack([linear(x).square().mean() for linear in chosen.values()]).sum().backward()
    for trainable in trainables.values():
        assert trainable.parameter.grad is not None
        trainable.parameter.data -= 0.1 * trainable.parameter.grad
    return list(trainables)


def test_all_of_them_train_one_parameter_that_stays_one() -> None:
    for factor_bits in (16, 8):
        chosen = linears(factor_bits)
        before = {name: linear.stored for name, linear in chosen.items()}
        what = "" if factor_bits == 16 else "_scales"
        assert step_(chosen) == [f"{name}{what}" for name in ("q.up", "q.down", "k.up", "v.up")]
        assert chosen["k"].down is chosen["q"].down and chosen["k"].down_scales is chosen["q"].down_scales
        after = {name: linear.to_stored()[0] for name, linear in chosen.items()}
        assert not torch.equal(after["k"].dense(), before["k"].dense())
        assert all(settled(after)[name] is record for name, record in after.items())
        assert sum(r.stored_bits() for r in after.values()) == sum(r.stored_bits() for r in before.values())


def test_those_that_stay_behind_keep_the_old_factor_and_count_it() -> None:
    every = linears()
    before = {name: linear.stored for name, linear in every.items()}
    assert step_({"q": every["q"]}) == ["q.up", "q.down"]
    after = settled({name: linear.to_stored()[0] for name, linear in every.items()})
    for name in ("k", "v"):
        assert torch.equal(after[name].dense(), before[name].dense())
        low_rank = after[name].low_rank
        assert low_rank is not None and low_rank.shared is None
        assert after[name].stored_bits() == before[name].stored_bits() + 4 * 32 * 16


def test_without_the_holder_each_trains_its_own() -> None:
    every = linears()
    assert step_({name: every[name] for name in ("k", "v")}) == ["k.up", "k.down", "v.up", "v.down"]
    after = settled({name: linear.to_stored()[0] for name, linear in every.items()})
    assert [term.shared for record in after.values() if (term := record.low_rank) is not None] == [None, None, None]
