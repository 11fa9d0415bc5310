"""Token embeddings on a grid: one stored matrix where they are the head too, dense again in every export, never trained by mistake."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.grids import UniformGrid
from bitmend.compress.rounding import round_uniform
from bitmend.compress.weights import UniformWeight
from bitmend.pipelines.errors import UsageError
from bitmend.pipelines.export import exporting
from bitmend.pipelines.models.loading import whole_model
from bitmend.pipelines.planning.plan import predict
from bitmend.pipelines.recipes.recipe import resolve
from bitmend.pipelines.run import runner
from bitmend.pipelines.run.generate import generate
from bitmend.pipelines.run.opening import load
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ..families import save_speaking
from ..runs import chosen, write_recipe

pytestmark = pytest.mark.usefixtures("no_pages")

FEW: dict[str, Any] = {"calibration": {"samples": 2, "seq_len": 32}, "evaluation": {"seq_len": 32, "windows": 2}}
RTN: dict[str, Any] = {"method": "rtn", "bits": 4, "group_size": 32, "include_embeddings": True}
TRAINED: dict[str, Any] = {"method": "perp", "steps": 1, "batch_size": 1, "seq_len": 32}
TABLE = "model.embed_tokens"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_model: Path, small_text: Path) -> Path:
    """Tied: quantized with the embeddings, decomposed, recovered, fused."""
    place = tmp_path_factory.mktemp("embeddings")
    stages = [{"quantize": RTN}, {"decompose": {"rank": 4}}, {"recover": {**TRAINED, "method": "lora"}}, {"fuse": {}}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitmend.reports.page.html", lambda record: "html\n")
        runner.run(chosen(place, small_model, small_text, stages, **FEW), place / "run")
    return place / "run"


def test_one_matrix_is_stored_once_and_rounded_to_nearest(run: Path, small_model: Path) -> None:
    table = load_file(small_model / "model.safetensors")[f"{TABLE}.weight"]
    expected = round_uniform(table, UniformGrid(8, 32), "power")
    for stage in ("quantize", "decompose", "recover", "fuse"):
        artifact = runner.last_artifact(run, stage)
        base = artifact.stored(TABLE).base
        assert isinstance(base, UniformWeight) and base.bits == 8
        assert torch.equal(base.codes, expected.codes) and torch.equal(base.scales, expected.scales)
        assert not {"lm_head.weight", f"{TABLE}.weight"} & set(artifact.index) and "lm_head" not in artifact.linears
    record = runner.record(run)
    layer = next(x for x in record.stages[1].layers if x.name == TABLE)
    assert layer.bits_per_weight is not None and 8 < layer.bits_per_weight < 9
    assert 0 < (layer.relative_output_error or 0) < 0.01
    assert "lm_head is one matrix with model.embed_tokens: both are rounded to 8 bits" in record.stages[1].notes
    loaded = whole_model(artifact, torch.device("cpu"), torch.float32).model
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().weight, base.dense())
    ids = torch.arange(5, 21).view(1, -1)
    with torch.no_grad():
        actual, expected_logits = load(run)(ids).logits, loaded(ids).logits
    assert float((actual - expected_logits).norm() / expected_logits.norm()) < 0.02, "the kernels' bfloat16 is all that differs"
    assert "".join(generate(run, "The river", max_new_tokens=2))


@pytest.mark.parametrize("format_", ["dense", "gptq", "compressed-tensors"])
def test_every_export_has_the_table_densely_and_says_so(format_: str, run: Path, tmp_path: Path) -> None:
    stage = runner.record(run).stages[1]
    actual = exporting.export(run, format_, tmp_path / "out", stage="quantize")
    assert actual["perplexity"] == pytest.approx(stage.perplexity, rel=1e-4)
    note_text = "model.embed_tokens: rounded to 8 bits in the artifact, written densely here"
    assert any(note.startswith(note_text) for note in actual["notes"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert note_text in card and card.count(note_text) == 1
    assert "# model: rtn 4 bits" in card and str(run) not in card
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors[f"{TABLE}.weight"], runner.last_artifact(run, "quantize").stored(TABLE).dense())
    if format_ == "dense":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("settings", [
    {"head": True}, {"embeddings": True},
])  # fmt: skip
def test_what_lies_on_a_grid_does_not_train_as_plain_numbers(
    settings: dict[str, bool], small_model: Path, small_text: Path, tmp_path: Path
) -> None:
    stages = [{"quantize": RTN}, {"recover": {**TRAINED, **settings}}]
    with pytest.raises(UsageError, match="recover: the (head|embeddings?) (is|are) compressed and cannot train"):
        runner.run(chosen(tmp_path, small_model, small_text, stages, **FEW), tmp_path / "run")


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, int]]] = {
    # family, changes of its config, settings, bits of the records outside the blocks
    "tied": ("llama", {"tie_word_embeddings": True}, {"embedding_bits": 3}, {TABLE: 3}),
    "tied, the head too": ("llama", {"tie_word_embeddings": True}, {"include_head": True}, {"lm_head": 4}),
    "apart": ("llama", {"tie_word_embeddings": False}, {"embedding_bits": 4}, {TABLE: 4}),
    "apart, both": ("llama", {"tie_word_embeddings": False}, {"include_head": True}, {TABLE: 8, "lm_head": 4}),
    "apart, the head to nearest": ("llama", {"tie_word_embeddings": False}, {"head_bits": 3}, {TABLE: 8, "lm_head": 3}),
    "tied, the head to nearest": ("llama", {"tie_word_embeddings": True}, {"include_embeddings": False, "head_bits": 8}, {"lm_head": 8}),
    "tied, both to nearest": ("llama", {"tie_word_embeddings": True}, {"head_bits": 3}, {TABLE: 8}),
    "positions stay": ("gpt2", {}, {}, {"transformer.wte": 8}),
    "narrower than the model": ("opt", {}, {"group_size": 64}, {"model.decoder.embed_tokens": 8}),
    "scaled by the model": ("gemma3_text", {}, {}, {TABLE: 8}),
    "left out by name": ("llama", {}, {"ignore": ["embed_tokens"]}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_families_and_bytes(case: str, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    family, changes, settings, bits = CASES[case]
    kinds = {} if family != "gemma3_text" else {"layer_types": ["full_attention"]}
    save_speaking(family, tmp_path / "source", small_model, num_hidden_layers=1, **kinds, **changes)
    stages = [{"quantize": {**RTN, "group_size": 16, **settings}}, {"prune": {"method": "magnitude", "sparsity": 0.2}}]
    recipe = chosen(tmp_path, tmp_path / "source", small_text, stages, **FEW)
    expected, made = predict(recipe), runner.run(recipe, tmp_path / "run")
    artifact = runner.last_artifact(tmp_path / "run")
    outside = {n: artifact.stored(n).base.bits for n in artifact.linears if ".0." not in n}
    assert outside == bits
    for row, stage in zip(expected["stages"], made.stages, strict=True):
        assert row["total_bytes"] == pytest.approx(stage.total_bytes, rel=0.01), row
        if stage.bits_per_weight is not None:
            assert row["bits_per_weight"] == pytest.approx(stage.bits_per_weight, rel=1e-3), row
    if case == "positions stay":
        assert "transformer.wpe.weight" in artifact.index
    if case == "narrower than the model":
        assert artifact.stored("model.decoder.embed_tokens").base.group_size == 32, "the largest below 64 that divides"
    if case == "tied, the head too":
        assert any("lm_head, which rtn compressed: embedding_bits does not count" in note for note in made.stages[1].notes)


def test_quantized_twice_is_one_matrix_still(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    """First the table, then the head it is one with: the second takes the first one's place."""
    stages = [{"quantize": RTN}, {"quantize": {"method": "gptq", "bits": 4, "group_size": 32, "include_head": True}}]
    runner.run(chosen(tmp_path, small_model, small_text, stages, **FEW), tmp_path / "run")
    artifact = runner.last_artifact(tmp_path / "run")
    assert "lm_head" in artifact.linears and TABLE not in artifact.linears
    assert not [n for n in artifact.index if n.startswith(TABLE)]


