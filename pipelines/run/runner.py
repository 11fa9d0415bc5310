"""The runner: from a recipe to artifacts, one directory a stage, each measured after it has been read back from disk.

A stage whose directory is there is reused; one that was interrupted goes on where it stopped; a changed setting makes a new directory and
leaves the old one. A budget is spent when the first of its stages is reached. Knows the order of things; not what a stage does, nor what
its key is made of (`steps`). What a run has left is read in `ledger`, whose functions are offered here as well.
"""

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ...reports.record import RunRecord, StageRecord
from .. import stages
from ..allocation.choice import spend
from ..devices.compute import Compute, determinism
from ..devices.environment import compute_of, write_environment
from ..devices.shortage import shortage
from ..errors import InputError, QualityError, UsageError
from ..evaluation.measure import Peak
from ..models.source import resolve_model, source_of
from ..planning.plan import refusals, warnings
from ..planning.steps import Step, plan_steps
from ..recipes.recipe import Recipe, check_addresses, resolve, run_directory
from ..stages.baseline import build_baseline
from ..stages.inputs import Inputs
from ..store.artifact import Artifact, ArtifactWriter, open_artifact, settle
from ..store.files import disk_errors, read_json, write_json
from ..store.manifest import MANIFEST
from ..store.rundir import RunDirectory
from .ledger import gc, record, status
from .opening import last_artifact
from .recording import Measures, measured, save_record, texts_of
from .session import Session, plan_run, take_up
from .signals import Stop, signals

__all__ = ["Session", "Step", "gc", "last_artifact", "plan_steps", "record", "resume", "run", "status"]

log = logging.getLogger("bitmend")
PAGE_SECONDS = 10.0
"""A stage that takes longer is worth a page of its own while the run goes on."""


def run(
    recipe: Recipe,
    directory: Path | None = None,
    *,
    from_stage: str | None = None,
    until_stage: str | None = None,
    force: str | None = None,
    device: str = "auto",
    max_perplexity_ratio: float | None = None,
    page: bool = True,
) -> RunRecord:
    """Run a recipe, or go on with it. Returns the record of all its stages; `page` draws report.html as well.

    Raises UsageError, InputError, OutOfMemoryError; QualityError when the last stage's perplexity is above
    `max_perplexity_ratio` times the baseline's (everything is kept); KeyboardInterrupt on SIGINT and SIGTERM, resumable.
    """
    place = RunDirectory((directory or run_directory(recipe)).resolve())
    place.create()
    with place.held(), disk_errors(place.path), signals() as stop:
        compute = compute_of(place, device, recipe.dtype, recipe.deterministic)
        under_way = _prepare(recipe, place, compute, stop)
        check_addresses([step.address for step in under_way.steps], from_stage, until_stage, force)
        if from_stage is not None:
            _need_finished(place, under_way.steps, from_stage)
        write_environment(place, compute)
        take_up(under_way)
        with determinism(compute):
            record = _advance(under_way, until_stage, force, page)
        place.log("finished", perplexity=record.stages[-1].perplexity)
    _gate(record, max_perplexity_ratio)
    return record


def resume(directory: Path, **options: Any) -> RunRecord:
    """Go on with the run in `directory`, with the settings it was started with."""
    place = RunDirectory(directory.resolve())
    place.read()
    if not place.recipe.is_file():
        raise InputError(f"{place.recipe}: missing, so nothing says what to resume; run the recipe again with -o {directory}")
    return run(resolve(place.checked_recipe()), directory, **options)


# -- planning --------------------------------------------------------------------------------------------------------------------


def _prepare(chosen: Recipe, place: RunDirectory, compute: Compute, stop: Stop) -> Session:
    """Everything that can be refused is refused here, before any work and before anything in the directory changes."""
    source = source_of(chosen)
    refused = refusals(chosen, source)
    if refused:
        raise UsageError(refused[0] + (f" (and {len(refused) - 1} more: --dry-run lists them)" if len(refused) > 1 else ""))
    inputs = Inputs(chosen, source, str(compute.device))
    under_way = Session(chosen, place, compute, inputs, stop, place.read())
    under_way.warnings = warnings(chosen, source)
    for warning in dict.fromkeys(under_way.warnings.values()):
        log.warning("%s", warning)
    plan_run(under_way)
    inputs.check(step.spec for step in under_way.steps if step.spec is not None and place.state(step.name) != "done")
    return under_way


