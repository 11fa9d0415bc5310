"""Records: what is stored comes back through tensors and JSON, bit for bit; every part does what its sentence says."""

import json
from dataclasses import replace

import pytest
import torch
from bitmend.compress.grids import UniformGrid
from bitmend.compress.rounding import round_normal_float, round_uniform
from bitmend.compress.weights import (
    ActivationGrid,
    DenseWeight,
    GgmlWeight,
    LowRank,
    SparseDelta,
    StoredWeight,
    UniformWeight,
    describe,
    from_tensors,
    to_tensors,
)


def matrix(rows: int = 6, columns: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def bases():
    index = torch.randperm(96, generator=torch.Generator().manual_seed(1)) // 32
    codes, zeros = torch.randint(0, 8, (6, 96)), torch.rand(6, 3) * 7
    yield DenseWeight(matrix().bfloat16())
    yield round_uniform(matrix(), UniformGrid(3, 32))
    yield round_uniform(matrix(), UniformGrid(4, -1, symmetric=True))
    yield UniformWeight.from_codes(codes, torch.rand(6, 3).half(), zeros, 3, 32, index)
    yield round_normal_float(matrix(), 4, 32)
    yield round_normal_float(matrix(), 2, 96, double_quantize=False)
    yield GgmlWeight.from_codes(torch.randint(0, 32, (6, 96)), torch.rand(6, 3), torch.rand(6, 3), None, "q5_1")


BASES = list(bases())


def everything(base) -> StoredWeight:
    pair = LowRank(matrix(6, 2, 3).half(), round_uniform(matrix(2, 96, 4), UniformGrid(4, 32)))
    delta = SparseDelta(torch.tensor([0, 100, 575], dtype=torch.int32), torch.tensor([1.0, -2.0, 3.0]))
    weight = StoredWeight(base, low_rank=pair, smooth=torch.rand(96) + 0.5, delta=delta, activations=ActivationGrid(8, 32))
    return weight.with_mask(matrix(seed=5) > 0)


@pytest.mark.parametrize("base", BASES, ids=lambda b: type(b).__name__)
def test_records_come_back_through_tensors_and_json(base):
    for weight in (StoredWeight(base), everything(base)):
        tensors = {f"layer.{name}": tensor.clone() for name, tensor in to_tensors(weight).items()}
        back = from_tensors(json.loads(json.dumps(describe(weight))), tensors, "layer.")
        assert torch.equal(back.dense(), weight.dense())
        assert describe(back) == describe(weight)
        assert back.activations == weight.activations
        assert {name: t.dtype for name, t in to_tensors(back).items()} == {name: t.dtype for name, t in to_tensors(weight).items()}


@pytest.mark.parametrize("base", BASES, ids=lambda b: type(b).__name__)
def test_the_effective_weight_is_what_the_docstring_says(base):
    weight = everything(base)
    mask, pair, delta, smooth = weight.mask_OI(), weight.low_rank, weight.delta, weight.smooth
    assert mask is not None and pair is not None and delta is not None and smooth is not None
    up, down = pair.factors()
    expected = base.dense().where(mask, 0) / smooth + up @ down
    expected.view(-1)[delta.index.long()] += delta.values
    assert torch.allclose(weight.dense(), expected, atol=1e-6)
    assert torch.equal(weight.base_dense(), base.dense().where(mask, 0))
    assert torch.equal(weight.to("cpu").dense(), weight.dense())


@pytest.mark.parametrize("base", BASES, ids=lambda b: type(b).__name__)
def test_every_stored_bit_is_counted(base):
    weight = everything(base)
    assert weight.stored_bits() == sum(t.numel() * t.element_size() * 8 for t in to_tensors(weight).values())
    assert weight.bits_per_weight() == weight.stored_bits() / 576
    assert weight.sparsity() == pytest.approx(1 - (matrix(seed=5) > 0).float().mean().item())
    assert StoredWeight(base).sparsity() == 0.0


def test_a_scattered_group_reads_its_own_scale_and_zero():
    index = torch.tensor([1, 0, 1, 0])
    base = UniformWeight.from_codes(torch.tensor([[1, 2, 3, 0]]), torch.tensor([[1.0, 10.0]]), torch.tensor([[1, 2]]), 2, 2, index)
    assert base.dense().tolist() == [[-10.0, 1.0, 10.0, -1.0]]
    plain = replace(base, group_index=None)
    assert plain.dense().tolist() == [[0.0, 1.0, 10.0, -20.0]]


def test_symmetric_means_the_middle_code_is_0():
    base = UniformWeight.from_codes(torch.tensor([[0, 8, 15]]), torch.tensor([[0.5]]), None, 4, 3)
    assert base.symmetric
    assert base.dense().tolist() == [[-4.0, 0.0, 3.5]]


def test_a_k_quant_comes_back_and_says_what_its_parts_mean():
    small = torch.cat((torch.arange(16), torch.arange(16).flip(0))).expand(2, 1, 32)
    base = GgmlWeight.from_codes(torch.full((2, 256), 3), torch.tensor([[2.0], [0.5]]), torch.tensor([[1.0], [4.0]]), small, "q2_k")
    assert base.scales_OG().tolist() == [[2.0 * s for s in range(16)], [0.5 * s for s in range(16)]]
    expected = [3 * 2.0 * s - 1.0 * (15 - s) for s in range(16)]
    assert base.dense()[0].view(16, 16).unique_consecutive(dim=1).squeeze(1).tolist() == expected
    back = from_tensors(json.loads(json.dumps(describe(base))), to_tensors(base))
    assert torch.equal(back.dense(), base.dense()) and back.type == "q2_k"


def test_foreign_descriptions_are_refused():
    weight = StoredWeight(BASES[1])
    with pytest.raises(ValueError, match="unknown weight record 'ternary'; known are"):
        from_tensors({"kind": "ternary"}, {})
    with pytest.raises(ValueError, match="UniformWeight has no field 'colour'; this artifact is of another version"):
        from_tensors(describe(weight.base) | {"colour": 3}, to_tensors(weight.base))
    with pytest.raises(KeyError, match=r"base\.scales"):
        from_tensors(describe(weight), {name: t for name, t in to_tensors(weight).items() if name != "base.scales"})
