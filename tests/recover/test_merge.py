from dataclasses import replace

import pytest
import torch
from bitmend.compress.packing import pack_codes
from bitmend.compress.weights import DenseWeight, SparseDelta, UniformWeight
from bitmend.recover.compressed_linear import CompressedLinear
from bitmend.recover.compressed_model import compressed_linears
from bitmend.recover.merge import audit, merge, merge_refusal, stored_loss
from bitmend.recover.recovery_methods import RECOVER, attach, config_of
from bitmend.recover.stored_values import as_stored
from bitmend.recover.student import student_of
from bitmend.recover.train import TrainingText, held_out_loss, train

from .conftest import batch, compress, compressed, held_out, low_rank_of

W = torch.randn(24, 32, generator=torch.Generator().manual_seed(3))


def with_terms(kind, **terms):
    return replace(compress(W, kind), **terms)


SMOOTH = torch.linspace(0.5, 2, 32)
DELTA = SparseDelta(torch.tensor([3, 40], dtype=torch.int32), torch.tensor([0.3, -0.2]))


@pytest.mark.parametrize(
    "terms", [{"low_rank": low_rank_of(W)}, {"smooth": SMOOTH}, {"low_rank": low_rank_of(W), "smooth": SMOOTH, "delta": DELTA}]
)
def test_merging_into_a_dense_base_is_exact(terms):
    stored = with_terms("dense", **terms)
    merged = merge(stored)
    assert merged.low_rank is None and merged.smooth is None and merged.delta is None
    x = torch.randn(5, 32)
    with torch.no_grad():
        assert (CompressedLinear(stored)(x) - CompressedLinear(merged)(x)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "terms", "reason"),
    [
        ("3-bit", {"low_rank": low_rank_of(W)}, "3-bit codes without rounding"),
        ("nf4", {"delta": DELTA}, "its delta cannot be added to 4-bit codes"),
        ("2:4", {"low_rank": low_rank_of(W)}, "fill the weights that the mask holds"),
        ("everything", {}, "low-rank term and delta and smoothing"),
    ],
)
def test_what_would_lose_is_refused_with_its_reason(kind, terms, reason):
    stored = with_terms(kind, **terms)
    assert reason in (merge_refusal(stored) or "")
    with pytest.raises(ValueError, match=reason):
        merge(stored)


def test_a_delta_outside_the_mask_is_refused():
    stored = with_terms("2:4")
    dropped = (~stored.mask_OI()).view(-1).nonzero()[0].to(torch.int32)
    with pytest.raises(ValueError, match="moves 1 weights that the mask holds"):
        merge(replace(stored, delta=SparseDelta(dropped, torch.ones(1))))


def test_audit_finds_every_violation():
    grid, sparse = with_terms("2:4+4-bit"), with_terms("2:4")
    assert audit({"a": grid, "b": sparse}, {"a": grid, "b": sparse}) == []
    mask = grid.mask_OI().clone()
    mask[0, :4] = ~mask[0, :4]
    codes = grid.base.codes_OI().long()
    codes[0, 0] = (codes[0, 0] + 1) % 16
    moved = replace(grid, base=replace(grid.base, codes=pack_codes(codes, 4)))
    filled = replace(sparse, base=DenseWeight(sparse.base.weight + 1))
    actual = {
        "mask differs in 4": {"a": grid.with_mask(mask)},
        "mask is gone": {"a": replace(grid, mask=None)},
        "1 codes changed": {"a": moved},
        "UniformWeight became DenseWeight": {"a": replace(grid, base=DenseWeight(W))},
        "grid was 4 bits × 2 groups": {"a": replace(grid, base=with_terms("3-bit").base)},
        "scale is not finite": {"a": replace(grid, base=replace(grid.base, scales=grid.base.scales * torch.inf))},
        "layer is gone": {},
    }
    for problem, after in actual.items():
        assert any(problem in line for line in audit({"a": grid}, after)), problem
    assert "weights under the mask are not 0" in audit({"b": sparse}, {"b": filled})[0]
    assert audit({"a": grid}, {"a": moved}, codes_move=True) == []


@pytest.mark.parametrize(
    ("name", "kind", "own"),
    [
        ("perp", "2:4", {"lora": "mask_lora", "rank": 4}),
        ("perp", "pruned", {"lora": "scale_lora", "rank": 4}),
        ("full", "2:4", {}),
        ("pafi", "pruned", {"share": 0.1}),
        ("qa_lora", "3-bit", {"rank": 2}),
        ("scales", "2:4+4-bit", {}),
        ("dora", "3-bit", {"rank": 4}),
        ("dora", "nf4-nested", {"rank": 4}),
        ("qat", "3-bit", {}),
        ("serial_adapter", "3-bit", {"bottleneck": 8}),
    ],
)
def test_the_stored_loss_is_the_one_promised_and_audits_are_clean(name, kind, own):
    model = compressed(kind)
    before = {n: lin.stored for n, lin in compressed_linears(model).items()}
    settings = own | {"steps": 6, "loss": "cross_entropy", "eval_every": 2, "warmup": 0}
    attached = attach(name, model, settings)
    student = student_of(model)
    result = train(model, attached, TrainingText(batch, held_out()), config_of(name, settings), main=RECOVER[name].main)
    with as_stored(attached):
        promised = held_out_loss(student, held_out())
    linears = compressed_linears(model)
    assert stored_loss(model, student, held_out()) == pytest.approx(promised, abs=1e-5)
    assert promised == pytest.approx(result.best_loss, abs=1e-6)
    assert compressed_linears(model) == linears
    after = {n: lin.to_stored()[0] for n, lin in linears.items()}
    assert audit(before, after, codes_move=not RECOVER[name].grid_safe) == []
    if kind in ("2:4", "pruned"):
        assert all(merge_refusal(record) is None for record in after.values())
    if name == "scales":
        assert all(a.stored_bits() == before[n].stored_bits() for n, a in after.items())


def test_scales_change_no_byte_and_float_zeros_are_seen():
    stored = compress(W, "3-bit")
    assert isinstance(stored.base, UniformWeight)
    assert audit({"a": stored}, {"a": replace(stored, base=replace(stored.base, zeros=stored.base.zeros_OG() + 0.5))}) == []
