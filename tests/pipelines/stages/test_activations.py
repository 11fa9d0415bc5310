"""W4A8 and W4A4: the setting is stored, simulated wherever the model runs, survives the stages after it, and no export pretends to carry it."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.activation_grid import fake_quantize
from bitmend.compress.weights import ActivationGrid, DenseWeight, StoredWeight
from bitmend.pipelines.errors import UsageError
from bitmend.pipelines.evaluation.perplexity import last_hidden
from bitmend.pipelines.export import exporting
from bitmend.pipelines.formats import FORMATS
from bitmend.pipelines.models.blocks import StreamedModel
from bitmend.pipelines.models.loading import whole_model
from bitmend.pipelines.models.rounded_inputs import raw_inputs, round_inputs
from bitmend.pipelines.planning.plan import refusals
from bitmend.pipelines.recipes.recipe import resolve
from bitmend.pipelines.run import runner
from torch import nn

from ..families import save_speaking
from ..runs import chosen, write_recipe

pytestmark = pytest.mark.usefixtures("no_pages")

CPU = torch.device("cpu")
FEW: dict[str, Any] = {"calibration": {"samples": 2, "seq_len": 32}, "evaluation": {"seq_len": 32, "windows": 2}}
A4 = {"bits": 4, "group_size": 16}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_model: Path, small_text: Path) -> Path:
    place = tmp_path_factory.mktemp("activations")
    stages = [
        {"quantize": {"method": "gptq", "bits": 4, "group_size": 32, "activations": A4, "include_head": True}},
        {"decompose": {"method": "best", "rank": 4}},
        {"recover": {"method": "lora", "steps": 1, "batch_size": 1, "seq_len": 32}},
        {"fuse": {"backend": "reference"}},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitmend.reports.page.html", lambda record: "html\n")
        runner.run(chosen(place, small_model, small_text, stages, **FEW), place / "run")
    return place / "run"


def test_every_later_stage_keeps_it(run: Path) -> None:
    for stage in ("quantize", "decompose", "recover", "fuse"):
        artifact = runner.last_artifact(run, stage)
        assert {artifact.stored(n).activations for n in artifact.linears} == {ActivationGrid(4, 16)}
    made = runner.record(run).stages
    assert made[1].settings["activations"] == A4
    assert any(note.startswith("inputs are rounded to 4 bits, per token in groups of 16: simulated") for note in made[1].notes)
    assert made[-1].perplexity == pytest.approx(made[-2].perplexity, rel=0.01), "a rounding may flip, hence not closer"


def by_definition(record: StoredWeight, module: Any, args: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    """The base on the rounded input, the low-rank term on the raw one."""
    y = nn.functional.linear(fake_quantize(args[0], 4, 16), record.base_dense())
    return y if record.low_rank is None else y + nn.functional.linear(args[0], record.low_rank.dense())


def test_what_is_measured_rounds_every_input(run: Path) -> None:
    """By hand: the dense weights in a plain model, every linear's input through the grid, the low-rank term added."""
    artifact = runner.last_artifact(run, "decompose")
    streamed = StreamedModel(artifact, CPU)
    ids = torch.arange(5, 37).view(1, -1)
    with torch.no_grad():
        actual = streamed.logits(last_hidden(streamed, ids))
        whole = whole_model(artifact, CPU, torch.float32).model
        torch.testing.assert_close(whole(ids).logits, actual, rtol=1e-4, atol=1e-4)
        for name, module in whole.named_modules():
            if name in artifact.linears:
                raw_inputs(module)
                module.register_forward_hook(partial(by_definition, artifact.stored(name)))
        by_hand = whole(ids).logits
        torch.testing.assert_close(by_hand, actual, rtol=1e-3, atol=2e-3)
        plain = StreamedModel(artifact, CPU)
        for module in plain.model.modules():
            raw_inputs(module)
        assert float((plain.logits(last_hidden(streamed, ids)) - actual).abs().max()) > 1e-2, "the head's input, too"


def test_experts_round_theirs(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    """An expert at a time against the whole block; without it a mixture would look better than it is."""
    save_speaking("mixtral", tmp_path / "source", small_model, num_hidden_layers=1)
    stages = [{"quantize": {"method": "rtn", "bits": 8, "group_size": 16, "activations": A4}}]
    runner.run(chosen(tmp_path, tmp_path / "source", small_text, stages, **FEW), tmp_path / "run")
    artifact = runner.last_artifact(tmp_path / "run")
    streamed = StreamedModel(artifact, CPU)
    streamed.embed(torch.arange(5, 29).view(2, 12))
    experts = streamed.load_block(0).get_submodule("mlp.experts")
    hidden, weights = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)), torch.ones(24, 1)
    with torch.no_grad():
        for number in range(4):
            stored = [artifact.stored(f"model.layers.0.mlp.experts.{p}.{number}").dense() for p in ("gate_up_proj", "down_proj")]
            gate, up = nn.functional.linear(fake_quantize(hidden, 4, 16), stored[0]).chunk(2, -1)
            expected = nn.functional.linear(fake_quantize(nn.functional.silu(gate) * up, 4, 16), stored[1])
            actual = experts(hidden, torch.full((24, 1), number), weights)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        streamed.unload_block(0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in streamed.model.modules())


def test_a_new_base_replaces_the_old_one_and_gradients_pass_straight_through() -> None:
    linear = nn.Linear(32, 8, bias=False).requires_grad_(False)
    x = torch.randn(4, 32, requires_grad=True)
    for seed in (1, 2):
        weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))
        linear.weight.data = weight
        round_inputs(linear, StoredWeight(DenseWeight(weight), activations=ActivationGrid(4, 16)))
        torch.testing.assert_close(linear(x), nn.functional.linear(fake_quantize(x, 4, 16), weight))
        (gradient,) = torch.autograd.grad(linear(x).sum(), x)
        torch.testing.assert_close(gradient, weight.sum(0).expand(4, 32))
    assert len(linear._forward_hooks) == 1
    round_inputs(linear, StoredWeight(DenseWeight(weight)))
    assert torch.equal(linear(x), nn.functional.linear(x, weight)) and not linear._forward_hooks


@pytest.mark.parametrize("format_", FORMATS)
def test_no_format_carries_it(format_: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"4-bit activations of this artifact; export the stage before|NormalFloat4"):
        exporting.export(run, format_, tmp_path / "out", stage="quantize")
    assert not (tmp_path / "out").exists()


BAD = {
    "bits": ({"bits": 6}, "activations.bits: expected 4.8, got 6"),
    "groups of nothing": ({"bits": 8, "group_size": 0}, "activations.group_size: expected -1 or 1 … 65,536, got 0"),
    "an unknown key": ({"bits": 8, "size": 3}, "did you mean|unknown setting"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_settings_that_make_no_sense(case: str, tmp_path: Path) -> None:
    settings, words = BAD[case]
    with pytest.raises(UsageError, match=words):
        resolve(str(write_recipe(tmp_path / "r.yaml", [{"quantize": {"method": "nf4", "activations": settings}}])))


def test_groups_must_divide(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    stages = [{"quantize": {"method": "rtn", "activations": {"bits": 8, "group_size": 48}}}]
    lines = refusals(chosen(tmp_path, small_model, small_text, stages), small_model)
    assert "in_features 128 is not a multiple of activations.group_size 48; choose one that divides it" in lines[0]
