"""The runner: from a recipe to artifacts, one directory a stage, each measured after it has been read back from disk.

A stage whose directory is there is reused; one that was interrupted goes on where it stopped; a changed setting makes a new directory and
leaves the old one. A budget is spent when the first of its stages is reached. All ranks run it: what depends on the disk
rank 0 decides, and it alone writes; stages in `ALONE` are its work, too. Knows the order of things; not what a stage does, nor what
its key is made of (`steps`). What a run has left is read in `ledger`, whose functions are offered here as well.
"""

import hashlib
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Unpack

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
from ..ranks.exchange import ONE, Ranks
from ..recipes.recipe import Recipe, check_addresses, resolve, run_directory
from ..stages.baseline import build_baseline
from ..stages.inputs import Inputs
from ..store.artifact import Artifact, ArtifactWriter, open_artifact, settle
from ..store.files import disk_errors, read_json, write_json
from ..store.manifest import MANIFEST
from ..store.rundir import RunDirectory, appears, check_shared
from .ledger import gc, record, status
from .opening import last_artifact
from .recording import Measures, measured, save_record, texts_of
from .session import Session, StageAddresses, check_ranks, given_addresses, plan_run, take_up
from .signals import Stop, signals

__all__ = ["Session", "Step", "gc", "last_artifact", "plan_steps", "record", "resume", "run", "status"]

log = logging.getLogger("bitmend")
ALONE = frozenset({"fuse"})
"""Stages that do not know ranks."""
PAGE_SECONDS = 10.0
"""A stage that takes longer is worth a page of its own while the run goes on."""


def run(
    recipe: Recipe,
    directory: Path | None = None,
    *,
    device: str = "auto",
    max_perplexity_ratio: float | None = None,
    page: bool = True,
    ranks: Ranks = ONE,
    **addresses: Unpack[StageAddresses],
) -> RunRecord:
    """Run a recipe, or go on with it. Returns the record of all its stages; `page` draws report.html as well. `ranks`: what other processes call
    this function with the same arguments.

    Raises UsageError, InputError, OutOfMemoryError; QualityError when the last stage's perplexity is above
    `max_perplexity_ratio` times the baseline's (everything is kept); KeyboardInterrupt on SIGINT and SIGTERM, resumable.
    """
    from_stage, until_stage, force = given_addresses(**addresses)
    place = RunDirectory((directory or run_directory(recipe)).resolve())
    with _taken(place, ranks), disk_errors(place.path), signals(ranks) as stop:
        compute = compute_of(place, device, recipe.dtype, recipe.deterministic, ranks)
        session = _prepare(recipe, place, compute, stop, ranks)
        check_addresses([step.address for step in session.steps], from_stage, until_stage, force)
        if from_stage is not None:
            _need_finished(session, from_stage)
        write_environment(place, compute, ranks)
        take_up(session)
        with determinism(compute):
            record = _advance(session, until_stage, force, page)
        session.log("finished", perplexity=record.stages[-1].perplexity)
    _gate(record, max_perplexity_ratio)
    return record


@contextmanager
def _taken(place: RunDirectory, ranks: Ranks) -> Iterator[None]:
    """Rank 0 makes the directory and holds it for all; the others see that it is the same one."""
    if ranks.leads:
        place.create()
        with place.held():
            if ranks.size > 1:
                check_shared(place.path, ranks)
            yield
    else:
        check_shared(place.path, ranks)
        yield


def resume(directory: Path, **options: Any) -> RunRecord:
    """Go on with the run in `directory`, with the settings it was started with."""
    place = RunDirectory(directory.resolve())
    place.read()
    if not place.recipe.is_file():
        raise InputError(f"{place.recipe}: missing, so nothing says what to resume; run the recipe again with -o {directory}")
    return run(resolve(place.checked_recipe()), directory, **options)


# -- planning --------------------------------------------------------------------------------------------------------------------


