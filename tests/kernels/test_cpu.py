"""The CPU's packed operator: widened codes come back, masked weights are exactly 0, its ways to multiply agree, choices are kept."""

from collections.abc import Callable

import pytest
import torch
from bitmend.compress.weights import UniformWeight
from bitmend.kernels import choices, cpu


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("out, inputs, group", [(64, 128, 64), (77, 96, 32), (200, 576, 64), (16, 192, 192), (130, 512, -1)])
def test_packed_weight_is_the_record_up_to_bfloat16_scales(
    bits: int, out: int, inputs: int, group: int, uniform: Callable[..., UniformWeight]
) -> None:
    base = uniform(out, inputs, bits, group)
    packed = cpu.pack_int4(base)
    error = (packed.dense() - base.dense()).abs()
    step = base.scales.float().repeat_interleave(inputs // base.groups, dim=1)
    assert packed.dense().shape == base.shape
    assert bool((error <= step * 16 * 2**-8).all()), "scale and zero lose at most half of 2⁻⁸ of sixteen steps each"
    assert packed.resident_bytes() < 0.4 * 2 * (out + 63) * inputs


@pytest.mark.parametrize("bits", [2, 3])
def test_narrow_zero_points_stay_exact(bits: int, uniform: Callable[..., UniformWeight]) -> None:
    base = uniform(64, 128, bits)
    at_zero = base.codes_OI() == base.zeros_OG().to(torch.uint8).repeat_interleave(64, dim=1)
    dense = cpu.pack_int4(base).dense()
    assert bool(at_zero.any()) and not bool(dense[at_zero].any())


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_every_way_to_multiply_agrees_with_the_unpacked_weight(rows: int, uniform: Callable[..., UniformWeight]) -> None:
    weight = cpu.pack_int4(uniform(100, 192, 4))
    x = torch.randn(rows, 192).bfloat16()
    truth = x.double() @ weight.dense(torch.float64).t()
    for name, multiply in cpu.PACKED_OPERATORS.items():
        error = (multiply(x, weight).double() - truth).norm() / truth.norm()
        assert error < 4e-3, f"{name}: {error:.2e}"


def test_what_cannot_be_packed_is_said(uniform: Callable[..., UniformWeight]) -> None:
    with pytest.raises(ValueError, match="8-bit groups"):
        cpu.pack_int4(uniform(64, 128, 8))
    with pytest.raises(ValueError, match="group_size is 24"):
        cpu.pack_int4(uniform(64, 96, 4, 24))


def test_choice_is_measured_once_and_has_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path, uniform: Callable[..., UniformWeight]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    weight = cpu.pack_int4(uniform(64, 128, 4))
    first = cpu.packed_operator(weight, 1, torch.float32)
    assert first["choice"] in cpu.PACKED_OPERATORS and "fastest of" in first["reason"]
    choices.forget()
    monkeypatch.setattr(cpu, "microseconds", lambda *_: pytest.fail("measured although the disk knows"))
    assert cpu.packed_operator(weight, 1, torch.float32) == first


@pytest.mark.parametrize("times, choice", [({"int4": 20.0}, "int4"), ({"int4": 9e9}, "float32")])
def test_packed_is_kept_unless_it_is_hopeless(
    times: dict[str, float], choice: str, monkeypatch: pytest.MonkeyPatch, tmp_path, uniform: Callable[..., UniformWeight]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choices.forget()
    monkeypatch.setattr(cpu, "microseconds", lambda *_: times["int4"])
    monkeypatch.setattr(cpu, "_dense_times", lambda *_: {"bfloat16": 30.0, "float32": 15.0})
    found = cpu.resident_form(cpu.pack_int4(uniform(64, 128, 4)), torch.float32)
    assert found["choice"] == choice and "float32 15 µs" in found["reason"]
