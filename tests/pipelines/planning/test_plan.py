"""What --dry-run says is what then happens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.pipelines.devices.compute import Compute
from bitmend.pipelines.export import exporting
from bitmend.pipelines.planning import steps
from bitmend.pipelines.planning.plan import predict, refusals
from bitmend.pipelines.run import runner
from bitmend.pipelines.stages.inputs import Inputs

from ..families import save_speaking
from ..runs import CHAIN, Processes, chosen, write_recipe

pytestmark = pytest.mark.usefixtures("no_pages")

WANDA: dict[str, Any] = {"prune": {"method": "wanda", "sparsity": 0.3}}
QERA: dict[str, Any] = {"decompose": {"method": "qera_exact", "rank": 4}}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "rtn": [{"quantize": {"method": "rtn", "bits": 2, "group_size": 16}}],
    "rtn symmetric": [{"quantize": {"method": "rtn", "bits": 8, "group_size": 64, "symmetric": True}}],
    "gptq in visiting order": [WANDA, {"quantize": {"method": "gptq", "bits": 4, "group_size": 32, "act_order": "full"}}, QERA],
    "nf4": [WANDA, {"quantize": {"method": "nf4", "block_size": 64}}, QERA],
    "nf4 with plain absmax": [{"quantize": {"method": "nf4", "block_size": 64, "double_quantize": False}}],
    "n:m": [{"prune": {"method": "magnitude", "sparsity": 0.5, "pattern": "2:4"}}, QERA],
    "the head as well": [{"quantize": {"method": "gptq", "bits": 4, "group_size": 32, "include_head": True}}],
    "some layers left out": [{"quantize": {"method": "rtn", "group_size": 32, "ignore": ["down_proj"], "overrides": {"v_proj": {"bits": 8}}}}],
    "factors made by recovery": [
        {"quantize": {"method": "rtn", "bits": 3, "group_size": 32}},
        {"recover": {"method": "lora", "rank": 8, "steps": 8, "batch_size": 2, "seq_len": 64, "learning_rate": 3e-3}},
        {"fuse": {"backend": "auto"}},
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_bytes_are_predicted(case: str, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    sections = {"calibration": {"samples": 2, "seq_len": 64}, "evaluation": {"seq_len": 32, "windows": 1}}
    recipe = chosen(tmp_path, small_model, small_text, RECIPES[case], **sections)
    expected = predict(recipe)
    assert expected["refusals"] == [] and json.loads(json.dumps(expected)) == expected
    made = runner.run(recipe, tmp_path / "run")
    assert [row["stage"] for row in expected["stages"]] == [s.stage for s in made.stages]
    for row, stage in zip(expected["stages"], made.stages, strict=True):
        assert row["total_bytes"] == pytest.approx(stage.total_bytes, rel=0.01), row
        if stage.bits_per_weight is not None:
            assert row["bits_per_weight"] == pytest.approx(stage.bits_per_weight, rel=0.002), row


@pytest.mark.parametrize("format_", ["gptq", "compressed-tensors", "bnb", "with an adapter"])
def test_bytes_of_a_quantized_checkpoint_are_predicted(format_: str, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    """Somebody else's checkpoint, as it is imported."""
    sections = {"calibration": {"samples": 2, "seq_len": 64}, "evaluation": {"seq_len": 32, "windows": 1}}
    method = {"method": "nf4", "block_size": 64} if format_ == "bnb" else {"method": "rtn", "bits": 4, "group_size": 32}
    stages = [{"quantize": method}, *([QERA] if format_ == "with an adapter" else [])]
    runner.run(chosen(tmp_path, small_model, small_text, stages, **sections), tmp_path / "theirs")
    adapter = format_ == "with an adapter"
    exporting.export(tmp_path / "theirs", "gptq" if adapter else format_, tmp_path / "checkpoint", adapter=adapter)
    trained = [{"recover": {"method": "scales", "steps": 1, "batch_size": 1, "seq_len": 32, "loss": "cross_entropy"}}]
    recipe = chosen(tmp_path, tmp_path / "checkpoint", small_text, trained, **sections)
    expected = predict(recipe)
    made = runner.run(recipe, tmp_path / "run")
    assert expected["refusals"] == [] and len(made.stages) == 2
    for row, stage in zip(expected["stages"], made.stages, strict=True):
        assert row["bits_per_weight"] == pytest.approx(stage.bits_per_weight, rel=0.002), row
    assert expected["stages"][1]["total_bytes"] == pytest.approx(made.stages[1].total_bytes, rel=0.01)


