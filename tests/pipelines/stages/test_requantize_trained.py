"""Dequantize, train, requantize: the trained weights are rounded by GPTQ on the inputs that the blocks below, rounded already, hand in."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.gptq import GptqConfig, gptq
from bitmend.compress.rounding import RtnConfig, rtn
from bitmend.compress.statistics import InputStatistics, LayerStatistics
from bitmend.compress.weights import DenseWeight, StoredWeight, UniformWeight
from bitmend.pipelines.evaluation.perplexity import embedded
from bitmend.pipelines.models.blocks import StreamedModel
from bitmend.pipelines.models.collecting import collect
from bitmend.pipelines.models.hidden import Room
from bitmend.pipelines.recipes.recipe import resolve
from bitmend.pipelines.stages import requantize_trained as stage
from bitmend.pipelines.stages.inputs import Inputs
from bitmend.recover.whole_matrices import MaskedDense, round_again

from ..families import save_speaking
from ..toy import CPU, STEPS, opened, run, toy_text

pytestmark = pytest.mark.usefixtures("no_pages")

PRUNE = {"prune": {"method": "magnitude", "sparsity": 0.25}}
QUANTIZE = {"quantize": {"method": "gptq", "bits": 3, "group_size": 16}}
TRAIN: dict[str, Any] = {"method": "dequantize_train_requantize", **STEPS, "learning_rate": 1e-3}


def test_it_beats_rounding_to_nearest_under_a_mask_and_with_factors(small_model: Path, tmp_path: Path) -> None:
    text, kept = toy_text(tmp_path / "toy.jsonl"), {}
    for quantizer in ("gptq", "rtn"):
        stages = [PRUNE, QUANTIZE, {"decompose": {"method": "qera_exact", "rank": 2}}, {"recover": TRAIN | {"quantizer": quantizer}}]
        made = run(tmp_path, small_model, text, stages, calibration={"samples": 16, "seq_len": 32}).stages[-1]
        kept[quantizer] = made.metrics["held_out_loss_kept"]
        before, after = opened(tmp_path, "decompose"), opened(tmp_path, "recover")
        moved = 0
        for name in before.linears:
            old, new = before.stored(name), after.stored(name)
            assert old.mask is not None and new.mask is not None and torch.equal(old.mask, new.mask)
            assert not bool(new.base_dense()[~new.mask_OI()].any()) and new.low_rank is not None
            moved += not torch.equal(old.base.codes, new.base.codes)
        assert moved == len(before.linears), made.notes
    assert kept["gptq"] < kept["rtn"] - 0.01, kept


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_block_is_rounded_on_what_the_rounded_ones_below_hand_in(
    family: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: q of the second block is GPTQ of its trained weight, on what the first block, read from disk, makes of the text."""
    trained: dict[str, torch.Tensor] = {}
    plain = stage._round

    def seen(name: str, linear: Any, weight: Any, inputs: Any) -> None:
        trained[name] = weight.weight.detach().clone()
        plain(name, linear, weight, inputs)

    monkeypatch.setattr(stage, "_round", seen)
    save_speaking(family, tmp_path / "model", small_model, num_hidden_layers=2)
    config = TRAIN | {"norms": False, "learning_rate": 1e-2}
    run(tmp_path, tmp_path / "model", toy_text(tmp_path / "toy.jsonl"), [QUANTIZE, {"recover": config}])
    before, after = opened(tmp_path, "quantize"), opened(tmp_path, "recover")
    assert set(trained) == set(after.linears), "experts, too"
    model, name = StreamedModel(after, CPU), "model.layers.1.self_attn.q_proj"
    ids = Inputs(resolve(str(tmp_path / "run" / "recipe.resolved.yaml")), after.directory).calibration()
    with torch.no_grad():
        hidden = embedded(model, ids, Room(CPU))
        model.load_block(0)
        hidden.through(partial(model.run_block, 0))
        model.load_block(1)
        sites = [site for site in model.structure.of_block(1) if site.name == name]
        statistics = collect(model, 1, hidden, sites, frozenset({"second_moment"}))
        expected, _ = gptq(before.stored(name), trained[name], LayerStatistics(statistics[name]), GptqConfig(3, 16))
    stored = after.stored(name).base
    assert isinstance(stored, UniformWeight) and isinstance(expected.base, UniformWeight)
    assert float((stored.codes_OI() != expected.base.codes_OI()).float().mean()) < 0.01, "but for the order of sums"
    assert float((stored.codes_OI() != before.stored(name).base.codes_OI()).float().mean()) > 0.01
    idle = [n for n in after.linears if not torch.isfinite(after.stored(n).dense()).all()]
    assert not idle


def test_what_waits_is_not_stored_unrounded() -> None:
    base = rtn(
        StoredWeight(DenseWeight(torch.randn(8, 32))),
        torch.randn(8, 32),
        LayerStatistics(InputStatistics(32, frozenset())),
        RtnConfig(4, 16, clip="none"),
    )[0].base
    weight = MaskedDense(StoredWeight(base), waits=True)
    assert weight.fold(weight.stored).base is base, "untouched"
    weight.weight.data.mul_(1.5)
    with pytest.raises(ValueError, match="waits to be rounded"):
        weight.fold(weight.stored)
    weight.round_by(round_again, weight.stored)
    folded = weight.fold(weight.stored)
    assert torch.equal(folded.base_dense(), weight.weight) and torch.equal(
        folded.base_dense(), round_again(1.5 * base.dense(), folded).base_dense()
    )
