"""lowbit_matmul_up: integer products against float64, with the low-rank term and bias; both kernels, equal runs, refusals."""

from collections.abc import Callable

import pytest
import torch
from bitmend.compress.activation_grid import dequantize_activations
from bitmend.compress.integer_scales import with_integer_scales
from bitmend.compress.weights import NormalFloatWeight, UniformWeight
from bitmend.kernels import lowbit_matmul_up as module
from bitmend.kernels import reference
from bitmend.kernels.layout import tile
from bitmend.kernels.lowbit_matmul_up import CANDIDATES, HOPPERS, LEVELS, TWO_LEVELS, candidates_for, lowbit_matmul_up
from bitmend.kernels.quantize_down import quantize_down
from bitmend.kernels.tuning import Blocks


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("activation_bits", [4, 8])
@pytest.mark.parametrize("bits, group, symmetric", [(4, 64, False), (3, 64, False), (4, 64, True), (4, 32, False), (2, 192, False)])
def test_products_are_exact_up_to_one_rounding(
    bits: int,
    group: int,
    symmetric: bool,
    activation_bits: int,
    dtype: torch.dtype,
    device: str,
    uniform: Callable[..., UniformWeight],
    within_budget: Callable[..., None],
) -> None:
    for rows in (1, 19):
        weight = tile(uniform(50, 192, bits, group, symmetric)).to(device)
        x, down, up = torch.randn(rows, 192), torch.randn(24, 192) / 14, torch.randn(50, 24) / 5
        x, down, up, bias = x.to(dtype).to(device), down.to(dtype).to(device), up.to(dtype).to(device), torch.randn(50, device=device)
        codes, scales, h = quantize_down(x, None, down, bits=activation_bits)
        y = lowbit_matmul_up(codes, scales, weight, h, up, bias, dtype=dtype)
        inner = dequantize_activations(codes, scales, 64, torch.float64)
        truth = reference.weight_only_matmul_up(inner, weight, None if h is None else h.double(), up, bias, compute=torch.float64)
        eager = inner.to(dtype) @ weight.dense(dtype).t() + (x @ down.t()) @ up.t() + bias.to(dtype)
        within_budget(y, eager, truth)


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of two levels alone, in steps of one fragment and more."""
    monkeypatch.setattr(module, "candidates_for", lambda weight, bucket, whole, _: (Blocks(32, 32, way=LEVELS, slots=2 if whole else 4),))


@pytest.mark.usefixtures("poisoned", "levels")
@pytest.mark.parametrize(
    "bits, group, symmetric, lanes, x_group",
    [(4, 64, False, 64, -1), (4, 64, False, 64, 64), (4, 64, False, 64, 128), (3, 64, False, 32, -1), (4, 32, True, 32, 64), (4, 16, False, 16, -1),
     (2, 192, False, 64, 64)],
)  # fmt: skip
def test_two_levels_are_the_same_product(
    bits: int, group: int, symmetric: bool, lanes: int, x_group: int, device: str, uniform: Callable[..., UniformWeight], within_budget: Callable[..., None]
) -> None:
    """Exact but for the last rounding: against float64, against its twin by whole numbers, against the kernel of float scales."""
    dtype = torch.float16 if x_group == 64 else torch.float32
    weight = tile(with_integer_scales(uniform(50, 192, bits, group, symmetric)), lanes).to(device)
    for rows in (1, 35):
        x, down, up = torch.randn(rows, 192), torch.randn(24, 192) / 14, torch.randn(50, 24) / 5
        x, down, up, bias = x.to(dtype).to(device), down.to(dtype).to(device), up.to(dtype).to(device), torch.randn(50, device=device)
        codes, scales, h = quantize_down(x, None, down, group_size=x_group if x_group < 128 else -1)
        if x_group == 128:
            scales = torch.rand(rows, 2, device=device)
        y = lowbit_matmul_up(codes, scales, weight, h, up, bias, group_size=x_group, dtype=dtype)
        inner = dequantize_activations(codes, scales, x_group, torch.float64)
        truth = reference.weight_only_matmul_up(inner, weight, None if h is None else h.double(), up, bias, compute=torch.float64)
        within_budget(y, inner.to(dtype) @ weight.dense(dtype).t() + (x @ down.t()) @ up.t() + bias.to(dtype), truth)
        twin = reference.two_level_matmul_up(codes, scales, weight, h, up, bias, group_size=x_group, dtype=torch.float64)
        torch.testing.assert_close(twin, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("poisoned", "levels")
def test_two_levels_of_the_widest_range_and_odd_shapes(device: str, within_budget: Callable[..., None]) -> None:
    """A group that uses 15 alone around a zero point of 15 or 14 may take 127 times the output's float, one that uses all codes 8 times."""
    codes_OI = torch.randint(14, 16, (33, 200))
    codes_OI[:, 40:80] = torch.randint(0, 16, (33, 40))
    zeros = torch.full((33, 5), 15)
    scales = torch.tensor([127.0, 8.0, 3.0, 64.0, 1.0]).expand(33, 5) * (2.0 ** -torch.arange(33)).clamp(min=2**-12).unsqueeze(1)
    whole = UniformWeight.from_codes(codes_OI[:, :77], (127 * scales[:, 4:]).half(), torch.full((33, 1), 15), 4, -1)
    wide = UniformWeight.from_codes(codes_OI.repeat_interleave(2, 1)[:, :400], scales.half(), zeros, 4, 80)
    for made in (tile(whole), tile(wide)):
        weight = made.to(device)
        assert weight.two_levels is not None
        x = torch.randn(5, weight.in_features, device=device)
        inputs, x_scales, _ = quantize_down(x, group_size=-1)
        inner = dequantize_activations(inputs, x_scales, -1, torch.float64)
        truth = reference.weight_only_matmul_up(inner, weight, compute=torch.float64)
        y = lowbit_matmul_up(inputs, x_scales, weight, group_size=-1, dtype=torch.float32)
        within_budget(y, inner.float() @ weight.dense().t(), truth)


