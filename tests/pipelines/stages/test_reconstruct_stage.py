"""Recovery block by block: what it wins, that it resumes to the same bits, holds one block, and goes back where the whole got worse."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.weights import GgmlWeight
from bitmend.pipelines.export import exporting
from bitmend.pipelines.planning.plan import refusals
from bitmend.pipelines.run import runner
from bitmend.recover.merge import audit
from bitmend.recover.recovery_methods import RECOVER
from bitmend.reports.json_values import mappings, real

from ..families import save_speaking
from ..runs import chosen, hashes, stage_directory
from ..toy import CPU, RTN, STEPS, held_out_loss, opened, run, toy_text

pytestmark = pytest.mark.usefixtures("no_pages")

PRUNE: dict[str, Any] = {"prune": {"method": "wanda", "sparsity": 0.5, "pattern": "2:4"}}
QUICK: dict[str, Any] = {"method": "reconstruct", "steps": 20, "samples": 16, "rank": 4, "seq_len": STEPS["seq_len"], "batch_size": STEPS["batch_size"]}  # fmt: skip
STAGE = sys.modules["bitmend.pipelines.stages.block_reconstruction"]


@pytest.fixture(autouse=True)
def short_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitmend.pipelines.stages.inputs.HELD_OUT_TOKENS", 256)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> tuple[Path, Any]:
    """A run that was never stopped, and its stage's record."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitmend.reports.page.html", lambda record: "html\n")
        patch.setattr("bitmend.pipelines.stages.inputs.HELD_OUT_TOKENS", 256)
        place = tmp_path_factory.mktemp("whole")
        return place, run(place, small_model, toy_text(place / "toy.jsonl"), [PRUNE, {"recover": QUICK}]).stages[-1]


def again(place: Path, small_model: Path, **changes: Any) -> Any:
    return run(place, small_model, toy_text(place / "toy.jsonl"), [PRUNE, {"recover": {**QUICK, **changes}}]).stages[-1]


def test_every_block_comes_nearer_and_the_model_gains(whole: tuple[Path, Any]) -> None:
    place, stage = whole
    before, after = opened(place, "prune"), opened(place, "recover")
    assert len(stage.metrics["blocks"]) == 4
    assert all(b["block_error_after"] < 0.9 * b["block_error_before"] for b in stage.metrics["blocks"])
    assert stage.metrics["held_out_loss_kept"] < stage.metrics["held_out_loss_start"] - 0.05
    assert held_out_loss(place, after) == pytest.approx(stage.metrics["held_out_loss_kept"], abs=1e-4)
    assert held_out_loss(place, before) == pytest.approx(stage.metrics["held_out_loss_start"], abs=1e-4)
    stored = {n: before.stored(n) for n in before.linears}
    assert audit(stored, {n: after.stored(n) for n in after.linears}) == [] and stage.sparsity == 0.5
    assert stage.trainable_parameters == sum(4 * sum(r.shape) for r in stored.values()) + 4 * 2 * 128
    norm = "model.layers.3.post_attention_layernorm.weight"
    assert not torch.equal(before.tensor(norm), after.tensor(norm)) and after.tensor(norm).dtype == before.tensor(norm).dtype


