"""Bit streams: every width comes back, and lies where the formats expect it."""

import pytest
import torch
from bitmend.compress.packing import BITS, pack_codes, pack_mask, packed_words, unpack_codes, unpack_mask
from hypothesis import given, settings
from hypothesis import strategies as st

shapes = st.tuples(st.integers(1, 5), st.integers(1, 140))


@settings(max_examples=80, deadline=None)
@given(bits=st.sampled_from(BITS), shape=shapes, seed=st.integers(0, 2**20))
def test_codes_come_back(bits, shape, seed):
    codes = torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (shape[0], packed_words(shape[1], bits))
    assert torch.equal(unpack_codes(packed, bits, shape[1]).long(), codes)


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from(BITS), count=st.integers(1, 140), seed=st.integers(0, 2**20))
def test_a_row_is_one_little_endian_number(bits, count, seed):
    codes = torch.randint(0, 1 << bits, (1, count), generator=torch.Generator().manual_seed(seed))
    number = sum(code << (i * bits) for i, code in enumerate(codes[0].tolist()))
    words = [word & 0xFFFFFFFF for word in pack_codes(codes, bits)[0].tolist()]
    assert sum(word << (32 * i) for i, word in enumerate(words)) == number


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**20))
def test_masks_come_back_a_bit_each(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (shape[0], -(-shape[1] // 8))
    assert torch.equal(unpack_mask(packed, shape[1]), mask)
    assert all(bool(packed[0, i // 8] >> (i % 8) & 1) == bool(mask[0, i]) for i in range(shape[1]))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="7 bits cannot be packed; choose one of"):
        pack_codes(torch.zeros(1, 8, dtype=torch.long), 7)
    with pytest.raises(ValueError, match=r"codes lie in 0…9; 3 bits hold 0…7"):
        pack_codes(torch.tensor([[0, 9]]), 3)
    with pytest.raises(ValueError, match=r"codes lie in -1…2"):
        pack_codes(torch.tensor([[-1, 2]]), 2)
    with pytest.raises(ValueError, match="4 words cannot hold exactly 33 values of 2 bits"):
        unpack_codes(torch.zeros(1, 4, dtype=torch.int32), 2, 33)
