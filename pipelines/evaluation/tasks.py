"""Scores on tasks through lm-eval, an extra: its own tasks by name, and files of multiple choice, which need no network.

Knows models and documents; no recipe and no stage.
"""

# pyright: reportMissingImports=false

import difflib
import hashlib
import importlib.util
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...reports.record import TaskRecord, paired_difference
from ..errors import InputError, UsageError, as_input_error
from ..models.blocks import Binder
from ..models.loading import whole_model
from ..models.source import load_tokenizer
from ..store.artifact import Artifact
from ..store.files import read_json, sha256, write_json

FILE = ".jsonl"
LINE = '{"question": "text before the choice", "choices": ["one", "another"], "answer": 0}'
BATCH = 8
"""Requests at once."""
BOOTSTRAP = 1000
"""Resamplings for the standard error of what is no mean over documents; means have a formula."""
FEWSHOT_SEED = 1234
"""lm-eval's own."""


@dataclass(frozen=True)
class TaskScore:
    """A metric of a task, and its standard error over documents. `values`: per document, where the score is their mean. `version`: the
    task's own, or the first digits of the file's sha256."""

    score: float
    stderr: float | None
    documents: int
    version: str
    values: tuple[float, ...] | None


def load_tasks(names: Sequence[str]) -> dict[str, object]:
    """lm-eval's tasks by name, their documents in memory; a group or a tag is its members. UsageError without lm-eval and for unknown names;
    InputError for a file that is none of multiple choice, and for documents that are neither in the cache nor to be had."""
    if not names:
        return {}
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("tasks are scored by lm-eval, which is not installed: pip install 'bitmend[eval]'")
    files = [name for name in names if name.endswith(FILE)]
    result = {Path(name).stem: _of_file(Path(name).expanduser()) for name in files}
    named = [name for name in names if name not in files]
    with _quiet():
        made = _of_lm_eval(named) if named else {}
    if len(result) < len(files) or result.keys() & made.keys():
        raise UsageError(f"two of the tasks {', '.join(names)} have one name; rename a file")
    return result | made


def _of_lm_eval(names: Sequence[str]) -> dict[str, object]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"or is it a file NAME{FILE}?"
            raise UsageError(f"unknown task {name!r}; {hint} `lm-eval ls tasks` lists all {len(manager.all_tasks):,}")
    made: dict[str, object] = {}
    for name in names:
        with as_input_error(
            f"{name}: its documents are neither in the cache of `datasets` nor can they be fetched",
            f"fetch them where there is a network (HF_HOME says where they lie), or give a {FILE} file of multiple choice",
        ):
            made |= manager.load([name])["tasks"]
    return made


def _of_file(path: Path) -> Any:
    """A task of multiple choice: the choice whose text, after the question and a space, the model finds likeliest."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    rows = read_questions(path)
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    with _quiet():
        return ConfigurableTask(
            config={
                "task": path.stem,
                "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{question}}",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "answer",
                "metric_list": metrics,
                "metadata": {"version": sha256(path)[:12]},
            }
        )


def read_questions(path: Path) -> list[dict[str, object]]:
    """The lines of a file of multiple choice. InputError names the line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}); give a {FILE} file of lines like {LINE}") from error
    rows: list[dict[str, object]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise InputError(f"{path}: line {number} is no JSON ({error}); a line is {LINE}") from error
        if row is not None:
            rows.append(_question(row, f"{path}: line {number}"))
    if not rows:
        raise InputError(f"{path}: holds no question; a line is {LINE}")
    return rows


def _question(row: Any, where: str) -> dict[str, object]:
    wanted = isinstance(row, dict) and row.keys() == {"question", "choices", "answer"}
    choices, answer = (row["choices"], row["answer"]) if wanted else ([], None)
    texts = [row["question"], *choices] if wanted and isinstance(choices, list) else [None]
    if not all(isinstance(text, str) and text.strip() for text in texts) or len(set(texts[1:])) < max(2, len(texts) - 1):
        raise InputError(f"{where}: a question, at least two different choices and the answer's place are expected, as in {LINE}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise InputError(f"{where}: answer {answer!r} is the place of none of its {len(choices)} choices; they are counted from 0")
    return row


def scores_of_tasks(
    artifact: Artifact,
    metrics: Path,
    tasks: Mapping[str, object],
    limit: int | None,
    device: torch.device,
    dtype: torch.dtype,
    bind: Binder | None = None,
) -> dict[str, TaskScore]:
    """ "TASK METRIC" → score; read if it was measured, else measured with the whole model in memory and kept. `limit`: the first so many
    documents of each task."""
    path = metrics / f"tasks-{protocol_key(tasks, limit, device, dtype)}.json"
    if path.is_file():
        return {name: _score_of(row) for name, row in read_json(path, "delete it and run again")["scores"].items()}
    model = whole_model(artifact, device, dtype, bind).model
    model.config.use_cache = True
    result = answered(model, load_tokenizer(artifact.directory), tasks, limit)
    metrics.mkdir(parents=True, exist_ok=True)
    write_json(path, {"scores": {name: asdict(score) for name, score in result.items()}})
    return result


def _score_of(row: Mapping[str, Any]) -> TaskScore:
    return TaskScore(**{**row, "values": row["values"] and tuple(row["values"])})


def protocol_key(tasks: Mapping[str, Any], limit: int | None, device: torch.device, dtype: torch.dtype) -> str:
    """Eight characters that identify the tasks and how they are run."""
    versions = {name: str(task.VERSION) for name, task in tasks.items()}
    protocol = [versions, limit, str(dtype), device.type, version("lm_eval")]
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:8]


def answered(model: Any, tokenizer: Any, tasks: Mapping[str, Any], limit: int | None) -> dict[str, TaskScore]:
    """What lm-eval makes of the model's answers. Random states are what they were before."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with _quiet(), _random_states():
        for task in tasks.values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        wrap: Any = HFLM  # a decorator of lm-eval's hides its parameters
        wrapped = wrap(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
        result: Any = evaluate(wrapped, {"tasks": dict(tasks)}, limit=limit, bootstrap_iters=BOOTSTRAP)
    out: dict[str, TaskScore] = {}
    for task, results in result["results"].items():
        for key, score in results.items():
            metric, _, filter_ = key.partition(",")
            if not filter_ or metric.endswith("_stderr") or not isinstance(score, int | float):
                continue
            rows = [row for row in result["samples"][task] if row["filter"] == filter_]
            values = [row.get(metric) for row in rows]
            stderr = results.get(f"{metric}_stderr,{filter_}")
            out[f"{task} {metric}{'' if filter_ == 'none' else f' {filter_}'}"] = TaskScore(
                float(score),
                float(stderr) if isinstance(stderr, int | float) else None,
                len(rows),
                str(tasks[task].VERSION),
                tuple(map(float, values)) if all(isinstance(value, int | float) for value in values) else None,
            )
    return out


def task_record(score: TaskScore, baseline: TaskScore | None) -> TaskRecord:
    """For the report; `baseline` None: it is the baseline's own."""
    change, error = None, None
    if baseline is not None and score.values is not None and baseline.values is not None:
        change, error = paired_difference(score.values, baseline.values)
    elif baseline is not None:
        change = score.score - baseline.score
    return TaskRecord(score.score, score.stderr, score.documents, score.version, change, error)


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval warns of what does not concern a user of this program."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@contextmanager
def _random_states() -> Iterator[None]:
    import numpy

    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)
