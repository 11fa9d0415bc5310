"""Commands that work in a run directory: run, resume, status, gc, sweep."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import logs
from ..errors import InputError, OutOfMemoryError, QualityError, UsageError
from ..ranks.joining import joined
from . import common as o
from .streams import echo

if TYPE_CHECKING:
    from ..recipes.recipe import Recipe

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="a name from `pipeline list`, or a .yaml file")]
ListOnly = Annotated[bool, typer.Option("--dry-run", help="list what would be deleted, delete nothing")]
Verify = Annotated[bool, typer.Option("--verify", help="read every finished stage again and compare its checksums")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="predict bytes, memory, disk and time, name refusals, do nothing")]
Over = Annotated[list[str], typer.Option("--over", metavar="KEY=A,B,C", help="a setting and its values; repeatable (all combinations)")]
Jobs = Annotated[
    int,
    typer.Option("--jobs", min=1, metavar="N", help="so many combinations at once, a process each, on GPUs with one to itself; same bits"),
]
SweepBudget = Annotated[
    str | None,
    typer.Option(
        "--budget", metavar="3.0bpw|60MB|200k", help="size for the allocation, or (a bare number, k, M) the most that may be trained"
    ),
]


def run(
    recipe: RecipeName,
    model: o.Model = None,
    data: o.Source = None,
    calibration: o.CalibrationSource = None,
    train: o.TrainSource = None,
    eval_: o.EvalSource = None,
    output: o.OutputRun = None,
    config: o.SettingsFile = None,
    sets: o.Sets = None,
    from_stage: o.FromStage = None,
    until_stage: o.UntilStage = None,
    force: o.ForceStage = None,
    device: o.Device = "auto",
    dtype: o.Dtype = None,
    seed: o.Seed = None,
    dry_run: DryRun = False,
    json: o.Json = False,
    profile: o.Profile = None,
    revision: o.Revision = None,
    budget: o.BudgetText = None,
    teacher: o.Teacher = None,
    max_perplexity_ratio: o.Gate = None,
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
) -> None:
    """Run a recipe. The same command again goes on where it stopped; a changed setting redoes that stage and those after it."""
    start(verbose, quiet)
    given = {"model": model, "data": data, "calibration": calibration, "train": train, "eval": eval_, "seed": seed, "dtype": dtype}
    given |= {"profile": profile, "revision": revision, "budget": budget, "teacher": teacher}
    from ..recipes.recipe import planned_directory, resolve
    from ..store.rundir import RunDirectory

    layers: Any = {"file": config, "sets": sets or [], "options": given}
    directory = output or planned_directory(recipe, **layers)
    mine = joined()
    with (
        RunDirectory(directory.absolute()).created() if mine.leads and not dry_run else nullcontext()
    ):  # `status` finds it before torch is there
        resolved = resolve(recipe, **layers)
        resolved.check_addresses(from_stage, until_stage, force)
    if dry_run:
        if mine.leads:
            predict(resolved, directory, device, json)
        return
    from ..run import runner

    options = {"from_stage": from_stage, "until_stage": until_stage, "force": force, "device": device}
    with reported(directory, json):
        runner.run(resolved, directory, max_perplexity_ratio=max_perplexity_ratio, ranks=mine, **options)


def resume(
    run_directory: o.RunDirectory,
    from_stage: o.FromStage = None,
    until_stage: o.UntilStage = None,
    force: o.ForceStage = None,
    device: o.Device = "auto",
    json: o.Json = False,
    max_perplexity_ratio: o.Gate = None,
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
) -> None:
    """Go on with a run that was interrupted, with the settings it was started with."""
    start(verbose, quiet)
    existing(run_directory)
    from ..run import runner

    options = {"from_stage": from_stage, "until_stage": until_stage, "force": force, "device": device}
    with reported(run_directory, json):
        runner.resume(run_directory, max_perplexity_ratio=max_perplexity_ratio, ranks=joined(), **options)


def status(
    run_directory: o.RunDirectory, verify: Verify = False, json: o.Json = False, verbose: o.Verbose = False, quiet: o.Quiet = False
) -> None:
    """Which stages are finished, which is under way, and what is still to do."""
    start(verbose, quiet)
    existing(run_directory)
    from ..run import ledger

    o.write(ledger.status(run_directory, verify), json)


def gc(
    run_directory: o.RunDirectory, dry_run: ListOnly = False, json: o.Json = False, verbose: o.Verbose = False, quiet: o.Quiet = False
) -> None:
    """Delete what nothing needs: stages of other settings and leftovers of interrupted ones. The points of a sweep are needed."""
    start(verbose, quiet)
    existing(run_directory)
    from ..run import ledger

    o.write(ledger.gc(run_directory, dry_run), json)


def sweep(
    recipe: RecipeName,
    over: Over,
    model: o.Model = None,
    data: o.Source = None,
    calibration: o.CalibrationSource = None,
    train: o.TrainSource = None,
    eval_: o.EvalSource = None,
    output: o.OutputRun = None,
    config: o.SettingsFile = None,
    sets: o.Sets = None,
    device: o.Device = "auto",
    dtype: o.Dtype = None,
    seed: o.Seed = None,
    dry_run: DryRun = False,
    json: o.Json = False,
    profile: o.Profile = None,
    revision: o.Revision = None,
    budget: SweepBudget = None,
    teacher: o.Teacher = None,
    jobs: Jobs = 1,
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
) -> None:
    """Run a recipe for every combination of settings and compare them; stages that agree run once."""
    start(verbose, quiet)
    given = {"model": model, "data": data, "calibration": calibration, "train": train, "eval": eval_, "seed": seed, "dtype": dtype}
    from ..run import sweep as sweeping
    from ..store.rundir import RunDirectory

    limit = sweeping.trainable_limit(budget)
    given |= {"profile": profile, "revision": revision, "budget": budget if limit is None else None, "teacher": teacher}
    layers: Any = {"file": config, "sets": sets or [], "options": given}
    directory = output or sweeping.directory(recipe, over, **layers)
    with nullcontext() if dry_run else RunDirectory(directory.absolute()).created():  # `status` finds it before torch is there
        points = sweeping.combinations(recipe, over, **layers)
    if dry_run:
        o.write({"directory": str(directory), "runs": [point.settings for point in points]}, json)
        return
    outcome = sweeping.sweep(points, directory, device=device, max_trainable=limit, jobs=jobs)
    if json:
        o.write_json(outcome.to_json())
    else:
        echo(o.table(outcome.rows(), sweeping.TITLES).rstrip("\n"))
        if (page := directory / "sweep" / "compare.html").is_file():
            echo(f"report: {page}")
    outcome.raise_failure()


def start(verbose: bool, quiet: bool) -> None:
    if verbose and quiet:
        raise UsageError("-v and -q exclude each other")
    logs.setup(verbose, quiet, silent=not joined().leads)


def existing(directory: Path) -> None:
    """InputError unless it is a directory."""
    if not directory.is_dir():
        raise InputError(f"{directory}: no such run directory; `pipeline run RECIPE -o {directory}` makes one")


def predict(recipe: "Recipe", directory: Path, device: str, as_json: bool) -> None:
    """Print the plan; UsageError names the first refusal."""
    from ..planning import plan

    predicted: dict[str, Any] = plan.predict(recipe, directory, device)
    o.write(predicted, as_json)
    refusals = predicted.get("refusals") or []
    if refusals:
        more = f" (and {len(refusals) - 1} more above)" if len(refusals) > 1 else ""
        raise UsageError(f"this run would be refused: {refusals[0]}{more}")
    if shortages := predicted.get("shortages"):
        raise OutOfMemoryError(f"this run would run out of memory: {shortages[0]}")


@contextmanager
def reported(directory: Path, as_json: bool) -> Iterator[None]:
    """After the run the stage table, and where the page lies; a result that fails the quality gate is shown as well. Of several ranks one shows it."""
    try:
        yield
    except QualityError:
        if joined().leads:
            _show(directory, as_json)
        raise
    if joined().leads:
        _show(directory, as_json)


def _show(directory: Path, as_json: bool) -> None:
    from ..run import ledger

    o.show_record(ledger.record(directory), as_json)
    page = directory / "report.html"
    if page.is_file() and not as_json:
        echo(f"report: {page if page.is_absolute() else os.path.relpath(page)}")
