"""The command line: `pipeline` and `bitmend`, the commands, and how errors become one line and an exit code.

0 done, 1 unexpected, 2 usage or configuration, 3 bad input, 4 quality gate, 5 out of memory or disk, 130 interrupted.
Imports nothing heavy: torch and transformers come in with the command that needs them.
"""

import contextlib
import errno
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from . import logs
from .commands import about, finished, planned, runs
from .commands.streams import STDOUT, abandon, echo, flush, prepare_streams, settle_streams
from .errors import UNWRITABLE, PipelineError, UsageError, is_shortage
from .ranks import joining
from .ranks.exchange import LostRank
from .ranks.watchdog import Kind

# typer brings its own copy of click or uses the installed one; its public exception leads to the family's roots
_CLICK_USAGE = typer.BadParameter.__mro__[1]
_CLICK_ERROR = typer.BadParameter.__mro__[2]

INTERRUPTED = 130
ON_RANKS = ("run", "resume")
"""The commands whose work several processes share."""
LONGEST_LINE = 1200
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_NO_SPACE_TEXT = "No space left on device"
_NO_HOME = "Could not determine home directory."
"""What pathlib says."""
_CACHES = {".triton": "TRITON_CACHE_DIR", "huggingface": "HF_HOME", "matplotlib": "MPLCONFIGDIR"}
"""A directory in the path of a library's cache → the variable that moves it."""

app = typer.Typer(
    help="Compress a language model, recover its quality, run it on fused kernels; perplexity and bytes after every stage.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _command in (
    ("run", runs.run),
    ("plan", planned.plan),
    ("resume", runs.resume),
    ("status", runs.status),
    ("compare", finished.compare),
    ("eval", finished.eval_),
    ("export", finished.export),
    ("generate", finished.generate),
    ("sweep", runs.sweep),
    ("bench", about.bench),
    ("doctor", about.doctor),
    ("gc", runs.gc),
    ("list", about.list_),
    ("show", about.show),
):
    app.command(_name)(_command)
app.add_typer(finished.report, name="report")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="print the version, and the commit of a checkout"),
) -> None:
    if version:
        echo(about.version())
        raise typer.Exit
    if context.invoked_subcommand is None:
        echo(context.get_help())


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: stops like Ctrl-C, so that the run directory stays resumable."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(signal.Signals(number).name)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code. Every failure is one line on stderr (with -v the traceback as well)."""
    prepare_streams()
    try:
        return _run(arguments)
    finally:
        settle_streams()


def _run(arguments: list[str] | None) -> int:
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup has SIGHUP ignored
            signal.signal(number, _terminate)
    try:
        _join(sys.argv[1:] if arguments is None else arguments)
        result: object = app(args=arguments, prog_name="pipeline", standalone_mode=False)
        flush()
        if result != INTERRUPTED:
            joining.leave()
    except KeyboardInterrupt:
        result = INTERRUPTED
    except SystemExit as left:  # how typer answers a broken pipe
        if not isinstance(left.__context__, BrokenPipeError):
            raise
        return _reader_left()
    except BrokenPipeError:
        return _reader_left()
    except Exception as error:
        code, message = explain(error)
        if logs.is_verbose():
            traceback.print_exception(error)
        return _end("lost" if isinstance(error, LostRank) else "failed", code, f"error: {message}")
    if result == INTERRUPTED:  # typer turns KeyboardInterrupt into this code and says nothing
        return _end("interrupted", INTERRUPTED, "interrupted; what was finished is kept, the same command goes on from there")
    return result if isinstance(result, int) else 0


def _join(arguments: list[str]) -> None:
    """Where a launcher started several processes, take part: they must have been given the same arguments, and rank 0 alone writes output."""
    if joining.world() is None:
        return
    if not arguments or arguments[0] not in ON_RANKS:
        raise UsageError(
            f"pipeline {' '.join(arguments[:1])}: WORLD_SIZE is {os.environ['WORLD_SIZE']}, and only {' and '.join(ON_RANKS)} share their work "
            "among processes; start it once, without torchrun or srun"
        )
    mine = joining.join()
    if not mine.leads:
        abandon("stdout")
    import torch

    mine.alike(
        {"command line": " ".join(arguments), "bitmend": about.version(), "torch": torch.__version__, "Python": sys.version.split()[0]}
    )


def _end(kind: Kind, code: int, line: str) -> int:
    """Print how it ended. Of several ranks one prints it for all, and they exit at the same time; before they have joined, the first of each machine does."""
    if (watchdog := joining.watching()) is not None:
        with contextlib.suppress(KeyboardInterrupt):  # a second signal on the way out
            return watchdog.end(kind, code, line)
        return watchdog.end(kind, code, line)
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys() or "0" in (os.environ["RANK"], os.environ.get("LOCAL_RANK", "0")):
        _say(line)
    return code


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and one line for an error."""
    if isinstance(error, PipelineError):
        return error.exit_code, _one_line(str(error))
    if isinstance(error, _CLICK_ERROR):
        return 2, _usage_line(error)
    if isinstance(error, typer.Abort):
        return INTERRUPTED, "interrupted"
    if isinstance(error, OSError) and error.filename == STDOUT:
        return 5 if error.errno in _NO_SPACE else 3, f"{STDOUT}: {error.strerror}"
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        return 3, f"{_one_line(str(error))}: links that lead to themselves"
    if _has_no_space(error):
        return (
            5,
            "no disk space left; finished stages are kept: free some space (`pipeline gc RUN_DIR` helps) and run the same command again",
        )
    if is_shortage(error):
        detail = _one_line(str(error)).split(". ")[0]
        return (
            5,
            f"out of memory{f' ({detail})' if detail else ''}; try fewer calibration samples, a shorter seq_len or a smaller batch_size",
        )
    if isinstance(error, OSError) and error.strerror:
        return 3, f"{_one_line(str(error.filename or 'a file'))}: {error.strerror}{_other_cache(error)}"
    if isinstance(error, RuntimeError) and str(error) == _NO_HOME:
        return 2, "a path begins with ~, and there is no such home directory; write the path out, or set HOME"
    hint = "" if logs.is_verbose() else "; run again with -v for the traceback"
    return 1, f"unexpected {type(error).__name__}: {_one_line(str(error)) or 'no message'}{hint}"


def _other_cache(error: OSError) -> str:
    """The way out where another library's cache, in the home directory unless set, cannot be written."""
    parts = Path(str(error.filename or "")).parts
    variable = next((variable for part, variable in _CACHES.items() if part in parts), None)
    return f"; set {variable} to a directory of yours" if variable and error.errno in UNWRITABLE else ""


def _usage_line(error: Any) -> str:
    message = _one_line(error.format_message()).replace("Value error, ", "")
    context = getattr(error, "ctx", None)
    if context is None or "possible option" in message.lower() or "did you mean" in message.lower():
        return message
    return f"{message} (see `{context.command_path} --help`)"


def _has_no_space(error: BaseException) -> bool:
    return (isinstance(error, OSError) and error.errno in _NO_SPACE) or _NO_SPACE_TEXT in str(error)


def _one_line(text: str) -> str:
    """What a message quotes may have any length, a line has not."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE * 2 // 3]} … {line[-LONGEST_LINE // 4 :]}"


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # a stderr that takes nothing: the exit code is what is left to say
        print(typer.style(line, fg="red") if sys.stderr.isatty() else line, file=sys.stderr)


def _reader_left() -> int:
    """Whoever read stdout went away: no error, and the interpreter must not complain when it flushes at exit."""
    abandon("stdout")
    joining.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
