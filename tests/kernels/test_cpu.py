"""The CPU's packed weights: widened codes come back, masked weights are exactly 0, all ways to multiply agree, choices are kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitmend.compress.weights import UniformWeight
from bitmend.kernels import choices, cpu, cpu_int4, cpu_wide, scratch

Maker = Callable[..., UniformWeight]
BOTH = {torch.bfloat16: True, torch.float16: True}


def ways(weight: Any, rows: int) -> dict[str, Any]:
    """All ways to multiply, those for machines with 16-bit arithmetic as well."""
    return weight.products(BOTH.__getitem__, rows)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("out, inputs, group", [(64, 128, 64), (77, 96, 32), (200, 576, 64), (16, 192, 192), (130, 512, -1)])
def test_packed_weight_is_the_record_up_to_bfloat16_scales(bits: int, out: int, inputs: int, group: int, uniform: Maker) -> None:
    base = uniform(out, inputs, bits, group)
    packed = cpu_int4.pack_int4(base)
    error = (packed.dense() - base.dense()).abs()
    step = base.scales.float().repeat_interleave(inputs // base.groups, dim=1)
    assert packed.shape == packed.dense().shape == base.shape
    assert bool((error <= step * 16 * 2**-8).all()), "scale and zero lose at most half of 2⁻⁸ of sixteen steps each"
    assert sum(t.numel() * t.element_size() for t in packed.tensors()) < 0.4 * 2 * (out + 63) * inputs


@pytest.mark.parametrize("bits", [2, 3])
def test_narrow_zero_points_stay_exact(bits: int, uniform: Maker) -> None:
    base = uniform(64, 128, bits)
    at_zero = base.codes_OI() == base.zeros_OG().to(torch.uint8).repeat_interleave(64, dim=1)
    dense = cpu_int4.pack_int4(base).dense()
    assert bool(at_zero.any()) and not bool(dense[at_zero].any())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits, out, inputs, group", [(8, 77, 96, 32), (8, 40, 192, -1), (6, 40, 128, 64), (5, 40, 96, 32), (4, 64, 128, 64), (3, 9, 24, 24)])
def test_bytes_are_the_record(bits: int, out: int, inputs: int, group: int, symmetric: bool, uniform: Maker) -> None:
    base = uniform(out, inputs, bits, group, symmetric)
    torch.testing.assert_close(cpu_wide.pack_bytes(base).dense(), base.dense(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("chunk", [scratch.CHUNK, 1])
@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("form", ["int4", "int8", "int8 symmetric", "float16", "bfloat16"])
def test_every_way_to_multiply_agrees_with_the_weight(
    form: str, rows: int, chunk: int, uniform: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64; chunk 1 makes every block or row a chunk of its own."""
    for module in (cpu_int4, cpu_wide):
        monkeypatch.setattr(module, "CHUNK", chunk)
    weight: Any = {
        "int4": lambda: cpu_int4.pack_int4(uniform(100, 192, 4)),
        "int8": lambda: cpu_wide.pack_bytes(uniform(100, 192, 8)),
        "int8 symmetric": lambda: cpu_wide.pack_bytes(uniform(100, 192, 8, 64, True)),
        "float16": lambda: cpu_wide.HalfWeight(torch.randn(100, 192).half()),
        "bfloat16": lambda: cpu_wide.HalfWeight(torch.randn(100, 192).bfloat16()),
    }[form]()
    x = torch.randn(rows, 192)
    truth = x.double() @ weight.dense(torch.float64).t()
    for name, multiply in ways(weight, rows).items():
        error = (multiply(x).double() - truth).norm() / truth.norm()
        exact = name in ("widen", "unpack")
        assert multiply(x).shape == (rows, 100) and error < (1e-6 if exact else 4e-3), f"{name}: {error:.2e}"


