"""Records a run's results: each stage measured as it lies on disk, the record and the page.

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


def texts_of(session: Session) -> dict[str, Windows]:
    """The evaluation texts by name, MAIN first."""
    inputs = session.inputs
    return {name: evaluated_by(session.compute, result) for name, result in {MAIN: inputs.evaluation(), **inputs.also()}.items()}


def measured(
    session: Session,
    step: Step,
    artifact: Artifact,
    texts: Mapping[str, Windows],
    scores: Sequence[Measures],
    before: Sequence[StageRecord],
) -> tuple[StageRecord, Measures]:
    """Measure an artifact as it lies on disk: its record and its scores. `scores` and `before` are those of the stages before it."""
    result = _scores(session, step, artifact, texts, bool(scores))
    return session.ranks.broadcast(_measured(session, step, artifact, result, scores, before) if session.ranks.leads else None)


def _measured(
    session: Session,
    step: Step,
    artifact: Artifact,
    result: dict[str, tuple[Scores, dict[str, Any]]],
    scores: Sequence[Measures],
    before: Sequence[StageRecord],
) -> tuple[StageRecord, Measures]:
    """The same on rank 0, once it has been scored on the texts."""
    metrics = session.directory.metrics(step.name)
    main, extra = result.pop(MAIN)
    size = measure.size_of(artifact)
    first, previous = (scores[0], scores[-1]) if scores else ({}, None)
    measured = measure.Measured(main, extra, first.get(MAIN, main), previous[MAIN] if previous else None)
    made = measure.stage_record(step.address, step.method, step.settings, metrics, size, measured)
    made = replace(made, texts={name: measure.text_record(*pair, first.get(name)) for name, pair in result.items()})
    made = replace(made, tasks=_tasks(session, step, artifact, bool(scores)))
    if step.address in session.warnings:
        made = replace(made, notes=(*made.notes, session.warnings[step.address]))
    others = "".join(f", {name} {text.perplexity:.3f}" for name, text in made.texts.items())
    log.info("%s: perplexity %.3f%s, %.1f MB", step.address, main.perplexity, others, size["total_bytes"] / 1e6)
    if session.choice is not None:
        made = explained(made, session.choice, session.recipe, before)
    return made, {MAIN: main, **{name: pair[0] for name, pair in result.items()}}


def _scores(
    session: Session, step: Step, artifact: Artifact, texts: Mapping[str, Windows], compared: bool
) -> dict[str, tuple[Scores, dict[str, object]]]:
    """Scores on the texts, `compared` to the baseline's."""
    place, device, first = session.directory, session.compute.device, session.steps[0]
    baseline = measure.Baseline(open_artifact(place.artifact(first.name)), place.metrics(first.name)) if compared else None
    forward = measure.ForwardPass(device, session.compute.dtype, stages.binder(step.spec, device, artifact))
    label = f"{step.address}: perplexity, blocks"
    return measure.scores_of(artifact, place.metrics(step.name), texts, baseline, forward, label, session.ranks)


def _tasks(session: Session, step: Step, artifact: Artifact, compared: bool) -> dict[str, TaskRecord]:
    """Scores on the recipe's tasks, `compared` to the baseline's, which were measured first."""
    if not session.inputs.tasks:
        return {}
    place, device, limit = session.directory, session.compute.device, session.recipe.evaluation.task_limit

    def of(of_step: Step, result: Artifact) -> dict[str, TaskScore]:
        bind = stages.binder(of_step.spec, device, result)
        return scores_of_tasks(result, place.metrics(of_step.name), session.inputs.tasks, limit, device, session.compute.dtype, bind)

    baseline = session.steps[0]
    first = of(baseline, open_artifact(place.artifact(baseline.name))) if compared else {}
    made = {name: task_record(score, first.get(name)) for name, score in of(step, artifact).items()}
    log.info("%s: %s", step.address, ", ".join(f"{name} {task.score:.3f}" for name, task in made.items()))
    return made


def save_record(session: Session, records: list[StageRecord], texts: Mapping[str, Windows], page: bool) -> RunRecord:
    """record.json, written anew after every stage that was worked on, and report.html, which takes a second to draw; on every rank the record."""
    return session.ranks.broadcast(_saved(session, records, texts, page) if session.ranks.leads else None)


def _saved(session: Session, records: list[StageRecord], texts: Mapping[str, Windows], page: bool) -> RunRecord:
    from ...reports.render import render

    place = session.directory
    environment = read_json(place.path / "environment.json", "delete it and resume")
    protocols = {name: _protocol(windows) for name, windows in texts.items()}
    main = protocols.pop(MAIN)
    made = RunRecord(place.path.name, session.recipe.model, main, derive(records), environment, protocols)
    write_json(place.path / "record.json", made.to_json())
    if page:
        write_bytes(place.path / "report.html", render(made, "html").encode())
    return made


def _protocol(windows: Windows) -> Protocol:
    known = {k: v for k, v in windows.protocol.items() if k in Protocol.__dataclass_fields__}
    return Protocol(**known, details={k: v for k, v in windows.protocol.items() if k not in known})
