"""What a run writes down of its stages: each measured as it lies on disk, the record and the page.

Knows measures and reports; not what a stage does, nor in which order they come.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...reports.record import Protocol, RunRecord, StageRecord, TaskRecord, derive
from .. import stages
from ..allocation.choice import explained
from ..evaluation import measure
from ..evaluation.perplexity import evaluated_by
from ..evaluation.scores import Scores
from ..evaluation.tasks import TaskScore, scores_of_tasks, task_record
from ..planning.steps import Step
from ..store.artifact import Artifact, open_artifact
from ..store.files import read_json, write_bytes, write_json
from ..text.data import Windows
from .session import Session

log = logging.getLogger("bitmend")


MAIN = ""
"""The name of `data.evaluation` among the texts; the others go by what `evaluation.also` calls them."""
Measures = dict[str, Scores]


def texts_of(under_way: Session) -> dict[str, Windows]:
    """The evaluation texts by name, MAIN first."""
    inputs = under_way.inputs
    return {name: evaluated_by(under_way.compute, found) for name, found in {MAIN: inputs.evaluation(), **inputs.also()}.items()}


def measured(
    under_way: Session,
    step: Step,
    artifact: Artifact,
    texts: Mapping[str, Windows],
    scores: Sequence[Measures],
    before: Sequence[StageRecord],
) -> tuple[StageRecord, Measures]:
    """Measure an artifact as it lies on disk: its record and its scores. `scores` and `before` are those of the stages before it."""
    found = {name: _scores(under_way, step, artifact, name, windows, bool(scores)) for name, windows in texts.items()}
    return under_way.ranks.broadcast(_measured(under_way, step, artifact, found, scores, before) if under_way.ranks.leads else None)


def _measured(
    under_way: Session,
    step: Step,
    artifact: Artifact,
    found: dict[str, tuple[Scores, dict[str, Any]]],
    scores: Sequence[Measures],
    before: Sequence[StageRecord],
) -> tuple[StageRecord, Measures]:
    """The same on rank 0, once it has been scored on the texts."""
    metrics = under_way.directory.metrics(step.name)
    main, extra = found.pop(MAIN)
    size = measure.size_of(artifact)
    first, previous = (scores[0], scores[-1]) if scores else ({}, None)
    measured = measure.Measured(main, extra, first.get(MAIN, main), previous[MAIN] if previous else None)
    made = measure.stage_record(step.address, step.method, step.settings, metrics, size, measured)
    made = replace(made, texts={name: measure.text_record(*pair, first.get(name)) for name, pair in found.items()})
    made = replace(made, tasks=_tasks(under_way, step, artifact, bool(scores)))
    if step.address in under_way.warnings:
        made = replace(made, notes=(*made.notes, under_way.warnings[step.address]))
    others = "".join(f", {name} {text.perplexity:.3f}" for name, text in made.texts.items())
    log.info("%s: perplexity %.3f%s, %.1f MB", step.address, main.perplexity, others, size["total_bytes"] / 1e6)
    if under_way.choice is not None:
        made = explained(made, under_way.choice, under_way.recipe, before)
    return made, {MAIN: main, **{name: pair[0] for name, pair in found.items()}}


def _scores(
    under_way: Session, step: Step, artifact: Artifact, name: str, windows: Windows, compared: bool
) -> tuple[Scores, dict[str, object]]:
    """Scores on one text, `compared` to the baseline's."""
    place, device, dtype = under_way.directory, under_way.compute.device, under_way.compute.dtype
    baseline, teacher = under_way.steps[0], None
    if compared:
        opened = open_artifact(place.artifact(baseline.name))
        teacher = measure.teacher_of(opened, place.metrics(baseline.name), windows, device, dtype)
    label = f"{step.address}: perplexity{f' on {name}' if name else ''}, blocks"
    forward = measure.ForwardPass(device, dtype, stages.binder(step.spec, device, artifact))
    return measure.scores_of(artifact, place.metrics(step.name), windows, teacher, forward, label, under_way.ranks)


def _tasks(under_way: Session, step: Step, artifact: Artifact, compared: bool) -> dict[str, TaskRecord]:
    """Scores on the recipe's tasks, `compared` to the baseline's, which were measured first."""
    if not under_way.inputs.tasks:
        return {}
    place, device, limit = under_way.directory, under_way.compute.device, under_way.recipe.evaluation.task_limit

    def of(of_step: Step, found: Artifact) -> dict[str, TaskScore]:
        bind = stages.binder(of_step.spec, device, found)
        return scores_of_tasks(found, place.metrics(of_step.name), under_way.inputs.tasks, limit, device, under_way.compute.dtype, bind)

    baseline = under_way.steps[0]
    first = of(baseline, open_artifact(place.artifact(baseline.name))) if compared else {}
    made = {name: task_record(score, first.get(name)) for name, score in of(step, artifact).items()}
    log.info("%s: %s", step.address, ", ".join(f"{name} {task.score:.3f}" for name, task in made.items()))
    return made


def save_record(under_way: Session, records: list[StageRecord], texts: Mapping[str, Windows], page: bool) -> RunRecord:
    """record.json, written anew after every stage that was worked on, and report.html, which takes a second to draw; on every rank the record."""
    return under_way.ranks.broadcast(_saved(under_way, records, texts, page) if under_way.ranks.leads else None)


def _saved(under_way: Session, records: list[StageRecord], texts: Mapping[str, Windows], page: bool) -> RunRecord:
    from ...reports.render import render

    place = under_way.directory
    environment = read_json(place.path / "environment.json", "delete it and resume")
    protocols = {name: _protocol(windows) for name, windows in texts.items()}
    main = protocols.pop(MAIN)
    made = RunRecord(place.path.name, under_way.recipe.model, main, derive(records), environment, protocols)
    write_json(place.path / "record.json", made.to_json())
    if page:
        write_bytes(place.path / "report.html", render(made, "html").encode())
    return made


def _protocol(windows: Windows) -> Protocol:
    known = {k: v for k, v in windows.protocol.items() if k in Protocol.__dataclass_fields__}
    return Protocol(**known, details={k: v for k, v in windows.protocol.items() if k not in known})
