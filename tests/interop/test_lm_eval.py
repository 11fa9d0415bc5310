"""lm-eval, an extra that `make interop` installs: its scores of a file of multiple choice, by hand and through a run."""

# pyright: reportMissingImports=false

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.pipelines.errors import InputError, UsageError
from bitmend.pipelines.evaluation.tasks import load_tasks
from bitmend.pipelines.run import runner
from bitmend.pipelines.run.evaluate import evaluate_tasks
from bitmend.pipelines.run.opening import load
from bitmend.reports.record import RunRecord
from bitmend.reports.render import render
from transformers import AutoTokenizer

from ..pipelines.runs import chosen, stage_directory

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed; `make interop` does it"),
]
QUESTIONS = Path(__file__).parents[1] / "small_model" / "questions.jsonl"
STAGES = [{"quantize": {"method": "rtn", "bits": 2, "group_size": 32}}, {"fuse": {"backend": "auto"}}]
SECTIONS: dict[str, Any] = {"calibration": {"samples": 1, "seq_len": 32}, "evaluation": {"seq_len": 32, "windows": 2, "tasks": [str(QUESTIONS)]}}


def by_hand(model: Any, tokenizer: Any) -> tuple[list[float], list[float]]:
    """Per question: whether the likeliest choice is the answer, by sum of log-probabilities and by that sum over the choice's bytes."""
    plain, normed = [], []
    for row in map(json.loads, QUESTIONS.read_text().splitlines()):
        sums = []
        for choice in row["choices"]:
            begun, whole = (tokenizer(text, return_tensors="pt").input_ids for text in (row["question"], f"{row['question']} {choice}"))
            with torch.no_grad():
                log_p = model(whole).logits.float().log_softmax(-1)[0, :-1].gather(-1, whole[0, 1:, None])
            sums.append(float(log_p[begun.shape[1] - 1 :].sum()))
        lengths = [len(choice) for choice in row["choices"]]
        plain.append(float(sums.index(max(sums)) == row["answer"]))
        per_byte = [total / length for total, length in zip(sums, lengths, strict=True)]
        normed.append(float(per_byte.index(max(per_byte)) == row["answer"]))
    return plain, normed


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, small_model: Path, small_text: Path) -> tuple[Path, RunRecord]:
    place = tmp_path_factory.mktemp("scored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitmend.pipelines.devices.compute.measured_dtype", lambda: torch.float32)
        patch.setenv("BITMEND_CACHE", str(place / "cache"))
        record = runner.run(chosen(place, small_model, small_text, STAGES, **SECTIONS), place / "run", device="cpu")
    return place / "run", record


def test_every_stage_is_scored_against_the_baseline(made: tuple[Path, RunRecord], small_model: Path) -> None:
    run, record = made
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    actual: dict[str, list[float]] = {}
    for stage in record.stages:
        for metric, values in zip(("acc", "acc_norm"), by_hand(load(stage_directory(run, stage.stage)), tokenizer), strict=True):
            task = stage.tasks[f"questions {metric}"]
            assert (task.score, task.documents) == (sum(values) / 20, 20)
            assert task.stderr == pytest.approx((task.score * (1 - task.score) / 19) ** 0.5)
            first = actual.setdefault(metric, values)
            differences = [one - other for one, other in zip(values, first, strict=True)]
            assert task.difference == (None if stage.stage == "baseline" else pytest.approx(sum(differences) / 20))
    base, quantized = (record.stages[place].tasks["questions acc"].score for place in (0, 1))
    assert base is not None and base > 0.5, "four choices: the model knows something"
    assert quantized is not None and RunRecord.from_json(record.to_json()) == record


def test_the_report_and_eval_say_the_same(made: tuple[Path, RunRecord], small_text: Path, small_model: Path) -> None:
    run, record = made
    task = record.stages[-1].tasks["questions acc"]
    assert f"{task.score:.3f} ± {task.stderr:.3f}" in render(record, "md") and "questions acc" in render(record, "html")
    assert "tasks.questions acc.difference_stderr" in render(record, "csv").splitlines()[0]
    rows = evaluate_tasks(str(run), [str(QUESTIONS)], device="cpu", dtype="float32")["tasks"]
    assert rows[0]["task"] == "questions acc" and rows[0]["score"] == task.score and rows[0]["difference"] == task.difference
    few = evaluate_tasks(str(small_model), [str(QUESTIONS)], limit=5, device="cpu", dtype="float32")["tasks"]
    assert few[0]["documents"] == 5 and "difference" not in few[0]


def test_unknown_tasks_and_documents_that_are_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    with pytest.raises(UsageError, match=r"unknown task 'hellaswagg'; did you mean hellaswag .* `lm-eval ls tasks` lists all"):
        load_tasks(["hellaswagg"])

    def unreachable(self: Any, names: list[str]) -> Any:
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub")

    monkeypatch.setattr(TaskManager, "load", unreachable)
    with pytest.raises(InputError, match=r"arc_easy: its documents are neither in the cache .* \(Couldn't reach .*\); fetch them where there is a network"):
        load_tasks(["arc_easy"])
