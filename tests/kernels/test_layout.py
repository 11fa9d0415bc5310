"""Tiled codes: nothing is lost, and what does not fit is refused."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from bitmend.compress.weights import DenseWeight, NormalFloatWeight, UniformWeight
from bitmend.kernels.layout import LANES, SLOTS, lanes_for, tile, tile_codes


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("bits", SLOTS)
@pytest.mark.parametrize("inputs", [64, 77, 576])
def test_codes_come_back(bits: int, lanes: int, inputs: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, inputs))
    base = UniformWeight.from_codes(codes, torch.rand(5, 1).half(), torch.randint(0, 1 << bits, (5, 1)), bits, inputs)
    tiled = tile(base, lanes)
    assert tiled.tiles == -(-inputs // (lanes * SLOTS[bits])) and tiled.codes.dtype == torch.int32
    assert torch.equal(tiled.codes_OI(), base.codes_OI())


@pytest.mark.parametrize("bits", SLOTS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_dense_is_the_records_dense(bits: int, symmetric: bool, uniform: Callable[..., UniformWeight]) -> None:
    base = uniform(33, 192, bits, 64, symmetric)
    assert torch.equal(tile(base).dense(), base.dense())


def test_normal_float_dense(normal_float: Callable[..., NormalFloatWeight]) -> None:
    base = normal_float(33, 192)
    assert torch.equal(tile(base).dense(), base.dense())


def test_two_neighbours_share_a_word() -> None:
    """The layout that the kernels count on: lane l of slot s in bits [4s, 4s + 4) of field l."""
    codes = torch.arange(128).remainder(16).view(1, 128)
    words = tile_codes(codes, 4, 32)
    assert words.shape == (1, 1, 16)
    for lane in range(32):
        field = (int(words[0, 0, lane // 2]) >> (16 * (lane % 2))) & 0xFFFF
        assert [(field >> (4 * slot)) & 15 for slot in range(4)] == [int(codes[0, slot * 32 + lane]) for slot in range(4)]


def test_widest_fragment_that_stays_in_a_group() -> None:
    assert lanes_for(4096, 64, 4) == 64
    assert lanes_for(4096, 32, 4) == 32
    assert lanes_for(576, 64, 4) == 32, "64 lanes would pad 576 inputs to 768"
    assert lanes_for(77, 77, 4) == 16, "one group a row needs no divisor"


def test_refusals_name_the_cause(uniform: Callable[..., UniformWeight]) -> None:
    with pytest.raises(ValueError, match="group_size 24 is not a multiple of 16"):
        tile(uniform(16, 96, 4, 24))
    with pytest.raises(ValueError, match="group_index"):
        tile(replace(uniform(16, 128), group_index=torch.zeros(128, dtype=torch.int32)))
    with pytest.raises(ValueError, match="DenseWeight"):
        tile(DenseWeight(torch.zeros(16, 64)))
