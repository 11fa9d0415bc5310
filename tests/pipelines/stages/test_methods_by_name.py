"""Every pruning and quantizing method by its name on what is not a plain linear: experts, Conv1D, a head that is the embedding too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.methods import PRUNE, QUANTIZE
from bitmend.compress.weights import NormalFloatWeight, UniformWeight
from bitmend.pipelines.errors import UsageError
from bitmend.pipelines.models.blocks import StreamedModel
from bitmend.pipelines.recipes.recipe import resolve
from bitmend.pipelines.run import runner

from ..families import save_speaking
from ..runs import chosen, write_recipe

pytestmark = pytest.mark.usefixtures("no_pages")

FEW: dict[str, Any] = {"calibration": {"samples": 2, "seq_len": 32}, "evaluation": {"seq_len": 32, "windows": 1}}
FAMILIES = {"mixtral": {}, "gpt2": {}, "llama": {"tie_word_embeddings": True}}


def settings_of(stage: str, name: str, number: int) -> dict[str, Any]:
    """The smallest that means something; sparsity rises, since what is dropped stays dropped."""
    if stage == "prune":
        return {"method": name, "sparsity": 0.1 * (number + 1)}
    row = QUANTIZE[name]
    size = "block_size" if "block_size" in row.config.__dataclass_fields__ else "group_size"
    training = {"steps": 2, "batch_size": 1, "seq_len": 32} if row.scope == "block" else {}
    head = {"include_head": True} if row.scope == "matrix" else {}
    return {"method": name, size: 16, **training, **head}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_them_one_after_the_other(family: str, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    save_speaking(family, tmp_path / "source", small_model, num_hidden_layers=1, **FAMILIES[family])
    stages = [{"prune": settings_of("prune", name, i)} for i, name in enumerate(PRUNE)]
    stages += [{"quantize": settings_of("quantize", name, i)} for i, name in enumerate(QUANTIZE)]
    made = runner.run(chosen(tmp_path, tmp_path / "source", small_text, stages, **FEW), tmp_path / "run")
    assert [s.method for s in made.stages[1:]] == [*PRUNE, *QUANTIZE]
    for stage in made.stages[1:]:
        artifact = runner.last_artifact(tmp_path / "run", stage.stage)
        model = StreamedModel(artifact, torch.device("cpu"))
        in_blocks = {s.name: s for s in model.structure.of_block(0)}
        assert set(in_blocks) <= set(artifact.linears)
        for name, site in in_blocks.items():
            record = artifact.stored(name)
            assert record.shape == site.shape and record.mask is not None
            assert isinstance(record.base, UniformWeight | NormalFloatWeight) == (stage.stage.startswith("quantize"))
            assert bool((record.base.dense()[~record.mask_OI()] == 0).all())
        if stage.stage.startswith("quantize"):
            assert model.model.get_output_embeddings().weight is model.model.get_input_embeddings().weight or family == "mixtral"
            assert ("lm_head" in artifact.linears) == (stage.stage != "quantize" or QUANTIZE[str(stage.method)].scope == "matrix")
        assert stage.perplexity is not None and stage.perplexity < 1e6


def test_overrides_by_regex_on_the_command_line(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    """The later of two that match lies over the earlier one."""
    path = write_recipe(tmp_path / "r.yaml", [{"quantize": {"method": "gptq", "bits": 4, "group_size": 32}}], **FEW)
    sets = ["quantize.overrides={'mlp': {bits: 3}, 'layers\\.[12]\\..*down_proj$': {bits: 8, group_size: 64}}"]
    recipe = resolve(str(path), sets=sets, options={"model": str(small_model), "data": str(small_text)})
    runner.run(recipe, tmp_path / "run")
    artifact = runner.last_artifact(tmp_path / "run")
    for name in artifact.linears:
        base = artifact.stored(name).base
        assert isinstance(base, UniformWeight)
        special = name.endswith("down_proj") and name.split(".")[2] in "12"
        assert (base.bits, base.group_size) == ((8, 64) if special else (3 if "mlp" in name else 4, 32)), name


def test_the_head_is_in_no_block(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.yaml", [{"quantize": {"method": "block_training", "include_head": True}}])
    with pytest.raises(UsageError, match="block_training trains decoder blocks, and the head is in none"):
        resolve(str(path))