# -- going on --------------------------------------------------------------------------------------------------------------------


def _advance(under_way: Session, until_stage: str | None, force: str | None, page: bool) -> RunRecord:
    place = under_way.directory
    if force is not None:
        _set_aside(place, under_way.steps, force)
    parent: Artifact | None = None
    records: list[StageRecord] = []
    scores: list[Measures] = []
    texts = texts_of(under_way)
    while len(records) < len(under_way.steps):
        if parent is not None and not under_way.steps[len(records)].key:
            _spend(under_way, parent)
        step = under_way.steps[len(records)]
        began, news = time.monotonic(), place.state(step.name) != "done"
        with shortage(step.address, step.spec, under_way.compute), place.stage_held(step.name):
            artifact = _finish(under_way, step, parent)
            made, found = measured(under_way, step, artifact, texts, scores, records)
        records.append(made)
        scores.append(found)
        if news:
            save_record(under_way, records, texts, page=page and time.monotonic() - began > PAGE_SECONDS)
        parent = artifact
        if step.address == until_stage:
            break
    return save_record(under_way, records, texts, page=page)


def _spend(under_way: Session, parent: Artifact) -> None:
    """Choose for the stages of the budget, and take up the steps that follow from the choice."""
    place, directory = under_way.directory, under_way.table
    assert directory is not None
    place.log("allocation begins", budget=under_way.recipe.settings()["budget"], table=directory.name)
    with under_way.stop.patient(), shortage("allocation", None, under_way.compute):
        made = spend(under_way.recipe, parent, directory, _context(under_way, directory))
    place.log("allocation ends", stored=made.stored, gap=made.gap)
    log.info("allocation: %s stored of %s%s", made.stored, made.budget, f"; {made.note}" if made.note else "")
    plan_run(under_way)
    take_up(under_way)


def _finish(under_way: Session, step: Step, parent: Artifact | None) -> Artifact:
    """The step's artifact: opened if it is there, else made."""
    place = under_way.directory
    final, scratch = place.artifact(step.name), place.scratch(step.name)
    if (scratch / MANIFEST).is_file() and not final.is_dir():
        settle(scratch, final)  # killed while it was being sealed
    if final.is_dir():
        artifact = open_artifact(final)
        if artifact.key != step.key:
            raise InputError(f"{final}: its key is {artifact.key[:8]}, expected {step.key[:8]}; delete it and run again")
        artifact.verify()
        log.info("%s: finished before (%s)", step.address, step.name)
        return artifact
    log.info("%s: %s", step.address, step.method or under_way.recipe.model)
    place.log("stage begins", stage=step.address, key=step.key)
    artifact = _make(under_way, step, parent)
    place.log("stage ends", stage=step.address)
    return artifact


def _make(under_way: Session, step: Step, parent: Artifact | None) -> Artifact:
    """Do a stage's work. What it says about itself is on disk before its artifact has its name."""
    place = under_way.directory
    final, scratch, metrics = place.artifact(step.name), place.scratch(step.name), place.metrics(step.name)
    manifest = {
        "key": step.key,
        "parent": parent.key if parent else None,
        "stage": {"name": step.address, "method": step.method, "settings": step.settings},
    }
    if parent is None or step.spec is None:
        with _timed(under_way.compute.device, metrics) as peak:
            artifact = build_baseline(under_way.inputs.model, scratch, final, manifest)
        _keep(metrics, stages.Outcome(), peak)
        return artifact
    with _timed(under_way.compute.device, metrics) as peak, under_way.stop.patient():
        writer = ArtifactWriter(scratch, parent)
        outcome = stages.perform(step.spec, parent, writer, _context(under_way, scratch))
    _keep(metrics, outcome, peak)
    documents = {n: (parent.directory / n).read_bytes() for n in parent.manifest["files"] if not n.endswith(".safetensors")}
    return writer.seal(final, manifest, {**documents, **outcome.documents})


