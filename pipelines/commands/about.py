"""Commands about the program itself: list, show, doctor, bench."""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import UsageError
from . import common as o
from .runs import RecipeName, start

FORMATS = {
    "dense": "plain safetensors, any program",
    "gptq": "GPTQ checkpoint, version 1 (auto-gptq, vLLM)",
    "gptq-v2": "GPTQ checkpoint, version 2 (GPTQModel)",
    "compressed-tensors": "pack-quantized (vLLM, transformers)",
    "bnb": "bitsandbytes NF4 (transformers)",
}


def list_(json: o.Json = False, verbose: o.Verbose = False, quiet: o.Quiet = False) -> None:
    """Recipes, the methods of each stage with their settings and defaults, export formats."""
    start(verbose, quiet)
    from ..recipes.recipe import STAGES, known_recipes, methods
    from ..recipes.settings import read_mapping

    recipes = {name: read_mapping(_recipe_file(name)).get("about", "") for name in known_recipes()}
    stages = {stage: {name: _defaults(row) for name, row in methods(stage).items()} for stage in STAGES}
    of_stages = {stage: _of_stage(stage) for stage in STAGES if _of_stage(stage)}
    departs = {s: {name: row.departs for name, row in methods(s).items() if getattr(row, "departs", "")} for s in STAGES}
    shown: dict[str, Any] = {stage: _lines(settings, departs[stage]) for stage, settings in stages.items()}
    for stage, settings in of_stages.items():
        shown[stage] = {"(any method)": " ".join(f"{key}={value}" for key, value in settings.items())} | shown[stage]
    machine = {**stages, "stage_settings": of_stages, "departures_from_papers": {s: found for s, found in departs.items() if found}}
    o.write({"recipes": recipes, **(machine if json else shown), "export_formats": FORMATS}, json)


def show(
    recipe: RecipeName,
    model: o.Model = None,
    config: o.SettingsFile = None,
    sets: o.Sets = None,
    profile: o.Profile = None,
    json: o.Json = False,
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
) -> None:
    """A recipe with every default written out, ready to save and change."""
    start(verbose, quiet)
    from ..recipes.recipe import resolve

    resolved = resolve(recipe, file=config, sets=sets or [], options={"model": model, "profile": profile})
    if json:
        o.write_json(resolved.settings())
    else:
        typer.echo(resolved.to_yaml().rstrip("\n"))


def doctor(json: o.Json = False, verbose: o.Verbose = False, quiet: o.Quiet = False) -> None:
    """What this machine offers, what was measured on it, what is missing and how to fix it."""
    start(verbose, quiet)
    from .. import doctor as examining

    o.write(examining.report(), json)


def bench(
    subject: Annotated[
        Literal["compress", "decompose", "allocate", "recover", "kernels", "generate"], typer.Argument(help="what to measure")
    ],
    model: Annotated[
        str | None, typer.Option("-m", "--model", metavar="MODEL", help="whole stages of this model, not synthetic layers")
    ] = None,
    sizes: Annotated[list[int] | None, typer.Option("--size", metavar="N", min=64, help="width of a synthetic layer; repeatable")] = None,
    only: Annotated[list[str] | None, typer.Option("--method", metavar="NAME", help="this method only; repeatable")] = None,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", min=1, help="measurements of each row")] = 3,
    depths: Annotated[
        str | None, typer.Option("--depths", metavar="N,N,…", help="compress: time and peak memory of models with so many blocks")
    ] = None,
    shape: Annotated[
        str | None, typer.Option("--shape", metavar="NAME", help="compress: a model of this shape, made on the spot: 1b, 8b, 70b")
    ] = None,
    blocks: Annotated[int | None, typer.Option("--blocks", metavar="N", min=1, help="so many blocks of that shape, not all")] = None,
    full: Annotated[bool, typer.Option("--full", help="kernels: every shape, hours on a CPU; decompose: slow baselines")] = False,
    device: o.Device = "auto",
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="write JSON, table and plot there")] = None,
    json: o.Json = False,
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
) -> None:
    """Seconds, memory and errors of one part of the program, on this machine."""
    start(verbose, quiet)
    if output is not None and output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file; -o takes a directory")
    from ..bench import benchmarks

    deep = _numbers(depths) if depths is not None else ()
    widths = tuple(sizes or benchmarks.SIZES)
    chosen = benchmarks.Options(device, widths, tuple(only or ()), repeats, model, output, deep, shape, full, blocks)
    o.write(benchmarks.run(subject, chosen), json)


def _numbers(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--depths {text}: expected numbers of blocks, as in 4,8,16,32")
    return tuple(int(part) for part in parts)


def _recipe_file(name: str) -> Path:
    from ..recipes.recipe import RECIPES

    return RECIPES / f"{name}.yaml"


def _defaults(row: Any) -> dict[str, Any]:
    """Setting → default of a method."""
    preset = dict(getattr(row, "defaults", None) or {})
    return {item.name: preset.get(item.name, None if item.default is MISSING else item.default) for item in fields(row.config)}


def _of_stage(stage: str) -> dict[str, Any]:
    """Setting → default of what every method of a stage takes besides its own settings."""
    from ..recipes.recipe import STAGES, StageSpec

    defaults = {item.name: item.default if item.default is not MISSING else {} for item in fields(StageSpec)}
    return {key: list(defaults[key]) if isinstance(defaults[key], tuple) else defaults[key] for key in STAGES[stage][3]}


def _lines(settings: dict[str, dict[str, Any]], departs: dict[str, str]) -> dict[str, str]:
    """One line a method, with where it departs from its paper; what all methods of the stage agree on stands once."""
    every = [set(map(repr, defaults.items())) for defaults in settings.values()]
    common = set.intersection(*every) if len(every) > 1 else set()
    lines = {}
    if common:
        lines["(all)"] = " ".join(f"{key}={value}" for key, value in next(iter(settings.values())).items() if repr((key, value)) in common)
    for name, defaults in settings.items():
        lines[name] = " ".join(f"{key}={value}" for key, value in defaults.items() if repr((key, value)) not in common)
        lines[name] += f" ({departs[name]})" if name in departs else ""
    return lines
