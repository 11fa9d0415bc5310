"""The types of ggml through a run: sizes as planned, masks and small codes kept, GPTQ no worse than rounding, refusals before any work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.ggml_types import GGML_TYPES
from bitmend.compress.weights import GgmlWeight
from bitmend.pipelines.errors import UsageError
from bitmend.pipelines.export import exporting
from bitmend.pipelines.planning.plan import predict
from bitmend.pipelines.recipes.recipe import Recipe, resolve
from bitmend.pipelines.run import runner
from bitmend.pipelines.run.generate import generate
from bitmend.pipelines.run.opening import last_artifact

from ..runs import chosen, write_recipe

pytestmark = pytest.mark.usefixtures("no_pages")

FEW: dict[str, Any] = {"calibration": {"samples": 8, "seq_len": 64}, "evaluation": {"seq_len": 64, "windows": 8}}
ENOUGH: dict[str, Any] = {"calibration": {"samples": 32, "seq_len": 128}, "evaluation": {"seq_len": 128, "windows": 16}}
TRAINED: dict[str, Any] = {"steps": 4, "batch_size": 1, "seq_len": 64, "eval_every": 2}
CHAIN: list[dict[str, Any]] = [
    {"prune": {"method": "wanda", "pattern": "2:4"}},
    {"quantize": {"method": "gptq", "grid": "q3_k", "include_embeddings": True}},
    {"decompose": {"method": "best", "rank": 4, "iterations": 1}},
    {"recover": {"method": "scales", **TRAINED}},
    {"fuse": {"backend": "dense"}},
]
NOTE = "24 matrices have 128 columns, no multiple of the 256 of a block of {}: they are {}, {} bits a weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_model: Path, small_text: Path) -> tuple[Recipe, Path]:
    place = tmp_path_factory.mktemp("ggml")
    recipe = chosen(place, small_model, small_text, CHAIN, **FEW)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitmend.reports.page.html", lambda record: "html\n")
        runner.run(recipe, place / "run", device="cpu")
    return recipe, place / "run"


def test_masks_codes_and_small_codes_survive_what_comes_after(run: tuple[Recipe, Path]) -> None:
    made = {stage: last_artifact(run[1], stage) for stage in ("prune", "quantize", "decompose", "recover", "fuse")}
    trained = 0
    for name in made["prune"].linears:
        records = [made[stage].stored(name) for stage in ("quantize", "decompose", "recover", "fuse")]
        kinds = {record.base.type for record in records if isinstance(record.base, GgmlWeight)}
        assert kinds == {"q3_k" if "down_proj" in name else "q4_0"}
        mask = made["prune"].stored(name).mask_OI()
        assert mask is not None and all(torch.equal(record.mask_OI(), mask) for record in records)
        assert not any(record.base.dense()[~mask].any() for record in records), "the zeros are in the codes"
        decomposed, recovered, fused = (to_parts(record.base) for record in records[1:])
        assert torch.equal(decomposed["codes"], recovered["codes"]) and all(torch.equal(recovered[n], fused[n]) for n in fused)
        assert "small_codes" not in decomposed or torch.equal(decomposed["small_codes"], recovered["small_codes"])
        assert recovered["super_scales"].dtype == torch.float16
        trained += int((decomposed["super_scales"] != recovered["super_scales"]).sum())
    table = made["quantize"].stored("model.embed_tokens").base
    assert isinstance(table, GgmlWeight) and table.type == "q8_0"
    assert trained


def to_parts(base: GgmlWeight) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(base).items() if isinstance(value, torch.Tensor)}


def test_sizes_are_as_planned_and_the_report_says_what_took_the_place(run: tuple[Recipe, Path]) -> None:
    recipe, directory = run
    planned = {row["stage"]: row for row in predict(recipe)["stages"]}
    stages = {stage.stage: stage for stage in runner.record(directory).stages}
    for stage in ("quantize", "decompose", "recover"):
        assert planned[stage]["bits_per_weight"] == pytest.approx(stages[stage].bits_per_weight, abs=2e-3 if stage == "quantize" else 1.0)
    assert planned["quantize"]["total_bytes"] == pytest.approx(stages["quantize"].total_bytes, rel=0.01)
    note = NOTE.format("q3_k", "q4_0", 4.5)
    assert note in stages["quantize"].notes and f"quantize: {note}" in predict(recipe)["warnings"]
    layer = next(layer for layer in stages["quantize"].layers if layer.name.endswith("down_proj"))
    assert layer.bits_per_weight == pytest.approx(GGML_TYPES["q3_k"].block_bits / 256 + 1), "a bit of it is the mask's"


def test_it_generates_and_leaves_as_dense_alone(run: tuple[Recipe, Path], tmp_path: Path) -> None:
    _, directory = run
    assert "".join(generate(directory, "The river", max_new_tokens=2))
    with pytest.raises(UsageError, match="has no place for ggml's q3_k; --format gguf carries it, --format dense its values"):
        exporting.export(directory, "gptq", tmp_path / "gptq", stage="quantize")
    for format_ in ("bnb", "compressed-tensors"):
        with pytest.raises(UsageError, match="has no place for ggml's"):
            exporting.export(directory, format_, tmp_path / format_, stage="quantize")
    made = exporting.export(directory, "dense", tmp_path / "dense", stage="quantize")
    assert made["perplexity"] == pytest.approx(made["artifact_perplexity"], rel=1e-4)


@pytest.mark.parametrize("grid", ["q2_k"])
def test_gptq_loses_less_than_rounding_on_the_same_grid(grid: str, tmp_path: Path, small_model: Path, small_text: Path) -> None:
    actual = {}
    for method in ("rtn", "gptq"):
        recipe = chosen(tmp_path, small_model, small_text, [{"quantize": {"method": method, "grid": grid}}], **ENOUGH)
        runner.run(recipe, tmp_path / method, device="cpu")
        actual[method] = next(s for s in runner.record(tmp_path / method).stages if s.stage == "quantize")
    assert actual["gptq"].kl_to_baseline < actual["rtn"].kl_to_baseline
    assert actual["gptq"].perplexity < actual["rtn"].perplexity
    assert actual["gptq"].bits_per_weight == actual["rtn"].bits_per_weight


@pytest.mark.parametrize(
    "stages, message",
    [
        ([{"quantize": {"grid": "q4_k", "bits": 3}}], "quantize: bits 3 contradicts grid q4_k, whose bits is 4: leave bits out"),
        ([{"quantize": {"grid": "q4_k", "group_size": 64}}], "group_size 64 contradicts grid q4_k, whose group_size is 32"),
        ([{"quantize": {"grid": "q4_k", "act_order": "full"}}], "grid q4_k is fitted before the sweep: act_order full"),
        ([{"quantize": {"grid": "q7_k"}}], "quantize.grid: expected uniform|q4_0"),
        ([{"quantize": {"method": "nf4", "grid": "q4_k"}}], "unknown setting of quantize nf4"),
    ],
)
def test_contradictions_are_usage_errors(stages: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        resolve(str(write_recipe(tmp_path / "recipe.yaml", stages)))
    assert message in str(raised.value)


def test_a_grid_lies_over_the_bits_of_a_lower_layer(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", [{"quantize": {"method": "gptq", "bits": 3, "group_size": 64}}])
    config = resolve(str(path), sets=["quantize.grid=q6_k"]).stages[0].config
    assert (config.grid, config.bits, config.group_size, config.symmetric) == ("q6_k", 6, 16, True)
    with pytest.raises(UsageError, match="bits 3 contradicts grid q6_k"):
        resolve(str(path), sets=["quantize.grid=q6_k", "quantize.bits=3"])
    overridden = write_recipe(tmp_path / "o.yaml", [{"quantize": {"bits": 3, "overrides": {"down_proj": {"grid": "q5_k"}}}}])
    assert resolve(str(overridden)).stages[0].config_for("model.layers.0.mlp.down_proj").bits == 5


def test_what_cannot_be_is_refused_in_the_dry_run(tmp_path: Path, small_model: Path, small_text: Path) -> None:
    pruned = [{"prune": {"method": "magnitude"}}, {"quantize": {"method": "rtn", "grid": "q4_k"}}]
    refused = predict(chosen(tmp_path, small_model, small_text, pruned, **FEW))["refusals"]
    assert any("q4_k has no code for 0, since it has minima" in line for line in refused)
    for method, reason in (("qa_lora", "zero points of a uniform grid"), ("lr_qat", "the types of GGUF have not"), ("lota", "the types of GGUF have not")):
        stages = [{"quantize": {"method": "rtn", "grid": "q4_k"}}, {"recover": {"method": method, **TRAINED}}]
        refused = predict(chosen(tmp_path, small_model, small_text, stages, **FEW))["refusals"]
        assert any(reason in line for line in refused), method
    for budget, refusals in (("4bpw", 1), ("5bpw", 0)):  # the least of rows of 128 is Q4_0's 4.5
        spent = predict(chosen(tmp_path, small_model, small_text, [{"quantize": {"grid": "q4_k"}}], **FEW, budget=budget))
        assert len(spent["refusals"]) == refusals and all("is infeasible: the smallest" in line for line in spent["refusals"])
