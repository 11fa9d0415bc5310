"""Tasks, as far as they work without lm-eval: files of multiple choice, and what is refused before any work."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from bitmend.pipelines import cli
from bitmend.pipelines.errors import InputError, UsageError
from bitmend.pipelines.evaluation import tasks
from bitmend.pipelines.evaluation.tasks import TaskScore, load_tasks, read_questions, task_record
from bitmend.pipelines.recipes.recipe import resolve
from bitmend.reports.record import RunRecord, StageRecord, TaskRecord
from bitmend.reports.render import render

from ..runs import write_recipe
from ..toy import RTN, SECTIONS

ROW: dict[str, Any] = {"question": "The river flows into the", "choices": ["sea", "sky"], "answer": 0}


def test_the_committed_questions_can_be_read() -> None:
    rows = read_questions(Path(__file__).parents[2] / "small_model" / "questions.jsonl")
    assert len(rows) == 20 and {len(row["choices"]) for row in rows} == {4} and len({row["answer"] for row in rows}) == 4


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2 is no JSON"),
        (json.dumps([1]), "line 2: a question, at least two different choices"),
        (json.dumps(ROW | {"choices": ["sea"]}), "line 2: a question, at least two different choices"),
        (json.dumps(ROW | {"choices": ["sea", "sea"]}), "line 2: a question, at least two different choices"),
        (json.dumps(ROW | {"choices": "sea"}), "line 2: a question, at least two different choices"),
        (json.dumps(ROW | {"question": " "}), "line 2: a question, at least two different choices"),
        (json.dumps(ROW | {"more": 1}), "line 2: a question, at least two different choices"),
        (json.dumps(ROW | {"answer": 2}), "line 2: answer 2 is the place of none of its 2 choices"),
        (json.dumps(ROW | {"answer": True}), "line 2: answer True is the place of none"),
    ],
)
def test_a_line_that_is_no_question_is_named(line: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{line}\n")
    with pytest.raises(InputError, match=f"mine.jsonl: {says}"):
        read_questions(path)


def test_a_file_without_questions(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl: cannot be read as text"):
        read_questions(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"empty\.jsonl: holds no question; a line is"):
        read_questions(tmp_path / "empty.jsonl")


def without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = importlib.util.find_spec
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else plain(name, *more))


def test_without_lm_eval_it_is_reported_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_model: Path, small_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without_lm_eval(monkeypatch)
    assert load_tasks([]) == {}
    recipe = str(write_recipe(tmp_path / "r.yaml", [RTN], **{**SECTIONS, "evaluation": {"seq_len": 32, "windows": 4, "tasks": ["hellaswag"]}}))
    asked = [recipe, "-m", str(small_model), "--data", str(small_text), "-o", str(tmp_path / "run")]
    for arguments in (
        ["eval", str(small_model), "--tasks", "hellaswag"],
        ["run", *asked, "--dry-run"],
        ["run", *asked],
    ):
        assert cli.main(arguments) == 2, arguments
        assert capsys.readouterr().err.splitlines()[-1] == "error: tasks are scored by lm-eval, which is not installed: pip install 'bitmend[eval]'"
    assert not list((tmp_path / "run" / "stages").glob("*"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "hellaswag", "--windows", "3"], "--eval, --seq-len and --windows belong to perplexity"),
        (["--limit", "3"], "--limit goes with --tasks"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "demo", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_recipe_names_tasks_once_and_files_by_their_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").touch()
    actual = resolve("recover", sets=["evaluation.tasks=[arc_easy,mine.jsonl]", "evaluation.task_limit=7"], options={"model": "demo"})
    assert actual.evaluation.tasks == ["arc_easy", str(tmp_path / "mine.jsonl")] and actual.evaluation.task_limit == 7
    with pytest.raises(UsageError, match=r"evaluation\.tasks.*'arc_easy' is there twice"):
        resolve("recover", sets=["evaluation.tasks=[arc_easy,arc_easy]"], options={"model": "demo"})
    for value in ("5", "arc_easy", "[1]", '[""]', "null", "{a: 1}"):
        with pytest.raises(UsageError, match=r"^evaluation\.tasks.*expected.*lm-eval's names of tasks, or \.jsonl files of multiple choice"):
            resolve("recover", sets=[f"evaluation.tasks={value}"], options={"model": "demo"})


def test_the_change_to_the_baseline_is_paired() -> None:
    first, second = (TaskScore(sum(v) / 4, 0.25, 4, "1", v) for v in ((1.0, 1.0, 0.0, 1.0), (1.0, 0.0, 0.0, 1.0)))
    assert task_record(second, None) == TaskRecord(0.5, 0.25, 4, "1", None, None)
    assert task_record(second, first) == TaskRecord(0.5, 0.25, 4, "1", -0.25, 0.25)
    whole = TaskScore(10.0, None, 4, "1", None)
    assert task_record(TaskScore(12.0, None, 4, "1", None), whole) == TaskRecord(12.0, None, 4, "1", 2.0, None)


def test_a_record_with_tasks_is_shown_and_read_again() -> None:
    stages = tuple(
        StageRecord(name, perplexity=20.0, tasks={"arc acc": TaskRecord(0.5, 0.1, 25, "1", change, error)})
        for name, change, error in (("baseline", None, None), ("quantize", -0.02, 0.015))
    )
    record = RunRecord("run", "demo", stages=stages)
    assert RunRecord.from_json(json.loads(render(record, "json"))) == record
    text = render(record, "md")
    assert "arc acc" in text and "0.500 ± 0.100" in text and "−0.0200 ± 0.0150" in text
    assert "tasks.arc acc.score" in render(record, "csv")
