"""Smoothing folded into norms: the same function, in every family; what cannot be folded stays and is named."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.grids import UniformGrid
from bitmend.compress.rounding import round_uniform
from bitmend.compress.sharing import settled
from bitmend.compress.weights import ActivationGrid, LowRank, SparseDelta, StoredWeight
from bitmend.kernels.linear import bind, bind_group
from bitmend.pipelines.models.blocks import StreamedModel
from bitmend.pipelines.models.folding import Folded, fold_block, folded_record
from bitmend.pipelines.run import runner
from bitmend.pipelines.stages.baseline import build_baseline, fingerprint
from torch import nn

from ..families import FAMILIES, save_tiny
from ..runs import chosen

CPU = torch.device("cpu")
FOLDED = {
    "gemma3_text": ("input_layernorm", "pre_feedforward_layernorm"), "opt": ("self_attn_layer_norm", "final_layer_norm"),
    "gpt2": ("ln_1", "ln_2"), "mixtral": ("input_layernorm",),
}  # fmt: skip


def smoothed(weight_OI: torch.Tensor, smooth_I: torch.Tensor | None) -> StoredWeight:
    out, inputs = weight_OI.shape
    pair = LowRank(torch.randn(out, 8).half() / 20, torch.randn(8, inputs).half() / 20)
    base = round_uniform(weight_OI if smooth_I is None else weight_OI * smooth_I, UniformGrid(8, 16), "none")
    return StoredWeight(base, low_rank=pair, smooth=None if smooth_I is None else smooth_I.half())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_stays_what_it_is(family: str, tmp_path: Path) -> None:
    """All linears of one input width share a vector here, so all that a norm feeds can be folded; the others keep theirs."""
    torch.manual_seed(0)
    save_tiny(family, tmp_path / "source")
    key = fingerprint(tmp_path / "source")
    artifact = build_baseline(
        tmp_path / "source", tmp_path / "b.partial", tmp_path / "b", {"key": key, "parent": None, "stage": {"name": "baseline"}}
    )
    model = StreamedModel(artifact, CPU)
    hidden = model.embed(torch.arange(3, 19).view(1, -1))
    block, prefix = model.load_block(1), f"{model.structure.prefix}.1."
    vectors = {width: (torch.randn(width) / 2).exp().half().float() for width in (64, 128, 256)}
    sites = model.structure.of_block(1)
    records = {site.name: smoothed(model.matrix(site), vectors[site.shape[1]]) for site in sites}
    for site in sites:
        model.put(site, records[site.name])
    with torch.no_grad():
        expected = model.run_block(1, hidden)
        folded = fold_block(block, prefix, records, hidden, lambda h: model.run_block(1, h))
        torch.testing.assert_close(model.run_block(1, hidden), expected, rtol=0, atol=0, msg="the block was left as it was")
        for site in sites:
            model.put(site, (records | folded.records)[site.name])
        for name, tensor in folded.tensors.items():
            model.model.get_parameter(name).data = tensor
        torch.testing.assert_close(model.run_block(1, hidden), expected, rtol=1e-3, atol=1e-3)
    norms = FOLDED.get(family, ("input_layernorm", "post_attention_layernorm"))
    assert {name.rpartition(".")[0] for name in folded.tensors} == {f"{prefix}{norm}" for norm in norms}
    assert all(record.smooth is None for record in folded.records.values())
    assert len(folded.notes) == 1 and "no norm stands right before" in folded.notes[0]
    assert all(name in folded.notes[0] for name in records.keys() - folded.records.keys())


class Toy(nn.Module):
    """A norm that two linears read, and, if set, the sum at the end as well."""

    def __init__(self, elsewhere: bool) -> None:
        super().__init__()
        self.norm, self.one, self.two, self.elsewhere = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32), elsewhere

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm(x)
        return x + self.one(n) * self.two(n).tanh() + (0.1 * n if self.elsewhere else 0)


def folded(toy: Toy, records: dict[str, StoredWeight]) -> Folded:
    for name, record in records.items():
        toy.get_submodule(name).weight.data = record.dense()
    return fold_block(toy, "", records, torch.randn(1, 5, 32), toy)


def pair_of_records(**second: Any) -> dict[str, StoredWeight]:
    torch.manual_seed(0)
    vector = torch.rand(32) + 0.5
    one, two = (smoothed(torch.randn(32, 32), vector) for _ in range(2))
    return {"one": one, "two": replace(two, **second)}


def test_a_norm_with_a_bias_is_folded() -> None:
    actual = folded(Toy(False), pair_of_records())
    assert set(actual.tensors) == {"norm.weight", "norm.bias"} and set(actual.records) == {"one", "two"} and not actual.notes


@pytest.mark.parametrize(
    "elsewhere, second, reason",
    [
        (True, {}, "its output is used elsewhere too; the smoothing of one, two stays"),
        (False, {"smooth": None}, "two reads its output without smoothing; the smoothing of one stays"),
        (False, {"smooth": torch.ones(32).half()}, "different smoothing vectors"),
        (False, {"delta": SparseDelta(torch.zeros(1).int(), torch.ones(1))}, "a sparse delta sees the raw input"),
    ],
)
def test_what_cannot_be_folded_stays_and_is_named(elsewhere: bool, second: dict[str, Any], reason: str) -> None:
    actual = folded(Toy(elsewhere), pair_of_records(**second))
    assert not actual.records and not actual.tensors
    assert len(actual.notes) == 1 and actual.notes[0].startswith("norm: ") and reason in actual.notes[0]


def test_a_record_sees_the_divided_input() -> None:
    """With rounded inputs as well: their codes are those of x / s before and after."""
    record = replace(pair_of_records()["one"], activations=ActivationGrid(8, 16))
    assert record.smooth is not None
    x = torch.randn(7, 32)
    before, after = bind(record, backend="reference")(x), bind(folded_record(record), backend="reference")(x / record.smooth.float())
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


def test_a_factor_out_of_range_becomes_bfloat16() -> None:
    record = pair_of_records()["one"]
    assert record.low_rank is not None and record.smooth is not None
    big = replace(record, low_rank=LowRank(record.low_rank.up, torch.full((8, 32), 6e4).half()), smooth=torch.full((32,), 4.0).half())
    down = folded_record(big).low_rank
    assert down is not None and down.down.dtype == torch.bfloat16 and bool(torch.isfinite(down.down).all())


def test_a_shared_factor_stays_shared() -> None:
    records = pair_of_records()
    one = records["one"]
    assert one.low_rank is not None and records["two"].low_rank is not None
    records["two"] = replace(records["two"], low_rank=LowRank(records["two"].low_rank.up, one.low_rank.down, shared="one"))
    actual = settled(folded(Toy(False), records).records)
    assert actual["two"].low_rank.shared == "one" and torch.equal(actual["two"].low_rank.down, actual["one"].low_rank.down)
    assert bind_group([(record, None) for record in actual.values()], backend="cpu-int8").joined


@pytest.mark.usefixtures("no_pages")
def test_the_fuse_stage_folds(tmp_path: Path, small_model: Path, small_text: Path) -> None:
    stages = [
        {"quantize": {"method": "rtn", "bits": 4, "group_size": 32}},
        {"decompose": {"method": "svdquant", "rank": 4, "activation_bits": 8}},
        {"fuse": {"backend": "auto"}},
    ]
    # three thousand tokens: over two hundred, the codes that a last digit tips over are worth two thousandths by themselves
    sections = {"calibration": {"samples": 2, "seq_len": 32}, "evaluation": {"seq_len": 128, "windows": 24}}
    made = runner.run(chosen(tmp_path, small_model, small_text, stages, **sections), tmp_path / "run", device="cpu")
    assert made.stages[-1].perplexity == pytest.approx(made.stages[-2].perplexity, rel=1e-3)
    before, after = (runner.last_artifact(tmp_path / "run", stage) for stage in ("decompose", "fuse"))
    had = {name for name in before.linears if before.stored(name).smooth is not None}
    kept = {name for name in after.linears if after.stored(name).smooth is not None}
    assert had, "the method smoothed something"
    assert kept == {name for name in had if name.endswith(("o_proj", "down_proj"))}
    first = made.stages[-1].notes[0]
    assert first.endswith("smoothing vectors folded into the norms before them") and int(first.split()[0]) > 0
    assert made.stages[-1].tokens_per_second > 0
