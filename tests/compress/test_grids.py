"""Uniform grids: 0 is always on them, nothing inside the range errs by more than half a step, a clip search never makes it worse."""

from itertools import product

import pytest
import torch
from bitmend.compress import grids as grids_module
from bitmend.compress.grids import UniformGrid, fit, min_max, round_to_grid, search_clip, to_record
from hypothesis import given, settings
from hypothesis import strategies as st

grids = st.builds(UniformGrid, bits=st.sampled_from((2, 3, 4, 5, 6, 8)), group_size=st.just(-1), symmetric=st.booleans())


def dequantized(codes_OS, scale_O1, zero_O1):
    return (codes_OS - zero_O1) * scale_O1


def groups(seed: int, rows: int = 7, columns: int = 32, shift: float = 0.0, size: float = 1.0) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + shift) * size


@settings(max_examples=120, deadline=None)
@given(grid=grids, seed=st.integers(0, 2**20), shift=st.floats(-4, 4), size=st.sampled_from((0.02, 1.0, 300.0)))
def test_min_max_covers_the_range_within_half_a_step(grid, seed, shift, size):
    weight = groups(seed, shift=shift, size=size)
    scale, zero = min_max(weight, grid)
    assert torch.equal(scale, scale.half().float())
    assert torch.equal(zero, zero.round())
    assert bool((zero >= 1).all() and (zero <= grid.top).all())
    codes = round_to_grid(weight, scale, zero, grid)
    assert bool((codes >= 0).all() and (codes <= grid.top).all())
    error = (dequantized(codes, scale, zero) - weight).abs()
    # A symmetric grid has one level less above 0, and rounding the zero point shifts an asymmetric one by up to half a step more.
    assert bool((error <= scale * 1.02 + 1e-6 * size).all())
    inside = (codes > 0) & (codes < grid.top)
    assert bool((error <= scale * 0.501 + 1e-6 * size)[inside].all())
    assert bool((dequantized(round_to_grid(torch.zeros_like(weight), scale, zero, grid), scale, zero) == 0).all())


@settings(max_examples=60, deadline=None)
@given(grid=grids, seed=st.integers(0, 2**20), shift=st.floats(-2, 2))
def test_a_clip_search_is_never_worse_than_the_whole_range(grid, seed, shift):
    weight = groups(seed, shift=shift)
    importance = torch.rand(32, generator=torch.Generator().manual_seed(seed)) ** 4

    def lost(actual, power, weights):
        scale, zero = actual
        return ((dequantized(round_to_grid(weight, scale, zero, grid), scale, zero) - weight).abs().pow(power) * weights).sum(-1)

    slack = 1 + 1e-5
    assert bool((lost(fit(weight, grid, "power"), 2.4, 1) <= lost(min_max(weight, grid), 2.4, 1) * slack).all())
    weighted = fit(weight, grid, "hessian", importance)
    assert bool((lost(weighted, 2.0, importance) <= lost(min_max(weight, grid), 2.0, importance) * slack).all())


KINDS = ({}, {"symmetric": True}, {"float_zeros": True})


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from((2, 3, 4, 5, 6, 8)), kind=st.sampled_from(KINDS), seed=st.integers(0, 2**20), shift=st.floats(-2, 2))
def test_every_search_is_at_least_as_good_as_the_one_it_begins_with(bits, kind, seed, shift):
    grid, weight = UniformGrid(bits, -1, **kind), groups(seed, shift=shift)
    importance = torch.rand(32, generator=torch.Generator().manual_seed(seed)) ** 4

    def lost(clip):
        scale, zero = fit(weight, grid, clip, importance)
        assert torch.equal(scale, scale.half().float()) and torch.equal(zero, zero.half().float())
        codes = round_to_grid(weight, scale, zero, grid)
        assert bool((codes >= 0).all() and (codes <= grid.top).all())
        return ((dequantized(codes, scale, zero) - weight).square() * importance).sum(-1)

    slack = 1 + 1e-5
    joint, hessian = lost("joint"), lost("hessian")
    assert bool((joint <= hessian * slack).all())
    assert bool((hessian <= lost("power") * slack).all() and (hessian <= lost("none") * slack).all())


@pytest.mark.parametrize("bits", [2, 3])
def test_the_joint_search_comes_near_trying_everything(bits):
    grid, weight = UniformGrid(bits, -1), groups(4, rows=40, columns=64)
    importance = torch.rand(64, generator=torch.Generator().manual_seed(1)) ** 4

    def lost(scale, zero):
        return ((dequantized(round_to_grid(weight, scale, zero, grid), scale, zero) - weight).square() * importance).sum(-1)

    whole, _ = min_max(weight, grid)
    tried = [
        lost(whole * share, torch.full_like(whole, float(zero)))
        for share in torch.linspace(0.3, 1.1, 80).tolist()
        for zero in range(1, grid.top + 1)
    ]
    least = torch.stack(tried).amin(0)
    joint, clipped = (lost(*fit(weight, grid, clip, importance)) for clip in ("joint", "hessian"))
    assert joint.sum() < 1.02 * least.sum()
    assert joint.sum() < 0.95 * clipped.sum()