def test_the_whole_chain_is_predicted(finished: Path, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    expected = predict(chosen(tmp_path, small_model, small_text), finished)
    made = runner.record(finished)
    for row, stage in zip(expected["stages"], made.stages, strict=True):
        assert row["total_bytes"] == pytest.approx(stage.total_bytes, rel=0.01)
    assert expected["finished"] == [s.stage for s in made.stages]
    assert expected["matrices"] == 4 * 7 and expected["blocks"] == 4
    assert expected["parameters"] == 722_048
    assert expected["peak_bytes"] > 4 * 722_048 and expected["disk_bytes"] > sum(s.total_bytes or 0 for s in made.stages[1:]) * 0.98


def test_a_changed_setting_is_not_finished(finished: Path, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    chain = [CHAIN[0], {"quantize": {"method": "gptq", "bits": 4, "group_size": 32}}, *CHAIN[2:]]
    assert predict(chosen(tmp_path, small_model, small_text, chain), finished)["finished"] == ["baseline", "prune"]


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gemma3_text"])
def test_other_families(family: str, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    save_speaking(family, tmp_path / "source", small_model)
    sections = {"calibration": {"samples": 2, "seq_len": 32}, "evaluation": {"seq_len": 32, "windows": 1}}
    chain = [WANDA, {"quantize": {"method": "rtn", "bits": 4, "group_size": 16}}]
    recipe = chosen(tmp_path, tmp_path / "source", small_text, chain, **sections)
    expected, made = predict(recipe), runner.run(recipe, tmp_path / "run")
    for row, stage in zip(expected["stages"], made.stages, strict=True):
        assert row["total_bytes"] == pytest.approx(stage.total_bytes, rel=0.02), row


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "groups": ([{"quantize": {"method": "gptq", "group_size": 48}}], "quantize: model.layers.0"),
    "blocks": ([{"quantize": {"method": "nf4", "block_size": 96}}], "quantize: model.layers.0"),
    "rank": ([{"decompose": {"method": "loftq", "rank": 65}}], "rank 65 is above the smaller dimension 64; choose a smaller one"),
    "svdquant's groups": ([{"decompose": {"method": "svdquant", "rank": 4, "group_size": 48}}], "decompose: model.layers.0"),
    "training what is quantized": ([{"quantize": {"method": "rtn", "group_size": 32}}, {"recover": {"method": "full"}}], "recover: full cannot"),
    "scales of nothing": ([{"recover": {"method": "scales"}}], "recover: scales cannot serve this model: it trains a grid"),
    "svft on 8-bit factors": (
        [{"quantize": {"method": "rtn", "group_size": 32}}, {"decompose": {"method": "qera_exact", "rank": 4, "factor_bits": 8}}, {"recover": {"method": "svft"}}],
        "recover: svft cannot serve this model: its term is stacked onto factors that are (or may come to be) on a grid",
    ),
    "svft behind factors of an open grid": (
        [{"quantize": {"method": "rtn", "group_size": 32}}, {"decompose": {"method": "best", "rank": 4}}, {"recover": {"method": "svft"}}],
        "recover: svft cannot serve this model: its term is stacked onto factors that are (or may come to be) on a grid",
    ),
    "a delta on rounded inputs": (
        [{"quantize": {"method": "rtn", "group_size": 32, "activations": {"bits": 8}}}, {"recover": {"method": "diff_pruning"}}],
        "recover: diff_pruning cannot serve this model: its delta sees the raw input",
    ),
    "a delta behind svdquant": (
        [{"decompose": {"method": "svdquant", "rank": 4, "group_size": 32}}, {"recover": {"method": "diff_pruning"}}],
        "recover: diff_pruning cannot serve this model: its delta sees the raw input",
    ),
    "factors of nothing": ([{"quantize": {"method": "nf4"}}, {"recover": {"method": "loftq"}}], "put a decompose stage before it"),
    "whole scales where no input is rounded": (
        [{"quantize": {"method": "rtn", "group_size": 32}}, {"fuse": {"integer_scales": True}}],
        "fuse.integer_scales: true would not be read: no matrix has its inputs rounded; set quantize.activations",
    ),
    "whole scales of eight bits": (
        [{"quantize": {"method": "rtn", "bits": 8, "group_size": 32, "activations": {"bits": 8}}}, {"fuse": {"integer_scales": True}}],
        "fuse.integer_scales: true would not be read: no matrix with rounded inputs lies on a uniform grid of at most 4 bits",
    ),
    "long batches": ([{"recover": {"method": "lora", "seq_len": 600}}], "recover.seq_len 600 is above the 512 positions"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    chain, words = REFUSED[case]
    recipe = chosen(tmp_path, small_model, small_text, chain)
    lines = refusals(recipe, small_model)
    assert lines and words in lines[0], lines
    assert len(lines) <= 6, "of many layers some are named, the others counted"
    assert predict(recipe)["refusals"] == lines


@pytest.mark.parametrize("case", ["caldera", "best"])
def test_presets_of_every_kind_can_be_planned(case: str, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    chain = [{"quantize": {"method": "rtn", "group_size": 32}}, {"decompose": {"method": case, "rank": 4}}]
    rows = predict(chosen(tmp_path, small_model, small_text, chain))["stages"]
    assert rows[2]["total_bytes"] > rows[1]["total_bytes"]


def test_a_dry_run_does_nothing(commands: Processes, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    arguments = [
        "run",
        str(write_recipe(tmp_path / "r.yaml")),
        "-m",
        str(small_model),
        "--data",
        str(small_text),
        "-o",
        str(tmp_path / "run"),
    ]
    assert commands.run([*arguments, "--dry-run", "--json"], tmp_path / "log") == 0
    text = (tmp_path / "log").read_text()
    assert json.loads(text[text.index("{") :])["matrices"] == 28
    assert not (tmp_path / "run").exists()
    assert commands.run([*arguments, "--dry-run", "--set", "quantize.group_size=48"], tmp_path / "log") == 2
    assert "error: this run would be refused: quantize: model.layers.0" in (tmp_path / "log").read_text()


def test_the_number_of_ranks_is_in_the_keys_of_what_trains_in_parts_alone(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    def keys(ranks: int, **settings: bool) -> list[str]:
        recipe = chosen(tmp_path, small_model, small_text, [{"quantize": {"method": "rtn"}}, {"recover": {"method": "qat", **settings}}])
        compute = Compute(torch.device("cpu"), torch.float32)
        return [step.key for step in steps.plan_steps(recipe, small_model, Inputs(recipe, small_model), compute, ranks=ranks)]

    assert keys(1) == keys(2) == keys(1, shard=True)
    two, four = keys(2, shard=True), keys(4, shard=True)
    assert two[:-1] == four[:-1] == keys(1)[:-1] and len({two[-1], four[-1], keys(1)[-1]}) == 3


def test_the_order_of_sums_is_in_the_keys_of_stages_that_read_calibration_text(
    small_model: Path, small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = chosen(tmp_path, small_model, small_text, [{"quantize": {"method": "nf4"}}, QERA, {"recover": {"method": "lora"}}])

    def keys() -> list[str]:
        return [step.key for step in steps.plan_steps(recipe, small_model, Inputs(recipe, small_model), Compute(torch.device("cpu"), torch.float32))]

    now = keys()
    monkeypatch.setattr(steps, "SUMS", steps.SUMS - 1)
    assert [a == b for a, b in zip(now, keys(), strict=True)] == [True, True, False, False]