def _prepare(chosen: Recipe, place: RunDirectory, compute: Compute, stop: Stop, ranks: Ranks) -> Session:
    """Everything that can be refused is refused here, before any work and before anything in the directory changes. Caches are filled by rank 0."""
    ranks.alike({"recipe": _hash(chosen.to_yaml())})
    with ranks.first():
        source = source_of(chosen)
    refused = refusals(chosen, source)
    if refused:
        raise UsageError(refused[0] + (f" (and {len(refused) - 1} more: --dry-run lists them)" if len(refused) > 1 else ""))
    inputs = Inputs(chosen, source, str(compute.device))
    check_ranks(chosen, inputs, ranks)
    before = ranks.broadcast(place.read() if ranks.leads else None)
    session = Session(chosen, place, compute, inputs, stop, before, ranks=ranks)
    session.warnings = warnings(chosen, source)
    for warning in dict.fromkeys(session.warnings.values()):
        log.warning("%s", warning)
    with ranks.first():
        plan_run(session)
    states = _states(session)
    with ranks.first():
        inputs.check(step.spec for step in session.steps if step.spec is not None and states[step.address] != "done")
    ranks.alike({"model or data": [step.key[:8] for step in session.steps], "evaluation text": _hash(str(inputs.evaluation().protocol))})
    return session


def _states(session: Session) -> dict[str, str]:
    """Of every stage: done, partial or missing."""
    place, ranks = session.directory, session.ranks
    return ranks.broadcast({step.address: place.state(step.name) for step in session.steps} if ranks.leads else None)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# -- going on --------------------------------------------------------------------------------------------------------------------


def _advance(session: Session, until_stage: str | None, force: str | None, page: bool) -> RunRecord:
    place, ranks = session.directory, session.ranks
    if force is not None and ranks.leads:
        _set_aside(place, session.steps, force)
    parent: Artifact | None = None
    records: list[StageRecord] = []
    scores: list[Measures] = []
    texts = texts_of(session)
    while len(records) < len(session.steps):
        if parent is not None and not session.steps[len(records)].key:
            _spend(session, parent)
        step = session.steps[len(records)]
        began, news = time.monotonic(), ranks.broadcast(ranks.leads and place.state(step.name) != "done")
        with shortage(step.address, step.spec, session.compute), place.stage_held(step.name) if ranks.leads else nullcontext():
            artifact = _finish(session, step, parent)
            made, result = measured(session, step, artifact, texts, scores, records)
        records.append(made)
        scores.append(result)
        if news:
            save_record(session, records, texts, page=page and time.monotonic() - began > PAGE_SECONDS)
        parent = artifact
        if step.address == until_stage:
            break
    return save_record(session, records, texts, page=page)


def _spend(session: Session, parent: Artifact) -> None:
    """Choose for the stages of the budget, and take up the steps that follow from the choice."""
    directory = session.table
    assert directory is not None
    session.log("allocation begins", budget=session.recipe.settings()["budget"], table=directory.name)
    with session.stop.patient(), shortage("allocation", None, session.compute):
        made = spend(session.recipe, parent, directory, _context(session, directory, ONE)) if session.ranks.leads else None
        session.ranks.barrier()
    if made is not None:
        session.log("allocation ends", stored=made.stored, gap=made.gap)
        log.info("allocation: %s stored of %s%s", made.stored, made.budget, f"; {made.note}" if made.note else "")
    session.plan_and_share()
    take_up(session)


def _finish(session: Session, step: Step, parent: Artifact | None) -> Artifact:
    """The step's artifact: opened if it is there, else made."""
    place, ranks = session.directory, session.ranks
    final, scratch = place.artifact(step.name), place.scratch(step.name)
    if ranks.leads and (scratch / MANIFEST).is_file() and not final.is_dir():
        settle(scratch, final)  # killed while it was being sealed
    if ranks.broadcast(ranks.leads and final.is_dir()):
        artifact = _opened(final)
        if artifact.key != step.key:
            raise InputError(f"{final}: its key is {artifact.key[:8]}, expected {step.key[:8]}; delete it and run again")
        if ranks.leads:
            artifact.verify()
        log.info("%s: finished before (%s)", step.address, step.name)
        return artifact
    log.info("%s: %s", step.address, step.method or session.recipe.model)
    session.log("stage begins", stage=step.address, key=step.key)
    made = _make(session, step, parent)
    ranks.barrier()
    artifact = _opened(final) if made is None else made
    session.log("stage ends", stage=step.address)
    return artifact


def _opened(final: Path) -> Artifact:
    """An artifact that rank 0 finished; a network's file system may show it a little later."""
    appears(final / MANIFEST)
    return open_artifact(final)


