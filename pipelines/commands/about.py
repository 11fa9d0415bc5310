"""Commands about the program itself: list, show, doctor, bench; and its version."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import UsageError
from . import common as o
from .runs import RecipeName, start
from .streams import echo

MethodName = Annotated[str | None, typer.Argument(metavar="METHOD", help="the settings of this method")]

FORMATS = {
    "dense": "plain safetensors, any program",
    "gptq": "GPTQ checkpoint, version 1 (auto-gptq)",
    "gptq-v2": "GPTQ checkpoint, version 2 (GPTQModel)",
    "compressed-tensors": "pack-quantized (vLLM, transformers)",
    "bnb": "bitsandbytes NF4 (transformers)",
    "gguf": "one file (llama.cpp)",
}


CHECKOUT = Path(__file__).resolve().parents[2]
"""What holds the folders; where that is a git checkout, `.git` lies in it, and nowhere in an installed wheel."""


def version(checkout: Path = CHECKOUT) -> str:
    """The installed version; of a checkout its commit as well, read from `.git` (a directory, or the file of a worktree) without git.
    A commit that cannot be read there is given as unknown."""
    try:
        number = installed_version("bitmend")
    except PackageNotFoundError:
        number = "not installed"
    git = checkout / ".git"
    return f"{number} (commit {_commit(git)})" if git.exists() else number


def _commit(git: Path) -> str:
    """12 digits of the commit that HEAD names: itself, or through a branch, whose file may be packed into one with others."""
    try:
        if git.is_file():  # a worktree: its own HEAD, branches in the directory that it shares with the others
            git = git.parent / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        shared = git / "commondir"
        common = git / shared.read_text(encoding="utf-8").strip() if shared.is_file() else git
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if head.startswith("ref:"):
            head = _tip(common, head.removeprefix("ref:").strip())
    except (OSError, UnicodeDecodeError):
        return "unknown"
    return head[:12] if len(head) >= 40 and set(head) <= set("0123456789abcdef") else "unknown"


def _tip(common: Path, branch: str) -> str:
    if (common / branch).is_file():
        return (common / branch).read_text(encoding="utf-8").strip()
    lines = (common / "packed-refs").read_text(encoding="utf-8").splitlines()
    return next((line.split()[0] for line in lines if line.endswith(f" {branch}")), "")


def list_(method: MethodName = None, json: o.Json = False, verbose: o.Verbose = False, quiet: o.Quiet = False) -> None:
    """Recipes, the methods of each stage, export formats; with METHOD its settings, their ranges and defaults, and advice."""
    start(verbose, quiet)
    from ..recipes import catalog

    if method is not None:
        rows = catalog.named(method)
        if json:
            o.write_json({"methods": rows})
            return
        for place, row in enumerate(rows):
            _write_method(row, place)
    elif json:
        o.write_json(_machine_list(catalog.catalog()))
    else:
        _write_list(catalog.catalog())


def _machine_list(known: Mapping[str, Any]) -> dict[str, Any]:
    """Setting → default of every method, the settings that all methods of a stage share, what each does and where it departs from its paper."""
    from ..recipes.stage_settings import STAGES

    stages, of_stages, does, departs = {}, {}, {}, {}
    for stage, rows in known["methods"].items():
        shared = STAGES[stage][3]
        defaults = {name: {item["name"]: item["default"] for item in row["settings"]} for name, row in rows.items()}
        stages[stage] = {name: {key: value for key, value in row.items() if key not in shared} for name, row in defaults.items()}
        if shared:
            of_stages[stage] = {key: next(iter(defaults.values()))[key] for key in shared}
        does[stage] = {name: {"does": row["does"], "paper": row["paper"]} for name, row in rows.items()}
        if departing := {name: row["departs"] for name, row in rows.items() if row["departs"]}:
            departs[stage] = departing
    recipes = {name: row["about"] for name, row in known["recipes"].items()}
    more = {"stage_settings": of_stages, "methods": does, "departures_from_papers": departs, "export_formats": FORMATS}
    return {"recipes": recipes, **stages, **more}


def _write_list(known: Mapping[str, Any]) -> None:
    """One line for each name."""
    from ...reports.tables import paragraph

    echo(o.table([{"recipe": name, "what it does": row["about"]} for name, row in known["recipes"].items()]))
    for stage, rows in known["methods"].items():
        lines = [{stage: name, "what it does": row["does"], "paper": row["paper"] or "–"} for name, row in rows.items()]
        echo(o.table(lines))
    echo(o.table([{"export format": name, "what it is": text} for name, text in FORMATS.items()]))
    echo(paragraph("`pipeline list METHOD` has a method's settings, `pipeline show RECIPE` those of a recipe.", o.width()))


def _write_method(row: Mapping[str, Any], place: int) -> None:
    from ...reports.tables import paragraph

    facts = [f"{row['method']} ({row['stage']}): {row['does']}"]
    facts += [f"paper: {row['paper']}"] if row["paper"] else []
    facts += [f"departs from it: {row['departs']}"] if row["departs"] else []
    facts += [f"{key.replace('_', ' ')}: {text}" for key, text in row["ways"].items()]
    echo("\n" * (place > 0) + "\n".join(paragraph(fact, o.width()) for fact in facts) + "\n")
    lines = [{"setting": s["name"], "default": _as_written(s["default"]), "range": s["range"]} for s in row["settings"]]
    echo(o.table(lines))
    echo("\n".join(paragraph(text, o.width()) for text in row["advice"]))


def _as_written(value: Any) -> str:
    """As a recipe has it."""
    return value if isinstance(value, str) else dumps(value)


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
    from ..recipes.catalog import packaged
    from ..recipes.settings import dump

    settings = packaged(recipe, model, profile) if config is None and not sets else None
    if settings is None:
        from ..recipes.recipe import resolve

        settings = resolve(recipe, file=config, sets=sets or [], options={"model": model, "profile": profile}).settings()
    if json:
        o.write_json(settings)
    else:
        echo(dump(settings).rstrip("\n"))


def doctor(json: o.Json = False, verbose: o.Verbose = False, quiet: o.Quiet = False) -> None:
    """What this machine offers, what was measured on it, what is missing and how to fix it."""
    start(verbose, quiet)
    from .. import doctor as examining

    o.write(examining.report(), json)


def bench(
    subject: Annotated[
        Literal["compress", "decompose", "allocate", "recover", "kernels", "generate", "commands", "scale"],
        typer.Argument(help="what to measure"),
    ],
    model: Annotated[
        str | None,
        typer.Option("-m", "--model", metavar="MODEL", help="whole stages of this model, not synthetic layers; generate, commands: a run"),
    ] = None,
    sizes: Annotated[list[int] | None, typer.Option("--size", metavar="N", min=64, help="width of a synthetic layer; repeatable")] = None,
    only: Annotated[list[str] | None, typer.Option("--method", metavar="NAME", help="this method (of scale: subject; of generate --shape: variant) only; repeatable")] = None,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", min=1, help="measurements of each row")] = 3,
    depths: Annotated[
        str | None, typer.Option("--depths", metavar="N,N,…", help="compress: time and peak memory of models with so many blocks")
    ] = None,
    shape: Annotated[
        str | None, typer.Option("--shape", metavar="NAME", help="compress, generate: a model of this shape, made on the spot: 135m, 1b, 8b, 70b")
    ] = None,
    blocks: Annotated[int | None, typer.Option("--blocks", metavar="N", min=1, help="so many blocks of that shape, not all")] = None,
    count: Annotated[
        bool,
        typer.Option("--count", help="compress: the operators of one block of that shape (else of 135m), counted and not timed; scale: collectives of a block"),
    ] = False,
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
    chosen = benchmarks.Options(device, widths, tuple(only or ()), repeats, model, output, deep, shape, full, blocks, count)
    measured = benchmarks.run(subject, chosen)
    o.write(measured, json)
    benchmarks.refuse_failed(measured)


def _numbers(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--depths {text}: expected numbers of blocks, as in 4,8,16,32")
    return tuple(int(part) for part in parts)
