"""Two levels of scales: what is made is exact and in range, near what it was, found again from the scales alone, and the same made once more."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from bitmend.compress.grids import UniformGrid, min_max, round_to_grid, to_record
from bitmend.compress.integer_scales import TOP, exact_levels, reach, refusal, with_integer_scales
from bitmend.compress.weights import DenseWeight, UniformWeight

Maker = Callable[..., UniformWeight]


def made(bits: int = 4, group: int = 32, symmetric: bool = False, out: int = 80, inputs: int = 192) -> UniformWeight:
    """Outputs of widths from a thousandth to a thousand, groups of widths that differ."""
    draw = torch.Generator().manual_seed(bits)
    weight = torch.randn(out, inputs, generator=draw) * torch.logspace(-4, 2, out).unsqueeze(1)
    weight *= torch.rand(out, inputs // group, generator=draw).add_(0.2).repeat_interleave(group, 1)
    weight[3] = 0
    grid = UniformGrid(bits, group, symmetric)
    rows = weight.view(-1, group)
    scale, zero = min_max(rows, grid)
    return to_record(round_to_grid(rows, scale, zero, grid).view(out, inputs), scale.view(out, -1), zero.view(out, -1), grid)


def levels(base: UniformWeight) -> tuple[torch.Tensor, torch.Tensor] | None:
    return exact_levels(base.scales, reach(base.codes_OI(), base.zeros_OG(), base.in_features // base.groups))


@pytest.mark.parametrize("bits, group, symmetric", [(4, 32, False), (4, 64, True), (3, 32, False), (2, 16, False)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_made_is_exact_within_a_byte_and_near(bits: int, group: int, symmetric: bool, dtype: torch.dtype) -> None:
    before = made(bits, group, symmetric)
    before = replace(before, scales=before.scales.to(dtype))
    assert levels(before) is None
    after = with_integer_scales(before)
    actual = levels(after)
    assert actual is not None
    k, c = actual
    assert torch.equal((k.double() * c.double().unsqueeze(1)), after.scales.double())
    whole = (after.codes_OI().double().view(*k.shape, group) - after.zeros_OG().double().unsqueeze(-1)) * k.double().unsqueeze(-1)
    assert whole.abs().max() <= TOP
    torch.testing.assert_close((whole * c.double().view(-1, 1, 1)).view(before.shape).float(), after.dense())
    assert (after.zeros is None) == symmetric and (after.zeros is None or torch.equal(after.zeros, before.zeros)), "zero points stay"
    assert with_integer_scales(after) is after
    moved = (after.dense() - before.dense()).view(*k.shape, group).norm(dim=-1) / before.dense().view(*k.shape, group).norm(dim=-1).clamp(
        min=1e-9
    )
    assert moved.median() < 0.08 and moved.max() < 0.5


def test_a_code_at_its_zero_point_stays_there() -> None:
    before = made()
    at_zero = before.codes_OI().float().view(80, -1, 32) == before.zeros_OG().unsqueeze(-1)
    after = with_integer_scales(before)
    assert bool(((after.codes_OI().float().view(80, -1, 32) == after.zeros_OG().unsqueeze(-1)) | ~at_zero).all()) and at_zero.any()


def test_the_search_is_no_worse_than_the_smallest_scale_in_range() -> None:
    """QServe's own choice: the widest group takes the largest whole number."""
    before = made()
    after = with_integer_scales(before)
    codes, zeros = before.codes_OI().float().view(80, -1, 32), before.zeros_OG()
    most = (TOP / reach(before.codes_OI(), zeros, 32)).floor()
    scales = before.scales.float()
    c = (scales / most).amax(1, keepdim=True)
    plain = (codes - zeros.unsqueeze(-1)) * (c * (scales / c).round().clamp(min=1).minimum(most)).unsqueeze(-1)
    ours, theirs = ((value.view(80, -1) - before.dense()).square().sum(1) for value in (after.dense(), plain))
    kept = torch.arange(80) >= 30  # smaller ones lie where float16 has few bits
    assert (ours / theirs)[kept].mean() < 0.9 and ours[kept].sum() < theirs[kept].sum()


def test_one_scale_an_output_is_exact_as_it_is() -> None:
    before = made(group=192)
    actual = levels(before)
    assert actual is not None and with_integer_scales(before) is before
    assert torch.equal(actual[1][actual[0][:, 0] == 1], before.scales.float()[actual[0][:, 0] == 1, 0])


def test_reasons_against() -> None:
    base = made()
    free = replace(base, zeros=base.zeros_OG() + 0.5)
    cases = {
        "a DenseWeight has no uniform grid": DenseWeight(torch.ones(2, 2)),
        "8 bits": made(8),
        "group_index scatters": replace(base, group_index=torch.arange(192, dtype=torch.int32) % 6),
        "no whole numbers": free,
        "negative scale": replace(base, scales=-base.scales),
    }
    assert refusal(base) == ""
    for words, case in cases.items():
        assert words in refusal(case)
    with pytest.raises(ValueError, match="no whole numbers"):
        with_integer_scales(free)
    assert levels(replace(base, scales=-base.scales)) is None
