"""Commands about the program itself: list, show, doctor, bench."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import UsageError
from . import options as o
from .runs import RecipeName, start

FORMATS = {
    "dense": "plain safetensors, any program",
    "gptq": "GPTQ checkpoint, version 1 (auto-gptq, vLLM)",
    "gptq-v2": "GPTQ checkpoint, version 2 (GPTQModel)",
    "compressed-tensors": "pack-quantized (vLLM, transformers)",
    "bnb": "bitsandbytes NF4 (transformers)",
}


def list_(json: o.Json = False, verbose: o.Verbose = False, quiet: o.Quiet = False) -> None:
    """Recipes, the methods of each stage, export formats."""
    start(verbose, quiet)
    from ..recipe import STAGES, known_recipes, methods
    from ..settings import read_mapping

    recipes = {name: read_mapping(_recipe_file(name)).get("about", "") for name in known_recipes()}
    stages = {stage: {name: _summary(row) for name, row in methods(stage).items()} for stage in STAGES}
    o.write({"recipes": recipes, **stages, "export_formats": FORMATS}, json)


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
    from ..recipe import resolve

    resolved = resolve(recipe, file=config, sets=sets or [], options={"model": model, "profile": profile})
    if json:
        o.write_json(resolved.settings())
    else:
        typer.echo(resolved.to_yaml().rstrip("\n"))


def doctor(json: o.Json = False, verbose: o.Verbose = False, quiet: o.Quiet = False) -> None:
    """What this machine offers, what was measured on it, what is missing and how to mend it."""
    start(verbose, quiet)
    from .. import doctor as examining

    o.write(examining.report(), json)


def bench(
    subject: Annotated[Literal["compress", "decompose", "recover", "kernels"], typer.Argument(help="what to measure")],
    device: o.Device = "auto",
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="write the JSON, table and plot there")] = None,
    json: o.Json = False,
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
) -> None:
    """Seconds, memory and errors of one part of the program, on this machine."""
    start(verbose, quiet)
    if output is not None and output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file; -o takes a directory")
    from .. import benchmarks

    o.write(benchmarks.BENCHES[subject](device=device, output=output), json)


def _recipe_file(name: str) -> Path:
    from ..recipe import RECIPES

    return RECIPES / f"{name}.yaml"


def _summary(row: Any) -> str:
    """The first sentence about a method, and its settings with their defaults."""
    import dataclasses

    preset = dict(getattr(row, "defaults", None) or {})
    shown = []
    for item in dataclasses.fields(row.config):
        value = preset.get(item.name, item.default if item.default is not dataclasses.MISSING else "…")
        shown.append(f"{item.name}={value}")
    return " ".join(shown) or "no settings"