@pytest.mark.usefixtures("levels")
def test_two_levels_agree_to_the_bit_with_segments(device: str, uniform: Callable[..., UniformWeight]) -> None:
    weight = tile(with_integer_scales(uniform(70, 192))).to(device)
    up, segments = torch.randn(70, 16, device=device), ((0, 30, 16, 8), (30, 40, 0, 16))
    codes, scales, h = quantize_down(torch.randn(21, 192, device=device), None, torch.randn(24, 192, device=device), group_size=-1)
    assert h is not None
    y, again = (lowbit_matmul_up(codes, scales, weight, h, up, group_size=-1, segments=segments, dtype=torch.float32) for _ in range(2))
    assert torch.equal(y, again)
    scattered = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (codes, h)]
    assert torch.equal(y, lowbit_matmul_up(scattered[0], scales, weight, scattered[1], up, group_size=-1, segments=segments, dtype=torch.float32))
    twin = reference.two_level_matmul_up(codes, scales, weight, h, up, group_size=-1, segments=segments)
    torch.testing.assert_close(y, twin, rtol=1e-5, atol=1e-5)


def test_two_levels_are_a_candidate_where_the_scales_are_exact(uniform: Callable[..., UniformWeight]) -> None:
    """Never a rounding that nobody measured: of a grid of float scales no product is one of whole numbers."""
    plain = tile(uniform(70, 192))
    assert plain.two_levels is None and candidates_for(plain, 128, True, (9, 0)) == candidates_for(plain, 4096, False, (9, 0)) == CANDIDATES
    with pytest.raises(ValueError, match="no whole numbers times one float"):
        reference.two_level_matmul_up(torch.zeros(1, 192, dtype=torch.int8), torch.ones(1, 3), plain)
    exact = tile(with_integer_scales(uniform(70, 192)))
    assert candidates_for(exact, 256, True, (8, 0))[0] == TWO_LEVELS[0] and candidates_for(exact, 256, False, (8, 0))[0] == CANDIDATES[0]
    assert [candidates_for(exact, bucket, True, (9, 0))[0].m for bucket in (16, 32, 64, 128, 4096)] == [16, 32, 64, 128, 128]
    assert all(set(candidates_for(exact, 16, whole, (8, 9))) == {*CANDIDATES, *TWO_LEVELS} for whole in (True, False))
    assert set(candidates_for(exact, 64, True, (9, 0))) == {*CANDIDATES, *TWO_LEVELS, *HOPPERS}
    held = sum(t.numel() * t.element_size() for t in exact.two_levels or ())
    assert exact.resident_bytes() == plain.resident_bytes() + held, "what it keeps is counted"
    object.__setattr__(exact, "in_features", module.MOST_INPUTS + 1)
    assert candidates_for(exact, 128, True, (9, 0)) == CANDIDATES


def test_segments_and_no_low_rank(device: str, uniform: Callable[..., UniformWeight]) -> None:
    weight = tile(uniform(70, 128)).to(device)
    x, up, h = torch.randn(5, 128, device=device), torch.randn(70, 16, device=device), torch.randn(2, 5, 24, device=device)
    codes, scales, _ = quantize_down(x)
    base = reference.lowbit_matmul_up(codes, scales, weight)
    torch.testing.assert_close(lowbit_matmul_up(codes, scales, weight, dtype=torch.float32), base, rtol=1e-5, atol=1e-5)
    y = lowbit_matmul_up(codes, scales, weight, h, up, segments=((0, 30, 16, 8), (30, 40, 0, 16)), dtype=torch.float32)
    total = h.sum(0)
    expected = base + torch.cat((total[:, 16:] @ up[:30, :8].t(), total[:, :16] @ up[30:].t()), dim=1)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rank", [8, 40, 256])
