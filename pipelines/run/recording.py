"""What a run writes down of its stages: each measured as it lies on disk, the record and the page.

Knows measures and reports; not what a stage does, nor in which order they come.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

from ...reports.record import Protocol, RunRecord, StageRecord, derive
from .. import stages
from ..allocation.choice import explained
from ..evaluation import measure
from ..evaluation.scores import Scores
from ..planning.steps import Step
from ..store.artifact import Artifact, open_artifact
from ..store.files import read_json, write_bytes, write_json
from ..text.data import Windows
from .session import Session

log = logging.getLogger("bitmend")


def measured(
    under_way: Session, step: Step, artifact: Artifact, windows: Windows, scores: Sequence[Scores], before: Sequence[StageRecord]
) -> tuple[StageRecord, Scores]:
    """Measure an artifact as it lies on disk: its record and its scores. `scores` and `before` are those of the stages before it."""
    place, device, dtype = under_way.directory, under_way.compute.device, under_way.compute.dtype
    metrics, baseline = place.metrics(step.name), under_way.steps[0]
    teacher = None
    if scores:
        opened = open_artifact(place.artifact(baseline.name))
        teacher = measure.teacher_of(opened, place.metrics(baseline.name), windows, device, dtype)
    bind = stages.binder(step.spec, device, artifact)
    found, extra = measure.scores_of(artifact, metrics, windows, teacher, device, dtype, bind, f"{step.address}: perplexity, blocks")
    size = measure.size_of(artifact)
    first, previous = (scores[0], scores[-1]) if scores else (found, None)
    made = measure.stage_record(step.address, step.method, step.settings, metrics, size, found, extra, first, previous)
    if step.address in under_way.warnings:
        made = replace(made, notes=(*made.notes, under_way.warnings[step.address]))
    log.info("%s: perplexity %.3f, %.1f MB", step.address, found.perplexity, size["total_bytes"] / 1e6)
    if under_way.choice is not None:
        made = explained(made, under_way.choice, under_way.recipe, before)
    return made, found


def save_record(under_way: Session, records: list[StageRecord], windows: Windows, page: bool) -> RunRecord:
    """record.json, written anew after every stage that was worked on, and report.html, which takes a second to draw."""
    from ...reports.render import render

    place = under_way.directory
    environment = read_json(place.path / "environment.json", "delete it and resume")
    known = {k: v for k, v in windows.protocol.items() if k in Protocol.__dataclass_fields__}
    details = {k: v for k, v in windows.protocol.items() if k not in known}
    made = RunRecord(place.path.name, under_way.recipe.model, Protocol(**known, details=details), derive(records), environment)
    write_json(place.path / "record.json", made.to_json())
    if page:
        write_bytes(place.path / "report.html", render(made, "html").encode())
    return made