@pytest.mark.parametrize(("setting", "words"), [
    ({"embedding_bits": 7}, r"quantize.embedding_bits: expected 2\|3\|4\|5\|6\|8, got 7"),
    ({"head_bits": 7}, r"quantize.head_bits: expected 2\|3\|4\|5\|6\|8\|null, got 7"),
    ({"head_bits": 8, "include_head": True}, "quantize.head_bits: include_head compresses the head by the method"),
    ({"include_embeddings": "yes"}, r"quantize.include_embeddings: expected true\|false, got 'yes'"),
])  # fmt: skip
def test_settings_that_make_no_sense(setting: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        resolve(str(write_recipe(tmp_path / "r.yaml", [{"quantize": {"method": "rtn", **setting}}])))
    with pytest.raises(UsageError, match="unknown setting of prune wanda 'include_embeddings'"):
        resolve(str(write_recipe(tmp_path / "r.yaml", [{"prune": {"include_embeddings": True}}])))


def test_embeddings_that_are_one_matrix_with_an_exact_head_are_refused(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    save_speaking("llama", tmp_path / "source", small_model, num_hidden_layers=1, tie_word_embeddings=True)
    recipe = chosen(tmp_path, tmp_path / "source", small_text, [{"quantize": {**RTN, "ignore": ["lm_head"]}}], **FEW)
    words = f"quantize: lm_head is to stay as it is \\(ignore\\) and is one matrix with {TABLE}; set include_embeddings to false"
    with pytest.raises(UsageError, match=words):
        runner.run(recipe, tmp_path / "run")