def test_stopped_between_blocks_it_goes_on_to_the_same_bits(
    whole: tuple[Path, Any], small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted, plain, calls = [], STAGE.reconstruct, iter(range(100))
    monkeypatch.setattr(STAGE, "reconstruct", lambda block, config: fitted.append(block.seed) or plain(block, config))

    def stop(context: Any) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(STAGE, "check_stop", stop)
        with pytest.raises(KeyboardInterrupt):
            again(tmp_path, small_model)
    assert runner.status(tmp_path / "run")["stages"][-1]["finished_parts"] == 2
    stage = again(tmp_path, small_model)
    assert fitted == [0, 1, 2, 3], "nothing is fitted twice"
    assert hashes(tmp_path / "run", "2") == hashes(whole[0] / "run", "2") != {}
    assert stage.metrics["blocks"] == whole[1].metrics["blocks"]


def test_only_the_chosen_depth_trains_and_one_block_is_in_memory(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = STAGE.reconstruct

    def watched(block: Any, config: Any) -> Any:
        held = [n.split(".")[2] for n, p in block.model.named_parameters() if n.startswith("model.layers.") and not p.is_meta]
        assert set(held) == {str(block.seed)}, "the others are on the meta device"
        return plain(block, config)

    monkeypatch.setattr(STAGE, "reconstruct", watched)
    monkeypatch.setattr(STAGE, "_loss", lambda walk, hidden: 3.0)
    stage = again(tmp_path, small_model, layers="last:2", window="split", targets="q,down")
    assert [b["block"] for b in stage.metrics["blocks"]] == [2, 3]
    same = [p.stat().st_ino for p in stage_directory(tmp_path / "run", "prune").glob("block-0000[01].*")]
    assert same == [p.stat().st_ino for p in stage_directory(tmp_path / "run", "recover").glob("block-0000[01].*")]
    before, after = opened(tmp_path, "prune"), opened(tmp_path, "recover")
    moved = {n for n in before.linears if not torch.equal(before.stored(n).dense(), after.stored(n).dense())}
    assert moved == {f"model.layers.{i}.{n}" for i in (2, 3) for n in ("self_attn.q_proj", "mlp.down_proj")}


def test_what_makes_the_whole_worse_is_undone(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when it is killed while it undoes."""
    values, written = iter([3.0, 3.5]), STAGE.write_block
    monkeypatch.setattr(STAGE, "_loss", lambda *arguments: next(values))

    def killed(*arguments: Any) -> None:
        if (arguments[1].scratch / STAGE.UNDONE).is_file() and arguments[3] == 2:
            raise KeyboardInterrupt
        written(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(STAGE, "write_block", killed)
        with pytest.raises(KeyboardInterrupt):
            again(tmp_path, small_model)
    stage = again(tmp_path, small_model)
    assert [p.stat().st_ino for p in sorted(stage_directory(tmp_path / "run", "recover").glob("*.safetensors"))] == [
        p.stat().st_ino for p in sorted(stage_directory(tmp_path / "run", "prune").glob("*.safetensors"))
    ]
    assert any("went from 3.0000 to 3.5000; the model is as it was before this stage" in note for note in stage.notes)
    assert stage.metrics["held_out_loss_kept"] == 3.0


def test_scales_of_a_quantized_model(small_model: Path, tmp_path: Path) -> None:
    made = run(tmp_path, small_model, toy_text(tmp_path / "toy.jsonl"), [RTN, {"recover": {**QUICK, "train": "scales", "rank": 16}}])
    before, after = opened(tmp_path, "quantize"), opened(tmp_path, "recover")
    assert made.stages[-1].metrics["held_out_loss_kept"] < made.stages[-1].metrics["held_out_loss_start"]
    assert audit({n: before.stored(n) for n in before.linears}, {n: after.stored(n) for n in after.linears}) == []
    assert made.stages[-1].total_bytes == made.stages[-2].total_bytes


def test_super_scales_of_types_of_ggml(small_model: Path, tmp_path: Path) -> None:
    """d and m move, each block comes nearer; the codes and the small codes stay."""
    quantize = {"quantize": {"method": "rtn", "grid": "q2_k"}}
    made = run(tmp_path, small_model, toy_text(tmp_path / "toy.jsonl"), [quantize, {"recover": {**QUICK, "rank": 16, "steps": 8, "samples": 8}}])
    before, after = opened(tmp_path, "quantize"), opened(tmp_path, "recover")
    stage = made.stages[-1]
    blocks = mappings(stage.metrics["blocks"])
    assert blocks and all(real(b["block_error_after"]) < real(b["block_error_before"]) for b in blocks)
    assert stage.metrics["held_out_loss_kept"] < stage.metrics["held_out_loss_start"]
    records = {n: (before.stored(n), after.stored(n)) for n in before.linears}
    assert audit({n: old for n, (old, _) in records.items()}, {n: new for n, (_, new) in records.items()}) == []
    kinds = set()
    for old, new in ((a.base, b.base) for a, b in records.values()):
        assert isinstance(old, GgmlWeight) and isinstance(new, GgmlWeight) and old.type == new.type
        kinds.add(old.type)
        assert torch.equal(old.codes, new.codes) and not torch.equal(old.super_scales, new.super_scales) and new.super_scales.dtype == torch.float16
        assert (old.small_codes is None) == (new.small_codes is None) and (old.small_codes is None or torch.equal(old.small_codes, new.small_codes))
    assert kinds == {"q2_k", "q4_0"} and stage.total_bytes == made.stages[-2].total_bytes
    file = tmp_path / "m.gguf"
    assert exporting.export(tmp_path / "run", "gguf", file)["perplexity"] == pytest.approx(stage.perplexity, rel=1e-3)


def test_refused_before_any_work(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    save_speaking("llama", tmp_path / "teacher", small_model)
    ggml: dict[str, Any] = {"quantize": {"method": "rtn", "grid": "q4_k"}}
    for train in ("mask_lora", "weights"):
        recipe = chosen(tmp_path, small_model, small_text, [ggml, {"recover": {**QUICK, "rank": 16, "train": train}}])
        assert "quantized" in refusals(recipe, small_model)[0], refusals(recipe, small_model)
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"train": "mask_lora"}, {}, "mask_lora merges into dense weights"),
        ({"train": "lora", "rank": 500}, {}, "rank 500 does not fit"),
        ({"train": "scales", "rank": 16}, {"teacher": str(tmp_path / "teacher")}, "--teacher: width and blocks are 64 and 3, the model's 128 and 4"),
    ]
    for changes, sections, words in cases:
        recipe = chosen(tmp_path, small_model, small_text, [RTN, {"recover": {**QUICK, **changes}}], **sections)
        assert words in refusals(recipe, small_model)[0]
    assert RECOVER["reconstruct"].by_block and CPU.type == "cpu"
