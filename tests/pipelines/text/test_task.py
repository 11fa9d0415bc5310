"""Specialisation on a task: loss and perplexity on the completion only, and adapters that are switched on one base."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.pipelines.errors import InputError
from bitmend.pipelines.evaluation.perplexity import last_hidden, score
from bitmend.pipelines.export import exporting
from bitmend.pipelines.models.blocks import StreamedModel
from bitmend.pipelines.recipes.recipe import resolve
from bitmend.pipelines.run import runner
from bitmend.pipelines.run.evaluate import evaluate
from bitmend.pipelines.stages.inputs import Inputs
from bitmend.pipelines.text.data import Windows
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ..runs import write_recipe
from ..toy import CPU, RTN, SECTIONS, STEPS, WORDS, held_out_loss, opened

pytestmark = pytest.mark.usefixtures("no_pages")


@pytest.fixture(autouse=True)
def short_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitmend.pipelines.stages.inputs.HELD_OUT_TOKENS", 256)


def task(path: Path, answer: str, rows: int = 80, seed: int = 0) -> Path:
    """Questions of random words that all have one answer."""
    draw = random.Random(seed)
    lines = [{"prompt": f"Where is {' '.join(draw.choices(WORDS, k=4))}? ", "completion": answer} for _ in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def tasked(place: Path, model: Path, text: Path, answer: str, **recover: Any) -> Any:
    """A run whose training and evaluation text is a task; calibration text is plain."""
    place.mkdir(exist_ok=True)
    settings = {"recover": {"method": "lora", "rank": 4, "learning_rate": 1e-2, **STEPS, **recover}}
    recipe = write_recipe(place / "recipe.yaml", [RTN, settings], **SECTIONS)
    options = {"model": str(model), "calibration": str(text), "train": str(task(place / "train.jsonl", answer))}
    options["eval"] = str(task(place / "eval.jsonl", answer, rows=20, seed=1))
    return runner.run(resolve(str(recipe), options=options), place / "run", device="cpu")


def test_only_completions_count(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    made = tasked(tmp_path, small_model, small_text, "Under the old stone bridge.")
    stage, artifact = made.stages[-1], opened(tmp_path, "recover")
    assert stage.perplexity is not None and stage.perplexity < 0.7 * made.stages[-2].perplexity
    assert held_out_loss(tmp_path, artifact) == pytest.approx(stage.metrics["held_out_loss_kept"], abs=1e-4)
    windows = Inputs(resolve(str(tmp_path / "run" / "recipe.resolved.yaml")), artifact.directory).evaluation()
    assert windows.loss is not None and 0 < float(windows.loss.float().mean()) < 0.9
    model = StreamedModel(artifact, CPU)
    with torch.no_grad():
        log_p = model.logits(last_hidden(model, windows.ids)).log_softmax(-1)[:, :-1]
    nll, mask = -log_p.gather(-1, windows.ids[:, 1:].unsqueeze(-1)).squeeze(-1), windows.loss[:, 1:]
    assert stage.perplexity == pytest.approx(math.exp(float(nll[mask].mean())), rel=1e-4)
    assert stage.perplexity != pytest.approx(math.exp(float(nll.mean())), rel=1e-2)
    assert stage.bits_per_byte == pytest.approx(float(nll[mask].sum()) / math.log(2) / windows.protocol["loss_bytes"], rel=1e-4)
    answers = sum(len(part.encode()) for part in ("Under the old stone bridge.",)) * 20
    assert 0 < windows.protocol["loss_bytes"] <= answers + 20 * len("<|endoftext|>")
    again = evaluate(str(tmp_path / "run"), device="cpu")
    assert again["perplexity"] == pytest.approx(stage.perplexity, rel=1e-5)
    assert made.protocol.details["loss_tokens"] == int(mask.sum())


def test_kl_and_agreement_are_over_completions_too(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    made = tasked(tmp_path, small_model, small_text, "In the garden.", steps=1)
    windows = Inputs(resolve(str(tmp_path / "run" / "recipe.resolved.yaml")), small_model).evaluation()
    dense, model = (StreamedModel(opened(tmp_path, address), CPU) for address in ("baseline", "quantize"))
    assert windows.loss is not None
    mask = windows.loss[:, 1:]
    with torch.no_grad():
        p, q = (m.logits(last_hidden(m, windows.ids)).log_softmax(-1)[:, :-1][mask] for m in (dense, model))
    assert made.stages[1].kl_to_baseline == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert made.stages[1].top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()), rel=1e-5)


def test_a_window_without_a_completion_weighs_nothing(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    tasked(tmp_path, small_model, small_text, "In the garden.", steps=1)
    model, ids = StreamedModel(opened(tmp_path, "baseline"), CPU), torch.arange(5, 69).view(2, 32)
    loss = torch.zeros(2, 32, dtype=torch.bool)
    loss[1, 20:24] = True
    scores, _ = score(model, Windows(ids, loss, {}))
    one, _ = score(model, Windows(ids[1:], loss[1:], {}))
    assert scores.nll[0] == 0 and scores.perplexity == pytest.approx(one.perplexity, rel=1e-6)
    with pytest.raises(InputError, match="hold no token of a completion"):
        score(model, Windows(ids, loss & False, {}))


def test_text_that_teaches_nothing_is_refused_before_any_work(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    inputs = Inputs(resolve(str(write_recipe(tmp_path / "r.yaml")), options={"model": str(small_model)}), small_model)
    with pytest.raises(InputError, match="none of 3 windows of 8 tokens holds a token of a completion"):
        inputs._teaching(Windows(torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.bool), {}), "answers.jsonl")
    short = task(tmp_path / "short.jsonl", "In the garden.", rows=12)  # a batch, but what is held out of it is shorter than a window
    recipe = write_recipe(tmp_path / "r.yaml", [RTN, {"recover": {"method": "lora", **STEPS, "seq_len": 48, "batch_size": 1}}], **SECTIONS)
    chosen = resolve(str(recipe), options={"model": str(small_model), "data": str(small_text), "train": str(short)})
    with pytest.raises(InputError, match=r"short.jsonl \(held_out\): \d+ tokens are fewer than one window of 48"):
        runner.run(chosen, tmp_path / "run", device="cpu")
    assert not list((tmp_path / "run" / "stages").glob("*"))


def test_two_tasks_are_switched_on_one_base(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    """Each run's adapter, loaded together with the other on the base of one of them, gives that run's logits."""
    answers = {"bridge": "Under the old stone bridge.", "engine": "He wrote a letter to the engine."}
    for name, answer in answers.items():
        tasked(tmp_path / name, small_model, small_text, answer)
        exporting.export(tmp_path / name / "run", "dense", tmp_path / f"x-{name}", adapter=True)
    bases = [(tmp_path / f"x-{name}" / "base" / "model.safetensors").read_bytes() for name in answers]
    assert bases[0] == bases[1], "the base is the same to the bit"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "x-bridge" / "base")
    model: Any = PeftModel.from_pretrained(base, str(tmp_path / "x-bridge" / "adapter"), adapter_name="bridge")  # type: ignore[arg-type]
    model.load_adapter(str(tmp_path / "x-engine" / "adapter"), adapter_name="engine")
    ids, actual = torch.arange(5, 37).view(2, 16), {}
    for name in ("bridge", "engine", "bridge"):
        model.set_adapter(name)
        streamed = StreamedModel(opened(tmp_path / name, "recover"), CPU)
        with torch.no_grad():
            actual[name] = model(ids).logits
            torch.testing.assert_close(actual[name], streamed.logits(last_hidden(streamed, ids)), rtol=1e-4, atol=2e-3)
    assert float((actual["bridge"] - actual["engine"]).abs().max()) > 0.1
