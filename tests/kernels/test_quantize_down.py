"""quantize_down: the reference's codes, the raw input projected, equal runs, refusals."""

import pytest
import torch
from bitmend.compress.activation_grid import dequantize_activations, fake_quantize
from bitmend.kernels import reference
from bitmend.kernels.quantize_down import quantize_down

DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if torch.cuda.is_available() else [])]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows, inputs", [(1, 128), (19, 200), (3, 77), (33, 192)])
def test_codes_scales_and_h_are_the_references(rows: int, inputs: int, bits: int, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(rows, inputs, device=device).to(dtype)
    x[0, :64] = 0
    smooth, down = torch.rand(inputs, device=device) + 0.5, (torch.randn(24, inputs, device=device) / inputs**0.5).to(dtype)
    codes, scales, h = quantize_down(x, smooth, down, bits=bits)
    expected, expected_scales, expected_h = reference.quantize_down(x, smooth, down, bits)
    assert codes.dtype == torch.int8 and scales.shape == (rows, -(-inputs // 64)) and h is not None and h.dim() == 3
    assert expected_h is not None and int(codes.abs().max()) == (1 << (bits - 1)) - 1, "the largest of a group takes the largest code"
    moved = (codes.int() - expected.int()).abs()
    assert int(moved.max()) <= 1 and moved.float().mean() <= (0.0 if device == "cpu" else 1e-3), "on a card a tie may fall the other way"
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    torch.testing.assert_close(h.sum(0), expected_h, rtol=1e-5, atol=1e-5)
    assert not codes[0, :64].any() and scales[0, 0] == 0, "a group of zeros is zeros"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rank", [8, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ranks(rank: int, dtype: torch.dtype, device: str) -> None:
    x, down = torch.randn(5, 200, device=device).to(dtype), (torch.randn(rank, 200, device=device) / 14).to(dtype)
    codes, _, h = quantize_down(x, None, down)
    expected, _, expected_h = reference.quantize_down(x, None, down)
    assert h is not None and expected_h is not None and h.shape[1:] == (5, rank)
    torch.testing.assert_close(h.sum(0), expected_h, rtol=1e-5, atol=1e-5)
    assert int((codes.int() - expected.int()).abs().max()) <= 1


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rows, inputs", [(1, 77), (19, 200)])
def test_one_scale_a_token(rows: int, inputs: int, device: str) -> None:
    x, smooth = torch.randn(inputs, rows, device=device).half().t(), torch.rand(inputs, device=device) + 0.5
    x[0] = 0
    down = (torch.randn(24, inputs, device=device) / inputs**0.5).half()
    codes, scales, h = quantize_down(x, smooth, down, group_size=-1)
    expected, expected_scales, expected_h = reference.quantize_down(x, smooth, down, group_size=-1)
    assert scales.shape == (rows, 1) and h is not None and expected_h is not None and not codes[0].any() and scales[0] == 0
    assert int((codes.int() - expected.int()).abs().max()) <= (device != "cpu")
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    torch.testing.assert_close(h.sum(0), expected_h, rtol=1e-5, atol=1e-5)
    for a, b in zip((codes, scales, h), quantize_down(x.contiguous(), smooth, down, group_size=-1), strict=True):
        assert b is not None and torch.equal(a, b)


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_rounding_errs_by_half_a_step(group_size: int, device: str) -> None:
    x = torch.randn(5, 256, device=device)
    codes, scales, h = quantize_down(x, bits=8, group_size=group_size)
    assert h is None
    step = scales.repeat_interleave(256 if group_size == -1 else group_size, dim=1)
    assert bool(((codes * step - x).abs() <= step / 2 * 1.001).all())
    torch.testing.assert_close(dequantize_activations(codes, scales, group_size), fake_quantize(x, 8, group_size))


def test_strides_do_not_matter_and_runs_agree_to_the_bit(device: str) -> None:
    x, down = torch.randn(192, 40, device=device).half().t(), torch.randn(8, 192, device=device).half()
    smooth = torch.rand(384, device=device)[::2] + 0.5
    first, again, dense = (quantize_down(a, s, down) for a, s in ((x, smooth), (x, smooth), (x.contiguous(), smooth.contiguous())))
    for a, b, c in zip(first, again, dense, strict=True):
        assert a is not None and b is not None and c is not None and torch.equal(a, b) and torch.equal(a, c)


def test_refusals_name_the_argument(device: str) -> None:
    x = torch.randn(2, 64, device=device)
    with pytest.raises(ValueError, match=r"smooth has shape \(63,\)"):
        quantize_down(x, torch.ones(63, device=device))
    with pytest.raises(ValueError, match="lora_down has 60 columns; expected 64"):
        quantize_down(x, None, torch.ones(8, 60, device=device))
    with pytest.raises(ValueError, match="lora_down has rank 264"):
        quantize_down(x, None, torch.ones(264, 64, device=device))
    with pytest.raises(ValueError, match="bits is 6"):
        quantize_down(x, bits=6)
    with pytest.raises(ValueError, match="group_size is 48"):
        quantize_down(x, group_size=48)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        quantize_down(x.double())
    with pytest.raises(ValueError, match="lora_down is on meta"):
        quantize_down(x, None, torch.ones(8, 64, device="meta"))
