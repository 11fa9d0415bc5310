"""bind, bind_group: every kind of stored weight comes out as its definition says, by an operator that names itself."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bitmend.compress.integer_scales import with_integer_scales
from bitmend.compress.weights import ActivationGrid, DenseWeight, LowRank, SparseDelta, StoredWeight, UniformWeight
from bitmend.kernels.linear import Backend, bind, bind_group, describe, resident_bytes
from bitmend.kernels.operators import rounded
from bitmend.kernels.table import bind_table
from torch import Tensor, nn

Maker = Callable[..., Any]


def by_definition(stored: StoredWeight, bias: Tensor | None, x: Tensor) -> Tensor:
    """float64, from the records alone."""
    x64 = x.double()
    inner = x64 if stored.smooth is None else x64 / stored.smooth.double()
    y = rounded(inner.flatten(0, -2), stored.activations).view(inner.shape).double() @ stored.base_dense(torch.float64).t()
    if stored.low_rank is not None:
        y = y + x64 @ stored.low_rank.dense(torch.float64).t()
    if stored.delta is not None:
        y = y + x64 @ stored.delta.add_to_(torch.zeros(stored.shape, dtype=torch.float64)).t()
    return y if bias is None else y + bias.double()


def assert_close(y: Tensor, truth: Tensor, tolerance: float = 6e-3) -> None:
    """bfloat16 holds 8 bits: half of 2⁻⁸ for each of x, scale and y, against the size of the whole output."""
    assert y.isfinite().all()
    error = (y.double().cpu() - truth).norm() / truth.norm()
    assert error < tolerance, f"relative error {error:.2e}"


WEIGHTS = {
    "2 bits": lambda uniform, pair, normal_float: StoredWeight(uniform(96, 192, 2), low_rank=pair(96, 192, 8)),
    "3 bits": lambda uniform, pair, normal_float: StoredWeight(uniform(96, 192, 3), low_rank=pair(96, 192, 16, torch.bfloat16)),
    "4 bits": lambda uniform, pair, normal_float: StoredWeight(uniform(96, 192, 4), low_rank=pair(96, 192, 16)),
    "4 bits, no rank": lambda uniform, pair, normal_float: StoredWeight(uniform(96, 192, 4)),
    "8 bits": lambda uniform, pair, normal_float: StoredWeight(uniform(96, 192, 8), low_rank=pair(96, 192, 8)),
    "symmetric": lambda uniform, pair, normal_float: StoredWeight(uniform(96, 192, 4, symmetric=True)),
    "odd rows": lambda uniform, pair, normal_float: StoredWeight(uniform(77, 192, 3), low_rank=pair(77, 192, 8)),
    "one group a row": lambda uniform, pair, normal_float: StoredWeight(uniform(64, 192, 4, -1)),
    "group of 24": lambda uniform, pair, normal_float: StoredWeight(uniform(64, 192, 4, 24)),
    "masked": lambda uniform, pair, normal_float: StoredWeight(uniform(96, 192, 4), low_rank=pair(96, 192, 8)).with_mask(
        torch.rand(96, 192) > 0.5
    ),
    "smooth": lambda uniform, pair, normal_float: StoredWeight(
        uniform(96, 192, 4), low_rank=pair(96, 192, 8), smooth=torch.rand(192) + 0.5
    ),
    "W4A8": lambda uniform, pair, normal_float: StoredWeight(
        uniform(96, 192, 4), low_rank=pair(96, 192, 8), smooth=torch.rand(192) + 0.5, activations=ActivationGrid(8)
    ),
    "W4A8, two levels": lambda uniform, pair, normal_float: StoredWeight(
        with_integer_scales(uniform(96, 192, 4)), None, pair(96, 192, 8), torch.rand(192) + 0.5, activations=ActivationGrid(8, -1)
    ).with_mask(torch.rand(96, 192) > 0.5),
    "delta": lambda uniform, pair, normal_float: StoredWeight(
        uniform(96, 192, 4), delta=SparseDelta(torch.randperm(96 * 192)[:50].int(), torch.randn(50))
    ),
    "delta, W4A8": lambda uniform, pair, normal_float: StoredWeight(
        uniform(96, 192, 4), delta=SparseDelta(torch.randperm(96 * 192)[:50].int(), torch.randn(50)), activations=ActivationGrid(8)
    ),
    "dense": lambda uniform, pair, normal_float: StoredWeight(DenseWeight(torch.randn(96, 192).bfloat16()), low_rank=pair(96, 192, 8)),
    "factors on a grid": lambda uniform, pair, normal_float: StoredWeight(
        uniform(96, 192, 4), low_rank=LowRank(uniform(96, 64, 8), uniform(64, 192, 8))
    ),
    "act-order": lambda uniform, pair, normal_float: StoredWeight(shuffled(uniform(96, 192, 4)), low_rank=pair(96, 192, 8)),
    "float zeros": lambda uniform, pair, normal_float: StoredWeight(floating_zeros(uniform(96, 192, 4))),
    "float zeros, masked": lambda uniform, pair, normal_float: StoredWeight(floating_zeros(uniform(96, 192, 4))).with_mask(
        torch.rand(96, 192) > 0.5
    ),
    "nf4": lambda uniform, pair, normal_float: StoredWeight(normal_float(96, 192), low_rank=pair(96, 192, 8)),
    "nf4, masked": lambda uniform, pair, normal_float: StoredWeight(normal_float(96, 192)).with_mask(torch.rand(96, 192) > 0.5),
}


def shuffled(base: UniformWeight) -> UniformWeight:
    index = torch.arange(base.in_features) // base.group_size
    zeros = None if base.zeros is None else base.zeros_OG().long()
    order = torch.randperm(base.in_features)
    return UniformWeight.from_codes(base.codes_OI(), base.scales, zeros, base.bits, base.group_size, index[order])


def floating_zeros(base: UniformWeight) -> UniformWeight:
    return UniformWeight.from_codes(
        base.codes_OI(), base.scales, base.zeros_OG() + torch.rand_like(base.zeros_OG()) - 0.5, base.bits, base.group_size
    )


@pytest.fixture
def make(uniform: Maker, pair: Maker, normal_float: Maker) -> Callable[[str], StoredWeight]:
    return lambda kind: WEIGHTS[kind](uniform, pair, normal_float)


@pytest.mark.parametrize("backend, dtype", [("auto", torch.float32), ("auto", torch.bfloat16), ("triton", torch.float32)])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_bind_multiplies_as_defined(
    kind: str, dtype: torch.dtype, backend: Backend, device: str, make: Callable[[str], StoredWeight]
) -> None:
    """ "triton" runs in the interpreter where there is no card; what it refuses must be refused with a reason."""
    stored = make(kind)
    bias = torch.randn(stored.shape[0])
    try:
        module = bind(stored, bias, device=device, dtype=dtype, backend=backend)
    except ValueError as error:
        assert backend == "triton" and kind in NOT_IN_TRITON, error
        assert NOT_IN_TRITON[kind] in str(error)
        return
    assert (kind == "W4A8, two levels" and module.backend == "triton") == ("two levels" in module.reason)
    assert module.reason and module.backend in ("cpu-int4", "cpu-int8", "triton", "dense", "reference")
    assert not (backend == "triton" and kind in NOT_IN_TRITON)
    for shape in ((1, 192), (2, 3, 192), (70, 192)):
        x = torch.randn(shape).to(dtype)
        y = module(x.to(device))
        assert y.dtype == dtype and y.shape == (*shape[:-1], stored.shape[0])
        assert_close(y, by_definition(stored, bias, x), 0.02 if stored.activations else 6e-3)


NOT_IN_TRITON = {
    "group of 24": "not a multiple of 16",
    "delta": "sparse delta",
    "delta, W4A8": "sparse delta",
    "dense": "stored dense",
    "float zeros, masked": "no code for 0",
}
FALLBACKS = {
    "4 bits": ("cpu-int4", "one row"),
    "act-order": ("cpu-int4", "one row"),
    "8 bits": ("cpu-int8", "one row"),
    "nf4": ("dense", "NormalFloatWeight"),
    "group of 24": ("dense", "group_size is 24"),
    "delta": ("dense", "sparse delta"),
    "delta, W4A8": ("reference", "sparse delta"),
    "float zeros, masked": ("dense", "no code for 0"),
    "dense": ("dense", "stored dense"),
}


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("kind", FALLBACKS)
def test_what_a_cpu_cannot_pack_is_reported(kind: str, make: Callable[[str], StoredWeight]) -> None:
    module, (backend, reason) = bind(make(kind)), FALLBACKS[kind]
    assert module.backend == backend and reason in module.reason
    if backend not in ("dense", "reference"):
        return
    with pytest.raises(ValueError, match="cpu-int4"):
        bind(make(kind), backend="cpu-int4")


@pytest.mark.parametrize("kind", ["8 bits", "4 bits"])
def test_bytes_when_asked_for(kind: str, make: Callable[[str], StoredWeight]) -> None:
    stored, x = make(kind), torch.randn(3, 192)
    module = bind(stored, backend="cpu-int8")
    assert module.backend == "cpu-int8"
    assert_close(module(x), by_definition(stored, None, x), 1e-6)
    with pytest.raises(ValueError, match="8-bit groups"):
        bind(make("8 bits"), backend="cpu-int4")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_resident_weights_are_packed(bits: int, uniform: Maker, pair: Maker) -> None:
    stored = StoredWeight(uniform(576, 576, bits), low_rank=pair(576, 576, 16))
    assert bind(stored, backend="cpu-int4").resident_bytes() < 0.35 * 2 * 576 * 576


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("kind", ["4 bits", "smooth", "act-order", "8 bits", "dense"])
def test_gradient_of_the_input(kind: str, backend: Backend, device: str, make: Callable[[str], StoredWeight]) -> None:
    stored = make(kind)
    if backend == "triton" and kind in NOT_IN_TRITON:
        return
    x = torch.randn(5, 192, device=device, requires_grad=True)
    upstream = torch.randn(5, stored.shape[0], device=device)
    (grad,) = torch.autograd.grad(bind(stored, device=device, backend=backend)(x), x, upstream)
    assert_close(grad, upstream.double().cpu() @ stored.dense(torch.float64))


@pytest.mark.parametrize("backend", ["auto", "triton", "dense", "reference"])
@pytest.mark.parametrize("shared_down", [False, True])
def test_group_gives_every_member_its_own(shared_down: bool, backend: Backend, device: str, uniform: Maker, pair: Maker) -> None:
    ranks = (8, 8, 8) if shared_down else (8, 16, 24)
    weights = [StoredWeight(uniform(out, 192), low_rank=pair(out, 192, rank)) for out, rank in zip((96, 40, 33), ranks, strict=True)]
    if shared_down:
        first = weights[0].low_rank
        assert first is not None
        weights = [replace(w, low_rank=LowRank(w.low_rank.up, first.down)) for w in weights if w.low_rank is not None]
    biases = [torch.randn(96), None, torch.randn(33)]
    group = bind_group(list(zip(weights, biases, strict=True)), device=device, backend=backend)
    assert group.joined == (backend != "reference") and group.reason
    for rows in (1, 70):
        x = torch.randn(rows, 192)
        for y, weight, bias in zip(group(x.to(device)), weights, biases, strict=True):
            assert_close(y, by_definition(weight, bias, x))


@pytest.mark.parametrize("backend", ["auto", "cpu-int4", "dense"])
@pytest.mark.parametrize("factors", ["own", "shared", "of two dtypes"])
@pytest.mark.parametrize("outs", [(77,), (64, 64), (96, 32, 32), (77, 40)], ids=str)
def test_values_and_gradients_by_rows(outs: tuple[int, ...], factors: str, backend: Backend, uniform: Maker, pair: Maker) -> None:
    """One row takes blocks of equal size in one product, more rows the segments one by one; odd outputs are padded."""
    pairs = [pair(out, 192, 8) for out in outs]
    if factors == "shared":
        pairs = [LowRank(p.up, pairs[0].down) for p in pairs]
    if factors == "of two dtypes":
        pairs = [LowRank(p.up, p.down.bfloat16()) for p in pairs]
    weights = [StoredWeight(uniform(out, 192), low_rank=p) for out, p in zip(outs, pairs, strict=True)]
    bound = bind_group([(w, None) for w in weights], backend=backend) if len(outs) > 1 else bind(weights[0], backend=backend)
    for rows in (1, 7, 70):
        x = torch.randn(rows, 192, requires_grad=True)
        actual = bound(x)
        y = torch.cat(actual, 1) if isinstance(actual, tuple) else actual
        assert_close(y.detach(), torch.cat([by_definition(w, None, x.detach()) for w in weights], 1))
        upstream = torch.randn_like(y)
        (grad,) = torch.autograd.grad(y, x, upstream)
        assert_close(grad, upstream.double() @ torch.cat([w.dense(torch.float64) for w in weights]))


def test_shared_down_is_kept_once(uniform: Maker, pair: Maker) -> None:
    first, second = pair(64, 192, 16), pair(64, 192, 16)
    apart = bind_group([(StoredWeight(uniform(64, 192), low_rank=p), None) for p in (first, second)], backend="cpu-int4")
    shared = bind_group(
        [(StoredWeight(uniform(64, 192), low_rank=LowRank(p.up, first.down)), None) for p in (first, second)], backend="cpu-int4"
    )
    assert apart.resident_bytes() - shared.resident_bytes() == 16 * 192 * 2


def test_members_that_differ_are_bound_one_by_one(uniform: Maker, normal_float: Maker, pair: Maker, device: str) -> None:
    smooth = StoredWeight(uniform(40, 192), smooth=torch.rand(192) + 0.5)
    wide = [StoredWeight(uniform(40, 192), low_rank=pair(40, 192, 136)) for _ in range(2)]
    cases = {
        "smooth differ": [StoredWeight(uniform(40, 192)), smooth],
        "stored differently": [StoredWeight(uniform(40, 192)), StoredWeight(normal_float(40, 192))],
        "grids differ": [StoredWeight(uniform(40, 192)), StoredWeight(uniform(40, 192, 4, 32))],
        "ranks add up to 272": wide,
    }
    for reason, weights in cases.items():
        backend: Backend = "triton" if weights is wide else "auto"
        group = bind_group([(w, None) for w in weights], device=device, backend=backend)
        assert not group.joined and reason in group.reason
        x = torch.randn(3, 192)
        for y, weight in zip(group(x.to(device)), weights, strict=True):
            assert_close(y, by_definition(weight, None, x))


@pytest.mark.usefixtures("patient")
def test_different_bits_meet_at_four_on_a_cpu(uniform: Maker) -> None:
    weights = [StoredWeight(uniform(64, 192, bits)) for bits in (2, 3, 4)] + [StoredWeight(uniform(64, 192, 3, 64, True))]
    group = bind_group([(w, None) for w in weights])
    x = torch.randn(2, 192)
    assert group.joined
    for y, weight in zip(group(x), weights, strict=True):
        assert_close(y, by_definition(weight, None, x))


@pytest.mark.usefixtures("patient")
def test_eight_bits_and_four_stay_apart(uniform: Maker) -> None:
    group = bind_group([(StoredWeight(uniform(64, 192, bits)), None) for bits in (4, 8)])
    assert not group.joined and "grids differ" in group.reason and group.backend == "cpu-int4+cpu-int8"


def test_parts_stand_where_linears_stood(uniform: Maker) -> None:
    weights = [StoredWeight(uniform(64, 192)) for _ in range(3)]
    group = bind_group([(w, None) for w in weights])
    parts, calls = group.parts(), []
    group.members[0].register_forward_hook(lambda *_: calls.append(1))
    for x in (torch.randn(2, 192), torch.randn(2, 192)):
        for part, weight in zip(parts, weights, strict=True):
            assert_close(part(x), by_definition(weight, None, x))
    assert len(calls) == 2, "once for each x"
    x = torch.randn(2, 192)
    parts[0](x)
    x.mul_(2)
    assert_close(parts[1](x), by_definition(weights[1], None, x))
    assert_close(parts[1](x), by_definition(weights[1], None, x))
    with torch.inference_mode():
        x = torch.randn(2, 192)
        assert_close(parts[2](x), by_definition(weights[2], None, x))
    assert sum(part.resident_bytes() for part in parts) == group.resident_bytes()


def test_a_bound_weight_tells_its_form_and_no_number(uniform: Maker) -> None:
    """Models ask `linear.weight.dtype`; what would multiply with it gets NaN, never something else."""
    group = bind_group([(StoredWeight(uniform(rows, 64)), None) for rows in (64, 32)], dtype=torch.bfloat16)
    for module, rows in zip(group.parts(), (64, 32), strict=True):
        assert (
            module.weight.dtype == torch.bfloat16
            and module.weight.shape == (rows, 64)
            and module.weight.device == group.linears()[0].device
        )
        assert bool(module.weight.isnan().all()) and module.weight.untyped_storage().nbytes() == 2


def test_a_bound_module_stays_where_it_was_made(uniform: Maker) -> None:
    group = bind_group([(StoredWeight(uniform(64, 192)), None) for _ in range(2)])
    table, head = bind_table(StoredWeight(uniform(64, 192, 8)))
    model = nn.Sequential(nn.Linear(3, 3), *group.parts(), head, table)
    model.to("cpu").half()
    assert model[0].weight.dtype == torch.float16
    for module in list(model)[1:]:
        with pytest.raises(RuntimeError, match="load the model again for 'meta'"):
            module.to("meta")


@pytest.mark.usefixtures("patient")
def test_bytes_of_a_model_count_shared_memory_once(uniform: Maker) -> None:
    group = bind_group([(StoredWeight(uniform(64, 192)), None) for _ in range(2)])
    table, head = bind_table(StoredWeight(uniform(64, 192, 8)))
    plain = nn.Linear(3, 3)
    expected = group.resident_bytes() + head.resident_bytes() + 4 * 12
    assert resident_bytes(nn.Sequential(plain, *group.parts(), head, table)) == expected
    assert 64 * 192 < head.resident_bytes() < 1.1 * 64 * 192


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("kind", ["4 bits, no rank", "8 bits", "odd rows", "dense", "nf4", "masked", "smooth", "act-order"])
def test_a_table_gives_rows_and_its_head_the_products(kind: str, device: str, make: Callable[[str], StoredWeight]) -> None:
    stored = make(kind)
    dense = stored.dense(torch.float64)
    embedding, head = bind_table(stored, device=device, scale=torch.tensor(1.5))
    ids, x = torch.randint(0, dense.shape[0], (2, 5)), torch.randn(3, 192)
    assert embedding(ids.to(device)).shape == (2, 5, 192)
    assert_close(embedding(ids.to(device)), 1.5 * dense[ids])
    assert_close(head(x.to(device)), x.double() @ dense.t())
    assert resident_bytes(nn.Sequential(embedding, head)) == head.resident_bytes() == embedding.resident_bytes()


def test_refusals_name_the_argument(uniform: Maker) -> None:
    stored = StoredWeight(uniform(64, 192))
    with pytest.raises(ValueError, match="backend 'cuda' is unknown"):
        bind(stored, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype torch\.int8"):
        bind(stored, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"bias has shape \(63,\); expected \(64,\)"):
        bind(stored, torch.zeros(63))
    with pytest.raises(ValueError, match="device meta"):
        bind(stored, device="meta")
    with pytest.raises(ValueError, match="x has 191 features"):
        bind(stored)(torch.zeros(1, 191))
    with pytest.raises(ValueError, match="members is empty"):
        bind_group([])
    with pytest.raises(ValueError, match=r"different widths \[128, 192\]"):
        bind_group([(stored, None), (StoredWeight(uniform(64, 128)), None)])


def test_describe_says_what_is_here_and_what_was_measured(uniform: Maker) -> None:
    bind(StoredWeight(uniform(64, 192)))(torch.zeros(1, 192))
    description = describe("cpu")
    assert set(description["backends"]) == {"reference", "dense", "cpu-int4", "cpu-int8", "triton"} and "threads" in description["device"]
    measured = description["choices"]["form 64x192 int4 group 64 float32"]
    assert measured["choice"] in ("packed", "dense") and "one row" in measured["reason"]
    assert description["backends"]["triton"] == "fused kernels" or torch.cuda.is_available(), "the interpreter counts as a device"
