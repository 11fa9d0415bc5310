"""The recover stage: step 0 is the artifact, what is stored is what was promised, and nothing that must hold is lost unseen."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.packing import pack_codes
from bitmend.compress.weights import StoredWeight, UniformWeight
from bitmend.pipelines.errors import InputError, QualityError
from bitmend.pipelines.evaluation.perplexity import last_hidden
from bitmend.pipelines.export import merging
from bitmend.pipelines.export.exporting import checkpoint_of
from bitmend.pipelines.models.blocks import StreamedModel
from bitmend.pipelines.models.loading import whole_model
from bitmend.pipelines.run import runner, sweep
from bitmend.pipelines.stages.writing import InPlace
from bitmend.pipelines.store.artifact import Artifact
from bitmend.recover.losses import Objective
from bitmend.recover.recovery_methods import RECOVER, attach, refusal
from bitmend.recover.site import Gradients, kinds
from bitmend.recover.student import Batch, student_of
from bitmend.recover.train import batch_loss
from bitmend.recover.trainable import RATES
from bitmend.reports.columns import extra_rows

from ..families import save_speaking
from ..runs import stage_directory, write_recipe
from ..toy import CPU, RTN, SECTIONS, STEPS, held_out_loss, opened, run, toy_text

pytestmark = pytest.mark.usefixtures("no_pages")

HALF: dict[str, Any] = {"prune": {"method": "magnitude", "sparsity": 0.5}}
N_M: dict[str, Any] = {"prune": {"method": "magnitude", "sparsity": 0.5, "pattern": "2:4"}}
KINDS: dict[str, list[dict[str, Any]]] = {
    "50 % pruned": [HALF],
    "2:4": [N_M],
    "3-bit": [{"quantize": {"method": "rtn", "bits": 3, "group_size": 16}}],
    "NF4": [{"quantize": {"method": "nf4", "block_size": 16}}],
    "2:4 + 4-bit": [N_M, {"quantize": {"method": "rtn", "bits": 4, "group_size": 16}}],
    "LQ": [{"quantize": {"method": "rtn", "bits": 3, "group_size": 16}}, {"decompose": {"method": "zeroquant_v2", "rank": 4}}],
}  # fmt: skip


@pytest.fixture(autouse=True)
def short_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitmend.pipelines.stages.inputs.HELD_OUT_TOKENS", 256)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> dict[str, Artifact]:
    """A tiny model compressed in every way."""
    place = tmp_path_factory.mktemp("kinds")
    text = toy_text(place / "toy.jsonl")
    save_speaking("llama", place / "model", small_model, num_hidden_layers=2)
    out: dict[str, Artifact] = {}
    for kind, stages in KINDS.items():
        run(place, place / "model", text, stages)
        out[kind] = runner.last_artifact(place / "run")
    return out


@pytest.mark.parametrize("method", RECOVER)
def test_step_0_is_the_artifacts_model(method: str, made: dict[str, Artifact]) -> None:
    """On every kind that the method serves. Virtual tokens cannot be: their start is the model without them."""
    served = [artifact for artifact in made.values() if serves(method, artifact)]
    for artifact in served:
        torch.testing.assert_close(logits_at_step_0(method, artifact), logits_of(artifact), rtol=1e-4, atol=1e-4)
    assert served or method in ("full", "loftq", "lq_lora")


IDS = torch.randint(3, 97, (2, 16), generator=torch.Generator().manual_seed(1))


def serves(method: str, artifact: Artifact) -> bool:
    return refusal(method, [kinds(artifact.stored(name)) for name in artifact.linears], {}) is None


@torch.no_grad()
def logits_of(artifact: Artifact) -> torch.Tensor:
    streamed = StreamedModel(artifact, CPU)
    return streamed.logits(last_hidden(streamed, IDS))


def logits_at_step_0(method: str, artifact: Artifact) -> torch.Tensor:
    """Of the model as the stage trains it, the method attached."""
    place = InPlace(artifact, StreamedModel(artifact, CPU).structure, CPU, torch.float32)
    model = whole_model(artifact, CPU, torch.float32, place).model.requires_grad_(False)
    student = student_of(model)
    gradients = Gradients(lambda index: Batch(IDS), lambda batch: batch_loss(student, batch, None, Objective("cross_entropy")))
    known = RECOVER[method].config.__dataclass_fields__
    own = {name: 4 for name in ("rank", "samples") if name in known}
    attached = attach(method, model, {"steps": 1, "seq_len": 16, **own}, gradients=gradients)
    if attached.starts_without is not None:
        attached.starts_without(True)
    with torch.no_grad():
        return (attached.run or student).logits((attached.run or student).hidden(IDS))


def toy_run(place: Path, small_model: Path, *stages: dict[str, Any], **sections: Any) -> Any:
    return run(place, small_model, toy_text(place / "toy.jsonl"), list(stages), **sections).stages[-1]


def test_half_of_the_ranks_are_dropped_after_training(small_model: Path, tmp_path: Path) -> None:
    stage = toy_run(tmp_path, small_model, RTN, {"recover": {"method": "lora", "rank": 4, "prune_ranks": 0.5, **STEPS}})
    artifact = opened(tmp_path, "recover")
    ranks = [low.rank for n in artifact.linears if (low := artifact.stored(n).low_rank) is not None]
    assert sum(ranks) == 4 * 28 // 2 and max(ranks) == 4
    assert any("adapters pruned to 56 ranks" in note for note in stage.notes)
    assert stage.metrics["held_out_loss_best"] < stage.metrics["held_out_loss_kept"] < stage.metrics["held_out_loss_start"]
    assert held_out_loss(tmp_path, artifact) == pytest.approx(stage.metrics["held_out_loss_kept"], abs=1e-4)


def test_units_go_and_a_sublayer_may_lose_all_of_them(small_model: Path, tmp_path: Path) -> None:
    adapter = {"method": "serial_adapter", "bottleneck": 4, "prune_units": 0.9, **STEPS}
    stage = toy_run(tmp_path, small_model, RTN, {"recover": adapter})
    (kept,) = opened(tmp_path, "recover").extra_modules
    left = [t.shape[0] for n, t in kept.tensors.items() if n.endswith(".down")]
    assert sum(left) == 32 - round(0.9 * 32) and min(left) == 0
    assert held_out_loss(tmp_path, opened(tmp_path, "recover")) == pytest.approx(stage.metrics["held_out_loss_kept"], abs=1e-4)


def test_biases_created_on_a_dense_model_are_part_of_it(small_model: Path, tmp_path: Path) -> None:
    stage = toy_run(tmp_path, small_model, {"recover": {"method": "bitfit", **STEPS}})
    assert stage.metrics["held_out_loss_kept"] < stage.metrics["held_out_loss_start"] - 0.05
    assert held_out_loss(tmp_path, opened(tmp_path, "recover")) == pytest.approx(stage.metrics["held_out_loss_kept"], abs=1e-4)


def lying(site: Any, config: Any) -> Any:
    """bitfit that says it holds the codes, and moves one in the first linear."""
    attached = RECOVER["perp"].attach(site, RECOVER["perp"].config())
    linear = next(iter(site.linears.values()))

    class Moves(torch.nn.Module):
        needs_base = True

        def weights(self, base_OI: torch.Tensor) -> torch.Tensor:
            return base_OI

        def fold(self, stored: StoredWeight) -> StoredWeight:
            assert isinstance(stored.base, UniformWeight)
            codes = stored.base.codes_OI().long()
            codes[0, 0] = (codes[0, 0] + 1) % 8
            return replace(stored, base=replace(stored.base, codes=pack_codes(codes, stored.base.bits)))

    linear.reweight = Moves()
    return attached


def test_the_audit_finds_a_method_that_lies(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECOVER, "bitfit", replace(RECOVER["bitfit"], attach=lying))
    with pytest.raises(QualityError, match=r"recover: the audit after training failed: .*q_proj: 1 codes changed; nothing was kept"):
        toy_run(tmp_path, small_model, RTN, {"recover": {"method": "bitfit", **STEPS}})
    rows = runner.status(tmp_path / "run")["stages"]
    assert [row["state"] for row in rows] == ["done", "done", "partial"]
    opened(tmp_path, "quantize").verify()


def test_what_loses_by_being_stored_is_not_kept(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["bitmend.pipelines.stages.recover"], "stored_loss", lambda *arguments: 9.0)
    stage = toy_run(tmp_path, small_model, RTN, {"recover": {"method": "perp", **STEPS}})
    assert any(note.startswith("rounded to what is stored, the held-out loss is 9.0000") for note in stage.notes)
    names = {p.name: p.stat().st_ino for p in stage_directory(tmp_path / "run", "quantize").glob("*.safetensors")}
    assert names == {p.name: p.stat().st_ino for p in stage_directory(tmp_path / "run", "recover").glob("*.safetensors")}


def test_the_report_knows_what_training_held(made: dict[str, Artifact], small_model: Path, tmp_path: Path) -> None:
    stage = toy_run(tmp_path, small_model, RTN, {"recover": {"method": "qlora", "rank": 4, "cache_dense": "never", **STEPS}})
    memory, before = stage.metrics["memory"], opened(tmp_path, "quantize")
    assert memory["packed_bytes"] == sum(before.stored(n).stored_bits() for n in before.linears) // 8
    assert memory["dense_bytes"] == 256 * 128 * 4, "one layer, the largest"
    assert memory["trainable_bytes"] == stage.trainable_parameters * 4 * 6
    assert memory["packed_bytes"] + memory["dense_bytes"] + memory["trainable_bytes"] < 4 * 722_048, "below the dense model alone"
    shown = {path: value for _, path, value in extra_rows([stage])}
    assert shown["memory: packed bytes"] == memory["packed_bytes"] and shown["memory: trainable bytes"] == memory["trainable_bytes"]


def test_merging_is_audited(made: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = made["2:4"]
    checkpoint = checkpoint_of(artifact, {})
    merged = merging.merged(checkpoint, artifact)
    assert all(torch.equal(merged.linears[n].dense(), artifact.stored(n).dense()) for n in artifact.linears)

    def careless(record: StoredWeight) -> StoredWeight:
        return replace(record, mask=None)

    monkeypatch.setattr(merging, "merge", careless)
    with pytest.raises(QualityError, match="--merge: .*the mask is gone; nothing was written"):
        _ = [merging.merged(checkpoint, artifact).linears[n] for n in artifact.linears]


def poisoned(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    """The loss of these updates, counted from 0 as they are made, is NaN."""
    training = sys.modules["bitmend.recover.train"]
    plain, calls = training.batch_loss, iter(range(1000))

    def loss(*arguments: Any) -> torch.Tensor:
        value = plain(*arguments)
        return value * float("nan") if next(calls) in bad else value

    monkeypatch.setattr(training, "batch_loss", loss)


def test_a_loss_that_turns_nan_once_costs_a_rollback(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, {5})
    stage = toy_run(tmp_path, small_model, RTN, {"recover": {"method": "perp", **STEPS}})
    assert "rolled back: step 6: the loss is not finite" in stage.notes
    assert stage.metrics["held_out_loss_kept"] < stage.metrics["held_out_loss_start"] and stage.metrics["steps"] == 12


def test_a_loss_that_turns_nan_twice_ends_the_run_with_what_was_before(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, {2, 8})
    with pytest.raises(
        InputError, match=r"after rolling back once .*; the artifact before it is intact, try a smaller recover.learning_rate"
    ):
        toy_run(tmp_path, small_model, RTN, {"recover": {"method": "perp", **STEPS}})
    opened(tmp_path, "quantize").verify()
    assert runner.status(tmp_path / "run")["stages"][-1]["state"] != "done"


def test_a_searched_rate_is_reported_and_the_same_as_when_it_is_set(
    small_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "bitmend")
    stages, training = [], {"method": "perp", **STEPS, "eval_every": 12}
    for place, rate in ((tmp_path / "a", "search"), (tmp_path / "b", None)):
        place.mkdir()
        if rate is None:
            tried = {row["factor"]: row["held_out_loss"] for row in stages[0].metrics["rates_tried"]}
            best = min(tried, key=lambda factor: tried[factor])
            assert best > 1, "few steps on a text of few words: the default rate is too low"
            rate = RATES["norms"] * best
        stages.append(toy_run(place, small_model, RTN, {"recover": training | {"learning_rate": rate}}))
    (note,) = [note for note in stages[0].notes if note.startswith("learning rate: ")]
    assert f"the default × {best:g}; held-out loss behind short runs: {tried[1.0]:.4f} at × 1, " in note
    assert sum("8 steps at" in record.getMessage() for record in caplog.records) == len(tried) >= 3
    assert stages[0].metrics["history"] == stages[1].metrics["history"] and stages[0].perplexity == stages[1].perplexity


def test_a_rate_that_is_too_high_is_reported_as_often_as_training_went_back(small_model: Path, tmp_path: Path) -> None:
    too_high = STEPS | {"learning_rate": 1.0, "eval_every": 2, "when_worse": "restore", "warmup": 0}
    stage = toy_run(tmp_path, small_model, RTN, {"recover": {"method": "perp", **too_high}})
    notes = [note for note in stage.notes if note.startswith("went back to the best values, at half the rate: ")]
    assert stage.metrics["times_restored"] == len(notes) > 0


def test_less_text_than_one_batch_is_refused_before_any_work(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\d+ windows of 32 tokens are less than one batch of 900; give more text"):
        toy_run(tmp_path, small_model, RTN, {"recover": {"method": "perp", **STEPS, "batch_size": 900}})
    assert not list((tmp_path / "run" / "stages").glob("*"))


def test_a_sweep_answers_where_to_spend_parameters(small_model: Path, tmp_path: Path) -> None:
    """By method and depth, within a budget of trained parameters; what cannot be is a row that says why."""
    settings = {"method": "lora", "rank": 4, "steps": 1, "batch_size": 4, "seq_len": 32, "loss": "cross_entropy"}
    recipe = write_recipe(tmp_path / "r.yaml", [RTN, {"recover": settings}], **SECTIONS)
    options = {"model": str(small_model), "data": str(toy_text(tmp_path / "toy.jsonl"))}
    over = ["recover.method=lora,serial_adapter,prompt_tuning", "recover.layers=all,last:1"]
    outcome = sweep.sweep(sweep.combinations(str(recipe), over, options=options), tmp_path / "s", device="cpu", max_trainable=20_000)
    rows = {(row["recover.method"], row["recover.layers"]): row for row in outcome.rows()}
    trained = {key: row["trainable_parameters"] for key, row in rows.items()}
    assert trained["lora", "all"] == 4 * trained["lora", "last:1"] == 4 * 4 * (2 * 256 + 2 * 192 + 3 * 384)
    assert trained["serial_adapter", "all"] == 4 * trained["serial_adapter", "last:1"]
    within = {key for key, row in rows.items() if row["within_budget"]}
    assert within == {key for key, count in trained.items() if count is not None and count <= 20_000}
    assert "virtual tokens stand in front of the whole model" in rows["prompt_tuning", "last:1"]["error"]