@pytest.mark.parametrize("symmetric", [False, True])
def test_all_groups_at_once_equal_one_by_one(symmetric):
    grid = UniformGrid(3, 16, symmetric)
    weight = groups(3, rows=40, columns=96).view(40, 6, 16)
    importance = torch.rand(6, 16)
    for clip in ("hessian", "joint"):
        scale, zero = fit(weight, grid, clip, importance)
        for group in range(6):
            one_scale, one_zero = fit(weight[:, group], grid, clip, importance[group])
            assert torch.equal(scale[:, group], one_scale)
            assert torch.equal(zero[:, group], one_zero)


def test_pieces_of_rows_and_groups_change_nothing(monkeypatch):
    weight, pieces = groups(5, rows=50, columns=192).view(50, 3, 64), []
    whole = search_clip(weight, UniformGrid(4, 64))
    plain = grids_module._Search._lost
    monkeypatch.setattr(grids_module._Search, "_lost", lambda self, part, *rest: pieces.append(part.shape) or plain(self, part, *rest))
    monkeypatch.setattr(grids_module, "_ROWS", 7)
    for chunk, expected in ((200, 8 * 3), (64 * 50 * 2, 2)):
        pieces.clear()
        monkeypatch.setattr(grids_module, "_CHUNK", chunk)
        actual = search_clip(weight, UniformGrid(4, 64))
        assert len(pieces) == expected and torch.equal(whole[0], actual[0]) and torch.equal(whole[1], actual[1])


@pytest.mark.parametrize("size", [32, 64, 96])
def test_what_a_row_loses_does_not_hang_on_its_neighbours(size):
    """`sum(1)` adds the last rows, those that fill no register, in an order of their own."""
    terms = torch.rand(2, size, 77, generator=torch.Generator().manual_seed(size))
    whole = grids_module._group_sum_(terms.clone())
    for first, last in ((0, 1), (40, 77), (3, 67)):
        assert torch.equal(whole[:, :, first:last], grids_module._group_sum_(terms[:, :, first:last].clone()))
    assert torch.allclose(whole, terms.sum(1, keepdim=True)) and not torch.equal(whole, terms.sum(1, keepdim=True))


def test_a_one_sided_group_uses_all_codes_but_0():
    weight = torch.linspace(0, 1, 16).view(1, 16)
    grid = UniformGrid(2, -1)
    scale, zero = min_max(weight, grid)
    assert zero.item() == 1
    assert dequantized(torch.tensor([[float(grid.top)]]), scale, zero).item() == pytest.approx(1.0, rel=1e-3)
    assert set(round_to_grid(weight, scale, zero, grid).view(-1).tolist()) == {1.0, 2.0, 3.0}


@pytest.mark.parametrize("weight", [torch.zeros(2, 8), torch.full((2, 8), 1e-30), torch.full((2, 8), 3e7)])
def test_scales_stay_storable(weight):
    for kind, clip in product(KINDS, ("power", "joint")):
        grid = UniformGrid(4, -1, **kind)
        scale, zero = fit(weight, grid, clip, torch.ones(8))
        assert bool((scale > 0).all() and torch.isfinite(scale.half()).all() and torch.isfinite(zero).all())
        assert bool(torch.isfinite(dequantized(round_to_grid(weight, scale, zero, grid), scale, zero)).all())


def test_the_record_says_what_the_grid_says():
    grid, weight = UniformGrid(3, 8), groups(1, rows=4, columns=24).view(4, 3, 8)
    scale, zero = fit(weight, grid, "none")
    codes = round_to_grid(weight, scale, zero, grid)
    record = to_record(codes.view(4, 24), scale.squeeze(-1), zero.squeeze(-1), grid)
    assert torch.equal(record.dense(), dequantized(codes, scale, zero).view(4, 24))
    assert not record.symmetric
    assert to_record(codes.view(4, 24), scale.squeeze(-1), zero.squeeze(-1), UniformGrid(3, 8, symmetric=True)).symmetric


def test_a_record_with_float_zeros_holds_them_in_sixteen_bits():
    grid, weight = UniformGrid(3, 8, float_zeros=True), groups(1, rows=4, columns=24, shift=0.3).view(4, 3, 8)
    scale, zero = fit(weight, grid, "joint", torch.ones(3, 8))
    codes = round_to_grid(weight, scale, zero, grid)
    record = to_record(codes.view(4, 24), scale.squeeze(-1), zero.squeeze(-1), grid)
    assert torch.equal(record.dense(), dequantized(codes, scale, zero).view(4, 24))
    assert record.float_zeros and record.zeros is not None and record.zeros.dtype == torch.float16
    assert record.stored_bits() == 4 * 32 * 3 + 4 * 3 * (16 + 16)


def test_what_cannot_be_is_refused():
    with pytest.raises(
        ValueError, match=r"in_features 96 is not a multiple of group_size 64; choose one of \[8, 12, 16, 24, 32, 48, 96\] or -1"
    ):
        UniformGrid(4, 64).size(96)
    assert UniformGrid(4, -1).size(96) == 96
    with pytest.raises(ValueError, match="needs the second moment's diagonal"):
        fit(groups(0), UniformGrid(4, -1), "hessian")