@pytest.mark.parametrize("form", ["int4", "int8", "float16"])
def test_rows_are_those_of_the_matrix(form: str, uniform: Maker) -> None:
    weight: Any = {
        "int4": lambda: cpu_int4.pack_int4(uniform(100, 192, 4)),
        "int8": lambda: cpu_wide.pack_bytes(uniform(100, 192, 8)),
        "float16": lambda: cpu_wide.HalfWeight(torch.randn(100, 192).half()),
    }[form]()
    ids = torch.tensor([99, 0, 31, 32, 63, 64, 17, 17])
    torch.testing.assert_close(weight.rows(ids), weight.dense()[ids], rtol=1e-6, atol=1e-7)


def test_the_scratch_is_one_memory_and_survives_inference_mode() -> None:
    with torch.inference_mode():
        first = scratch.scratch(1000)
    assert not first.is_inference()
    assert scratch.scratch(10).data_ptr() == first.data_ptr()
    assert scratch.scratch(first.numel() + 10**6).numel() == first.numel() + 10**6


def test_what_cannot_be_packed_is_reported(uniform: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="8-bit groups"):
        cpu_int4.pack_int4(uniform(64, 128, 8))
    with pytest.raises(ValueError, match="group_size is 24"):
        cpu_int4.pack_int4(uniform(64, 96, 4, 24))
    base = uniform(8, 64, 8)
    with pytest.raises(ValueError, match="integer zero points"):
        cpu_wide.pack_bytes(UniformWeight.from_codes(base.codes_OI(), base.scales, base.zeros_OG() + 0.5, 8, 64))
    monkeypatch.setattr(cpu_int4, "_pack", lambda codes, tiles: torch.zeros(64, 2, dtype=torch.uint8))
    cpu_int4.block_rows.cache_clear()
    with pytest.raises(ValueError, match="unknown order"):
        cpu_int4.pack_int4(uniform(64, 128))
    cpu_int4.block_rows.cache_clear()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("BITMEND_CACHE", str(tmp_path / "bitmend"))
    choices.forget()


@pytest.mark.usefixtures("fresh")
def test_choice_is_measured_once_and_has_a_reason(monkeypatch: pytest.MonkeyPatch, uniform: Maker) -> None:
    weight = cpu_int4.pack_int4(uniform(64, 128, 4))
    first = cpu.product_for(weight, 1, torch.float32)
    assert first["choice"] in ways(weight, 1) and "fastest of" in first["reason"]
    choices.forget()
    monkeypatch.setattr(cpu, "microseconds", lambda *_: pytest.fail("measured although the disk knows"))
    assert cpu.product_for(weight, 1, torch.float32) == first


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("packed_time, choice", [(20.0, "packed"), (9e9, "dense")])
def test_packed_is_kept_unless_it_is_hopeless(packed_time: float, choice: str, monkeypatch: pytest.MonkeyPatch, uniform: Maker) -> None:
    monkeypatch.setattr(cpu, "microseconds", lambda *_: packed_time)
    monkeypatch.setattr(cpu, "_dense_times", lambda *_: {"bfloat16": 30.0, "float32": 15.0})
    actual = cpu.resident_form(cpu_int4.pack_int4(uniform(64, 128, 4)), torch.float32)
    assert actual["choice"] == choice and "float32 15 µs" in actual["reason"]


@pytest.mark.usefixtures("fresh")
def test_sixteen_bit_products_of_many_rows_are_left_out_where_they_do_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU without such arithmetic one of them takes a hundred times as long as float32: it must not even be tried."""
    monkeypatch.setattr(cpu, "half_pays", lambda dtype: False)
    weight = cpu_wide.HalfWeight(torch.randn(8, 16).bfloat16())
    assert set(weight.products(cpu.half_pays, 64)) == {"widen"} and set(weight.products(cpu.half_pays, 1)) == {"widen", "direct"}
    assert cpu.product_for(weight, 64, torch.float32)["choice"] == "widen"


def test_a_call_that_takes_long_is_not_repeated() -> None:
    calls = []

    def slow() -> None:
        calls.append(1)
        torch.zeros(1)
        end = cpu.time.perf_counter() + 0.02
        while cpu.time.perf_counter() < end:
            pass

    assert cpu.microseconds(slow, budget_seconds=0.001) >= 20_000 and len(calls) == 1