def _make(session: Session, step: Step, parent: Artifact | None) -> Artifact | None:
    """Do a stage's work, or this rank's part of it; rank 0 has the artifact then. What it says about itself is on disk before its artifact has
    its name."""
    place, ranks = session.directory, session.ranks
    final, scratch, metrics = place.artifact(step.name), place.scratch(step.name), place.metrics(step.name)
    manifest = {
        "key": step.key,
        "parent": parent.key if parent else None,
        "stage": {"name": step.address, "method": step.method, "settings": step.settings},
    }
    if parent is None or step.spec is None:
        if not ranks.leads:
            return None
        with _timed(session.compute.device, metrics) as peak:
            artifact = build_baseline(session.inputs.model, scratch, final, manifest)
        _keep(metrics, stages.Outcome(), peak)
        return artifact
    alone = ranks.size > 1 and step.spec.name in ALONE
    writer, outcome = None, stages.Outcome()
    with _timed(session.compute.device, metrics if ranks.leads else None) as peak, session.stop.patient():
        if ranks.leads or not alone:
            sharing = ONE if alone else ranks
            writer = ArtifactWriter(scratch, parent, ranks=sharing)
            outcome = stages.perform(step.spec, parent, writer, _context(session, scratch, sharing))
        ranks.barrier()
    if writer is None or not ranks.leads:
        return None
    _keep(metrics, outcome, peak)
    documents = {n: (parent.directory / n).read_bytes() for n in parent.manifest["files"] if not n.endswith(".safetensors")}
    return writer.seal(final, manifest, {**documents, **outcome.documents})


@contextmanager
def _timed(device: torch.device, metrics: Path | None) -> Iterator[Peak]:
    """Peak memory and seconds, those of attempts that were stopped before included, which are kept in `metrics`."""
    path = None if metrics is None else metrics / "interrupted.json"
    earlier = read_json(path, "delete it and resume")["seconds"] if path is not None and path.is_file() else 0.0
    peak = Peak(device)
    try:
        with peak:
            yield peak
    except KeyboardInterrupt:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"seconds": earlier + peak.seconds})
        raise
    peak.seconds += earlier


def _keep(metrics: Path, outcome: stages.Outcome, peak: Peak) -> None:
    metrics.mkdir(parents=True, exist_ok=True)
    content = asdict(replace(outcome, documents={}))
    if peak.device.type == "cuda":
        content["metrics"]["host_peak_bytes"] = peak.host_bytes
    write_json(metrics / "stage.json", {**content, "seconds": peak.seconds, "peak_bytes": peak.bytes})
    (metrics / "interrupted.json").unlink(missing_ok=True)


def _context(session: Session, scratch: Path, ranks: Ranks) -> "stages.Context":
    """For `ranks`, who share the work: all, or rank 0 alone."""
    place, inputs = session.directory, session.inputs
    baseline_step = session.steps[0]
    baseline = open_artifact(place.artifact(baseline_step.name))
    return stages.Context(
        baseline=baseline,
        teacher=_teacher(session, baseline, ranks),
        baseline_metrics=place.metrics(baseline_step.name),
        teacher_states=place.teacher_states,
        scratch=scratch,
        device=session.compute.device,
        dtype=session.compute.dtype,
        seed=session.recipe.seed,
        inputs=inputs,
        stop=session.stop.agreed if ranks.size > 1 else session.stop.requested.is_set,
        ranks=ranks,
    )


def _teacher(session: Session, baseline: Artifact, ranks: Ranks) -> Artifact | None:
    """The model given with --teacher as an artifact of this run; else the baseline, unless it came quantized."""
    key = session.inputs.teacher_fingerprint()
    if key is None:
        return None if baseline.linears else baseline
    final = session.directory.artifact(f"teacher-{key[:8]}")
    if ranks.leads:
        _make_teacher(session, key, final)
    ranks.barrier()
    return _opened(final)


def _make_teacher(session: Session, key: str, final: Path) -> None:
    if final.is_dir():
        return
    source = resolve_model(str(session.recipe.teacher))
    manifest = {"key": key, "parent": None, "stage": {"name": "teacher", "method": None, "settings": {"model": session.recipe.teacher}}}
    with session.directory.stage_held(final.name):
        if not final.is_dir():
            build_baseline(source, session.directory.scratch(final.name), final, manifest)


def _need_finished(session: Session, address: str) -> None:
    """--from says: what lies before is taken as it is. It must be there."""
    states = _states(session)
    for step in session.steps:
        if step.address == address:
            return
        if states[step.address] != "done":
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