@contextmanager
def _timed(device: torch.device, metrics: Path) -> Iterator[Peak]:
    """Peak memory and seconds, those of attempts that were stopped before included."""
    path = metrics / "interrupted.json"
    earlier = read_json(path, "delete it and resume")["seconds"] if path.is_file() else 0.0
    peak = Peak(device)
    try:
        with peak:
            yield peak
    except KeyboardInterrupt:
        metrics.mkdir(parents=True, exist_ok=True)
        write_json(path, {"seconds": earlier + peak.seconds})
        raise
    peak.seconds += earlier


def _keep(metrics: Path, outcome: stages.Outcome, peak: Peak) -> None:
    metrics.mkdir(parents=True, exist_ok=True)
    said = asdict(replace(outcome, documents={}))
    if peak.device.type == "cuda":
        said["metrics"]["host_peak_bytes"] = peak.host_bytes
    write_json(metrics / "stage.json", {**said, "seconds": peak.seconds, "peak_bytes": peak.bytes})
    (metrics / "interrupted.json").unlink(missing_ok=True)


def _context(under_way: Session, scratch: Path) -> "stages.Context":
    place, inputs = under_way.directory, under_way.inputs
    baseline_step = under_way.steps[0]
    baseline = open_artifact(place.artifact(baseline_step.name))
    return stages.Context(
        baseline=baseline,
        teacher=_teacher(under_way, baseline),
        baseline_metrics=place.metrics(baseline_step.name),
        teacher_states=place.teacher_states,
        scratch=scratch,
        device=under_way.compute.device,
        dtype=under_way.compute.dtype,
        seed=under_way.recipe.seed,
        inputs=inputs,
        stop=under_way.stop.asked.is_set,
    )


def _teacher(under_way: Session, baseline: Artifact) -> Artifact | None:
    """The model given with --teacher as an artifact of this run; else the baseline, unless it came quantized."""
    key = under_way.inputs.teacher_fingerprint()
    if key is None:
        return None if baseline.linears else baseline
    final = under_way.directory.artifact(f"teacher-{key[:8]}")
    if final.is_dir():
        return open_artifact(final)
    source = resolve_model(str(under_way.recipe.teacher))
    manifest = {"key": key, "parent": None, "stage": {"name": "teacher", "method": None, "settings": {"model": under_way.recipe.teacher}}}
    with under_way.directory.stage_held(final.name):
        if final.is_dir():
            return open_artifact(final)
        return build_baseline(source, under_way.directory.scratch(final.name), final, manifest)


def _need_finished(place: RunDirectory, steps: list[Step], address: str) -> None:
    """--from says: what lies before is taken as it is. It must be there."""
    for step in steps:
        if step.address == address:
            return
        if place.state(step.name) != "done":
            raise UsageError(f"--from {address}: {step.address} is not finished with these settings; run without --from")


def _set_aside(place: RunDirectory, steps: list[Step], address: str) -> None:
    """--force: this stage and those after it are removed and done again; each loses its name before its files go."""
    begin = next(i for i, s in enumerate(steps) if s.address == address)
    for step in steps[begin:]:
        for path in (place.artifact(step.name), place.scratch(step.name), place.metrics(step.name)):
            if path.is_dir():
                going = path.with_name(f"{path.name}.removed")
                shutil.rmtree(going, ignore_errors=True)
                path.rename(going)
                shutil.rmtree(going)


def _gate(made: RunRecord, limit: float | None) -> None:
    ratio = made.stages[-1].perplexity_ratio
    if limit is not None and (ratio is None or ratio > limit):
        last = made.stages[-1]
        raise QualityError(
            f"{last.stage}: perplexity {last.perplexity:.3f} is {ratio or float('nan'):.3f} times the baseline's, above --max-perplexity-ratio {limit}; the artifacts are kept"
        )
