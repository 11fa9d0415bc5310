"""Commands that read finished work: report show/export, compare, eval, export, generate."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import UsageError
from . import common as o
from .runs import existing, start
from .streams import echo, flush

RUN_FILES = ("run.json", "record.json", "environment.json", "recipe.resolved.yaml", "log.jsonl", ".lock")

report = typer.Typer(help="The stage table of a run, and its page.", no_args_is_help=False)

RunDirectories = Annotated[list[Path], typer.Argument(metavar="RUN_DIR RUN_DIR …", help="two or more run directories")]
ReportFormat = Annotated[Literal["html", "md", "csv", "json"], typer.Option("--format", help="what to write")]
CompareFormat = Annotated[Literal["table", "html", "md", "json"], typer.Option("--format", help="what to write")]
ExportFormat = Annotated[
    Literal["dense", "gptq", "gptq-v2", "compressed-tensors", "bnb", "gguf"], typer.Option("--format", help="checkpoint format")
]
OutputFile = Annotated[Path | None, typer.Option("-o", "--output", parser=o.place, metavar="FILE", help="instead of stdout")]
OutputDirectory = Annotated[
    Path, typer.Option("-o", "--output", parser=o.place, metavar="DIR", help="a new or empty directory; FILE.gguf for gguf")
]
Evaluated = Annotated[str, typer.Argument(metavar="MODEL_OR_ARTIFACT", help="demo, a model, a run's stage directory or an export")]
SeqLen = Annotated[int | None, typer.Option("--seq-len", metavar="N", min=2, help="tokens a window")]
Windows = Annotated[int | None, typer.Option("--windows", metavar="N", min=1, help="how many windows; default all (16 for demo)")]
Tasks = Annotated[
    str | None, typer.Option("--tasks", metavar="A,B", help="scores instead: lm-eval's tasks, or .jsonl files of multiple choice")
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="with --tasks: the first N documents of each")]
StageName = Annotated[str | None, typer.Option("--stage", metavar="NAME", help="this stage's artifact; default the last one")]
Merge = Annotated[bool, typer.Option("--merge", help="merge the low-rank term into the base where that is exact; dense does so by itself")]
Engine = Annotated[
    Literal["kernels", "llama.cpp"], typer.Option("--engine", help="what computes: our kernels, or llama.cpp (an extra) from a GGUF file")
]
Requantize = Annotated[bool, typer.Option("--requantize", help="with --merge: quantize the merged weight again, the loss is reported")]


Adapter = Annotated[bool, typer.Option("--adapter", help="base and adapter apart, in DIR/base and DIR/adapter, as PEFT reads them")]
CountOnly = Annotated[bool, typer.Option("--dry-run", help="count bytes, name refusals and who reads it, write nothing")]


@report.command("show")
def show(run_directory: o.RunDirectory, json: o.Json = False, verbose: o.Verbose = False, quiet: o.Quiet = False) -> None:
    """The stage table in the terminal."""
    start(verbose, quiet)
    existing(run_directory)
    from ..run import ledger

    o.show_record(ledger.record(run_directory), json)


@report.command("export")
def export_report(
    run_directory: o.RunDirectory,
    format_: ReportFormat,
    output: OutputFile = None,
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
) -> None:
    """The report as one self-contained page, Markdown, CSV or JSON."""
    start(verbose, quiet)
    existing(run_directory)
    from ...reports.render import render
    from ..run import ledger

    _deliver(render(ledger.record(run_directory), format_), output, format_)


def compare(
    run_directories: RunDirectories,
    format_: CompareFormat = "table",
    json: o.Json = False,
    output: OutputFile = None,
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
) -> None:
    """Several runs side by side: perplexity against total bytes, what each stage did."""
    start(verbose, quiet)
    if len(run_directories) < 2:
        raise UsageError("compare needs at least two run directories; `pipeline report show RUN_DIR` shows one")
    for directory in run_directories:
        existing(directory)
    from ...reports.render import compare as compared
    from ..run import ledger

    records = [ledger.record(directory) for directory in run_directories]
    _deliver(compared(records, "json" if json else format_, width=None if output else o.width()), output, "json" if json else format_)


def eval_(
    model: Evaluated,
    eval_source: o.EvalSource = None,
    seq_len: SeqLen = None,
    windows: Windows = None,
    tasks: Tasks = None,
    limit: Limit = None,
    device: o.Device = "auto",
    dtype: o.Dtype = None,
    json: o.Json = False,
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
) -> None:
    """Perplexity of a model or of a stage's artifact, with its protocol; inside a run the run's protocol is the default. With --tasks its scores."""
    start(verbose, quiet)
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        if not names:
            raise UsageError("--tasks names no task; give some, as in --tasks hellaswag,arc_easy")
        if eval_source is not None or seq_len is not None or windows is not None:
            raise UsageError(
                "--eval, --seq-len and --windows belong to perplexity, which --tasks does not measure; leave them or --tasks out"
            )
        from ..run.evaluate import evaluate_tasks

        o.write(evaluate_tasks(model, names, limit=limit, device=device, dtype=dtype), json)
        return
    if limit is not None:
        raise UsageError("--limit goes with --tasks: it is a number of their documents")
    source, default_seq_len, default_windows = _protocol(model)
    from ..run.evaluate import evaluate

    measured = evaluate(
        model,
        eval_source=eval_source or source,
        seq_len=seq_len or default_seq_len,
        windows=windows or default_windows,
        device=device,
        dtype=dtype,
    )
    o.write(measured, json)


def export(
    run_directory: o.RunDirectory,
    format_: ExportFormat,
    output: OutputDirectory,
    stage: StageName = None,
    merge: Merge = False,
    requantize: Requantize = False,
    adapter: Adapter = False,
    dry_run: CountOnly = False,
    json: o.Json = False,
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
) -> None:
    """Write a checkpoint that other programs load: one model, or with --adapter a base and a PEFT adapter for it."""
    start(verbose, quiet)
    existing(run_directory)
    if requantize and not merge:
        raise UsageError("--requantize goes with --merge: it quantizes what was merged")
    if adapter and merge:
        raise UsageError("--adapter and --merge exclude each other: one keeps the low-rank term apart, the other merges it")
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file; -o takes a new name, nothing is overwritten")
    if (output.suffix == ".gguf") and format_ != "gguf":
        raise UsageError(f"{output}: --format {format_} writes a directory; -o takes one, or use --format gguf")
    if output.is_dir() and next(output.iterdir(), None) is not None:
        raise UsageError(f"{output} is not empty; name a new directory, nothing is overwritten")
    from ..export import exporting

    how = {"stage": stage, "merge": merge, "requantize": requantize, "adapter": adapter}
    o.write(exporting.predict(run_directory, format_, **how) if dry_run else exporting.export(run_directory, format_, output, **how), json)


def generate(
    run_directory: o.RunDirectory,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="the text to go on from; - reads stdin")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", min=1, help="how many tokens at most")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", metavar="T", min=0.0, help="0 takes the likeliest token")] = 0.0,
    seed: o.Seed = None,
    device: o.Device = "auto",
    engine: Engine = "kernels",
    json: o.Json = False,
    verbose: o.Verbose = False,
    quiet: o.Quiet = False,
) -> None:
    """Let the compressed model write, through the kernels or in llama.cpp."""
    start(verbose, quiet)
    existing(run_directory)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise UsageError("the prompt is empty; give some text to go on from")
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed or 0}
    if engine == "llama.cpp":
        if device not in ("auto", "cpu"):
            raise UsageError(f"--engine llama.cpp runs on the CPU here; leave --device {device} out")
        from ..export import llama_engine

        pieces = llama_engine.generate(run_directory, text, **settings)
    else:
        from ..run import generate as generating

        pieces = generating.generate(run_directory, text, **settings, device=device)
    if json:
        o.write_json({"prompt": text, "text": "".join(pieces)})
        return
    for piece in pieces:
        echo(piece, end="")
        flush()
    echo("")


def _deliver(text: str, output: Path | None, format_: str) -> None:
    """To stdout, or to a file that appears whole."""
    if output is None:
        (o.echo_json if format_ == "json" else echo)(text.rstrip("\n"))
        return
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent}: no such directory; make it first")
    from ..store.files import write_fresh

    _refuse_to_overwrite(output)
    write_fresh(output, text if text.endswith("\n") else f"{text}\n")
    echo(str(output))


def _refuse_to_overwrite(output: Path) -> None:
    """UsageError for a file of a run, a place among its stages, and an existing file that is no report or comparison."""
    from ..store.rundir import holding_run

    place = output.resolve()
    run = holding_run(place.parent)
    if run is not None and (run.path != place.parent or place.name in RUN_FILES):
        raise UsageError(f"{output}: belongs to the run in {run.path}; name another file, none of a run is overwritten")
    if output.exists():
        report = output.is_file() and output.suffix in (".html", ".md", ".csv", ".json", ".txt")
        if not report or "perplexity" not in output.read_text(encoding="utf-8", errors="replace"):
            raise UsageError(f"{output}: exists and is no report; name another file, only a report is overwritten")


def _protocol(model: str) -> tuple[str, int, int | None]:
    """Source, window length and number of windows to measure with unless given: those of the run that holds the artifact,
    else the profile that this model would be given."""
    from ..recipes.layers import PROFILES
    from ..recipes.recipe import resolve
    from ..store.rundir import run_of

    if (run := run_of(Path(model))) is not None:
        recipe = resolve(run.checked_recipe())
        return recipe.data.evaluation, recipe.evaluation.seq_len, recipe.evaluation.windows
    evaluation = PROFILES["demo" if model == "demo" else "standard"]["evaluation"]
    return "demo", evaluation["seq_len"], evaluation["windows"]
