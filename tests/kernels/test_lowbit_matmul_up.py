"""lowbit_matmul_up: integer products against float64, with the low-rank term and bias; equal runs, refusals."""

from collections.abc import Callable

import pytest
import torch
from bitmend.compress.weights import NormalFloatWeight, UniformWeight
from bitmend.kernels import reference
from bitmend.kernels.layout import tile
from bitmend.kernels.lowbit_matmul_up import lowbit_matmul_up
from bitmend.kernels.quantize_down import quantize_down


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
        inner = reference.dequantize_activations(codes, scales, 64, torch.float64)
        truth = reference.weight_only_matmul_up(inner, weight, None if h is None else h.double(), up, bias, compute=torch.float64)
        eager = inner.to(dtype) @ weight.dense(dtype).t() + (x @ down.t()) @ up.t() + bias.to(dtype)
        within_budget(y, eager, truth)


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


def test_runs_agree_to_the_bit(device: str, uniform: Callable[..., UniformWeight]) -> None:
    weight = tile(uniform(70, 192)).to(device)
    codes, scales, _ = quantize_down(torch.randn(21, 192, device=device))
    assert torch.equal(lowbit_matmul_up(codes, scales, weight), lowbit_matmul_up(codes, scales, weight))


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
    with pytest.raises(ValueError, match="h has 8 ranks; lora_up and the segments need 16"):
        lowbit_matmul_up(codes, scales, weight, torch.zeros(3, 8, device=device), torch.zeros(48, 16, device=device))
