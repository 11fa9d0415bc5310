"""NormalFloat: NF4 is bitsandbytes' bit for bit, with and without double quantization; the other widths keep its construction."""

import bitsandbytes.functional as bnb
import pytest
import torch
from bitmend.compress import normal_float as nf
from bitmend.compress.feedback import inverse_factor
from bitmend.compress.gptq_sweeps import gptq_book
from bitmend.compress.rounding import round_normal_float

SHAPES = [(64, 576), (576, 64), (7, 128), (33, 1536), (1024, 1024)]


def weight(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator) * 0.1).to(dtype)


def nibbles(packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """bitsandbytes stores two codes a byte, the first in the high half."""
    return torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), dim=-1).view(shape)


def test_code_books_and_map_are_bitsandbytes():
    assert torch.equal(nf.code_book(4), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf.dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_code_books_are_ascending_from_minus_1_over_0_to_1(bits):
    book = nf.code_book(bits)
    assert len(book) == 1 << bits
    assert bool((book.diff() > 0).all())
    assert book[0] == -1.0
    assert book[-1] == 1.0
    assert book[nf.zero_code(bits)] == 0.0
    assert int((book > 0).sum()) == int((book < 0).sum()) + 1


@pytest.mark.parametrize(("shape", "block_size"), [*((shape, 64) for shape in SHAPES), ((33, 96), 32), ((7, 256), 128)])
def test_nf4_codes_and_absmax_are_bitsandbytes(shape, block_size):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        original = weight(*shape, dtype=dtype)
        packed, state = bnb.quantize_4bit(original, blocksize=block_size, quant_type="nf4")
        ours = round_normal_float(original.float(), 4, block_size, double_quantize=False)
        assert torch.equal(ours.codes_OI(), nibbles(packed, shape))
        assert torch.equal(ours.absmax_OG().view(-1), state.absmax)
        assert torch.equal(ours.dense(dtype), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_double_quantization_is_bitsandbytes(shape, seed):
    original = weight(*shape, seed=seed)
    packed, state = bnb.quantize_4bit(original, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = round_normal_float(original, 4, 64, double_quantize=True)
    assert ours.absmax_codes is not None and ours.absmax_scales is not None and ours.absmax_offset is not None
    assert state.state2 is not None and state.offset is not None
    assert torch.equal(ours.codes_OI(), nibbles(packed, shape))
    assert torch.equal(ours.absmax_codes.view(-1), state.absmax)
    assert torch.equal(ours.absmax_scales, state.state2.absmax)
    assert torch.equal(ours.absmax_offset, state.offset.view(1))
    assert torch.equal(ours.dense(), bnb.dequantize_4bit(packed, state))


def test_bits_per_weight_of_nf4_is_4_127():
    assert round_normal_float(weight(1024, 1024)).stored_bits() / 1024**2 == pytest.approx(4.127, abs=5e-4)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_codes_are_nearest(bits):
    original = weight(16, 128, seed=3)
    record = round_normal_float(original, bits, 32, double_quantize=False)
    choices = nf.code_book(bits) * record.absmax_OG().repeat_interleave(32, dim=1).unsqueeze(-1)
    nearest = (choices - original.unsqueeze(-1)).abs().amin(-1)
    assert torch.allclose((record.dense() - original).abs(), nearest, atol=1e-7)


def test_zero_blocks_stay_zero_and_finite():
    original = weight(4, 128)
    original[1] = 0
    for double in (False, True):
        record = round_normal_float(original, 4, 64, double)
        assert bool((record.dense()[1] == 0).all())
    assert bool(torch.isfinite(round_normal_float(torch.zeros(4, 128)).dense()).all())


def test_a_block_without_width_takes_the_code_of_0_under_feedback():
    """Double quantization may give a tiny absmax the wrong sign; a weight under it must not be sent to the far end of the book."""
    original, factor = weight(4, 64), inverse_factor(torch.eye(64))
    codes, _ = gptq_book(original, factor, torch.tensor([[0.1], [-1e-3], [0.0], [0.1]]), 4)
    assert bool((codes[1:3] == nf.zero_code(4)).all())


def test_blocks_must_divide():
    with pytest.raises(ValueError, match="in_features 96 is not a multiple of block_size 64; choose one of"):
        round_normal_float(weight(4, 96))