@pytest.mark.parametrize("out, inputs, group", [(33, 200, -1), (1, 77, 77), (130, 96, 32)])
def test_ranks_and_odd_shapes(
    rank: int, out: int, inputs: int, group: int, device: str, uniform: Callable[..., UniformWeight], within_budget: Callable[..., None]
) -> None:
    weight = tile(uniform(out, inputs, 4, group)).to(device)
    x, down, up = torch.randn(3, inputs), torch.randn(rank, inputs) / inputs**0.5, torch.randn(out, rank) / rank**0.5
    x, down, up = (t.half().to(device) for t in (x, down, up))
    codes, scales, h = quantize_down(x, None, down)
    inner = dequantize_activations(codes, scales, 64, torch.float64)
    truth = reference.weight_only_matmul_up(inner, weight, x.double() @ down.double().t(), up, compute=torch.float64)
    eager = inner.half() @ weight.dense(torch.float16).t() + (x @ down.t()) @ up.t()
    within_budget(lowbit_matmul_up(codes, scales, weight, h, up, dtype=torch.float16), eager, truth)


def test_bfloat16_is_rounded_once(device: str, uniform: Callable[..., UniformWeight]) -> None:
    weight = tile(uniform(40, 128)).to(device)
    codes, scales, h = quantize_down(torch.randn(5, 128, device=device).bfloat16(), None, torch.randn(8, 128, device=device).bfloat16())
    up = torch.randn(40, 8, device=device).bfloat16()
    y = lowbit_matmul_up(codes, scales, weight, h, up, dtype=torch.bfloat16)
    expected = reference.lowbit_matmul_up(codes, scales, weight, None if h is None else h.sum(0), up)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=2**-7, atol=2**-7)


def test_strides_do_not_matter_and_runs_agree_to_the_bit(device: str, uniform: Callable[..., UniformWeight]) -> None:
    weight, up, bias = tile(uniform(70, 192)).to(device), torch.randn(70, 8, device=device), torch.randn(140, device=device)[::2]
    codes, scales, h = quantize_down(torch.randn(21, 192, device=device), None, torch.randn(8, 192, device=device))
    assert h is not None
    first = lowbit_matmul_up(codes, scales, weight, h, up, bias.contiguous())
    scattered = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (codes, scales, h)]
    assert not any(t.is_contiguous() for t in scattered)
    assert torch.equal(first, lowbit_matmul_up(codes, scales, weight, h, up, bias.contiguous()))
    assert torch.equal(first, lowbit_matmul_up(scattered[0], scattered[1], weight, scattered[2], up.t().contiguous().t(), bias))


def test_refusals_name_the_argument(
    device: str, uniform: Callable[..., UniformWeight], normal_float: Callable[..., NormalFloatWeight]
) -> None:
    base = uniform(48, 128)
    weight = tile(base).to(device)
    codes, scales, _ = quantize_down(torch.randn(3, 128, device=device))
    floating = UniformWeight.from_codes(base.codes_OI(), base.scales, base.zeros_OG() + 0.5, 4, 64)
    for bad, what in ((tile(uniform(48, 128, 8)), "8 bits"), (tile(normal_float(48, 128)), "code book"), (tile(floating), "floating zero")):
        with pytest.raises(ValueError, match=f"weight has .*{what}"):
            lowbit_matmul_up(codes, scales, bad.to(device))
    with pytest.raises(TypeError, match=r"codes is torch\.int32; expected torch\.int8"):
        lowbit_matmul_up(codes.int(), scales, weight)
    with pytest.raises(ValueError, match="scales has 1 columns; expected 2"):
        lowbit_matmul_up(codes, scales[:, :1], weight)
    with pytest.raises(ValueError, match="scales has 2 rows; expected 3"):
        lowbit_matmul_up(codes, scales[:2], weight)
    with pytest.raises(ValueError, match="group_size is 24"):
        lowbit_matmul_up(codes, torch.zeros(3, 6, device=device), weight, group_size=24)
    with pytest.raises(TypeError, match=r"dtype is torch\.int8"):
        lowbit_matmul_up(codes, scales, weight, dtype=torch.int8)
    with pytest.raises(ValueError, match="bias is on meta; expected"):
        lowbit_matmul_up(codes, scales, weight, bias=torch.zeros(48, device="meta"))
    with pytest.raises(ValueError, match="lora_up has rank 264"):
        lowbit_matmul_up(codes, scales, weight, torch.zeros(3, 264, device=device), torch.zeros(48, 264, device=device))
    with pytest.raises(ValueError, match="h has 8 ranks; lora_up and the segments need 16"):
        lowbit_matmul_up(codes, scales, weight, torch.zeros(3, 8, device=device), torch.zeros(48, 16, device=device))
