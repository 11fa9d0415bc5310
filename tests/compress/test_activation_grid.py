import pytest
import torch
from bitmend.compress.activation_grid import dequantize_activations, fake_quantize, quantize_activations
from bitmend.compress.weights import ActivationGrid


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [128, 100])
def test_every_value_moves_by_half_a_step_at_most_and_the_largest_stays(bits: int, columns: int) -> None:
    x = torch.randn(33, columns, generator=torch.Generator().manual_seed(0))
    x[3], x[4, :64] = 0, 0
    codes, scales = quantize_activations(x, bits, 64)
    assert codes.dtype == torch.int8 and codes.shape == x.shape and scales.shape == (33, -(-columns // 64))
    back = dequantize_activations(codes, scales, 64)
    steps = scales.repeat_interleave(64, 1)[:, :columns]
    assert bool(((back - x).abs() <= steps * 0.5 + 1e-6).all())
    assert bool((back[3] == 0).all()) and bool((back[4, :64] == 0).all())
    torch.testing.assert_close(back[:, :64].abs().amax(1), x[:, :64].abs().amax(1))


def test_halves_go_away_from_zero() -> None:
    x = torch.tensor([[7.0, 0.5, -0.5, 1.5, 2.5, -2.5]])
    assert quantize_activations(x, 4, 8)[0].tolist() == [[7, 1, -1, 2, 3, -3]]


def test_there_and_back_keeps_shape_and_dtype() -> None:
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    made = fake_quantize(x, 8, 16)
    assert made.shape == x.shape and made.dtype == torch.bfloat16
    codes, scales = quantize_activations(x.view(6, 40), 8, 16)
    assert torch.equal(made.view(6, 40), dequantize_activations(codes, scales, 16).to(torch.bfloat16))


def test_one_scale_a_token() -> None:
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
    codes, scales = quantize_activations(x, 8, -1)
    assert scales.shape == (5, 1) and torch.equal(codes, quantize_activations(x, 8, 40)[0])
    torch.testing.assert_close(dequantize_activations(codes, scales, -1), x, rtol=0, atol=float(scales.max()) / 1.99)
    ActivationGrid(8, -1).divide(41)
    with pytest.raises(ValueError, match="groups of at least 1, or -1 for one scale a token"):
        ActivationGrid(8, 0)
