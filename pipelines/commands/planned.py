"""The command that plans a run over several processes: `plan`."""

from typing import Annotated, Any

import typer

from ..errors import UsageError
from . import common as o
from .runs import RecipeName, start

RanksAsked = Annotated[str, typer.Option("--ranks", metavar="N,N,…", help="numbers of processes, each with a device like this one")]
LinkGiven = Annotated[
    str | None,
    typer.Option("--link", metavar="GB/s[,µs]", help="between ranks; else measured by two gloo processes of this machine"),
]
ShapeName = Annotated[
    str | None, typer.Option("--shape", metavar="NAME", help="a model of this shape, which need not be there: 8b, 70b, 405b, …")
]


def plan(
    recipe: RecipeName,
    ranks: RanksAsked = "1,2,4,8",
    link: LinkGiven = None,
    shape: ShapeName = None,
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
    json: o.Json = False,
    profile: o.Profile = None,
    revision: o.Revision = None,
    budget: o.BudgetText = None,
    teacher: o.Teacher = None,
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
) -> None:
    """Seconds and bytes of a run on several processes (ranks), what is serial, and where more ranks stop helping; does nothing."""
    start(verbose, quiet)
    sizes = _sizes(ranks)
    given: dict[str, Any] = {"model": model, "data": data, "calibration": calibration, "train": train, "eval": eval_, "seed": seed}
    given |= {"dtype": dtype, "profile": profile, "revision": revision, "budget": budget, "teacher": teacher}
    if shape is not None and model is not None:
        raise UsageError(f"--shape {shape} is a model that nobody has, and -m {model} is another one: give one of them")
    from ..devices.link import given_link, measured_link
    from ..planning import plan as planning
    from ..planning.scale_out import predicted
    from ..recipes.recipe import planned_directory, resolve

    chosen_link = None if link is None else given_link(link)
    if shape is not None:
        resolved = resolve(recipe, file=config, sets=sets or [], options=given | {"model": shape, "profile": profile or "standard"})
        made = planning.costed_of_config(resolved, _config(shape), device)
    else:
        layers: Any = {"file": config, "sets": sets or [], "options": given}
        made = planning.costed(resolve(recipe, **layers), output or planned_directory(recipe, **layers), device)
    if refusals := made.report["refusals"]:
        raise UsageError(f"this run would be refused: {refusals[0]}" + (f" (and {len(refusals) - 1} more)" if len(refusals) > 1 else ""))
    if chosen_link is None and made.report["device"] != "cpu" and max(sizes) > 1:
        raise UsageError(
            f"--link: what lies between devices of type {made.report['device']} is not measured here; give its GB/s, as in --link 25"
        )
    o.write(predicted(made, sizes, chosen_link or measured_link()), json)


def _sizes(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) <= MOST_RANKS for part in parts):
        raise UsageError(f"--ranks {text}: expected numbers of processes from 1 to {MOST_RANKS}, as in 1,2,4,8")
    return tuple(sorted({int(part) for part in parts}))


MOST_RANKS = 4096


def _config(shape: str) -> Any:
    from ..bench.synthetic import SHAPES, config_of
    from ..recipes.settings import unknown

    if shape not in SHAPES:
        raise UsageError(f"--shape: {unknown('shape', shape, SHAPES)}")
    return config_of(SHAPES[shape])
