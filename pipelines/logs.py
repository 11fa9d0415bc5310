"""Log lines and progress bars on stderr. Machine-readable output never passes through here.

On a terminal rich draws; elsewhere every line is plain text and a bar becomes a line now and then. Knows no stage.
"""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

ROOT = "bitmend"
LINE_SECONDS = 15.0
"""Between two plain lines of one bar."""

Item = TypeVar("Item")
_settings = {"level": logging.INFO}


class Bar(Protocol):
    """`advance` by some steps and show the fields (loss, tokens/s, …) next to them."""

    def advance(self, steps: int = 1, **fields: object) -> None: ...


def setup(verbose: bool = False, quiet: bool = False, silent: bool = False) -> None:
    """Log lines of this program to stderr: -q errors only, -v everything; other libraries speak only with -v. `silent`: nothing, another process
    of the same run speaks."""
    verbose, quiet = verbose and not silent, quiet or silent
    level = logging.CRITICAL + 1 if silent else logging.DEBUG if verbose else logging.ERROR if quiet else logging.INFO
    _settings["level"] = level
    logger = logging.getLogger(ROOT)
    logger.setLevel(logging.DEBUG)  # handlers choose; a run's own log file wants everything
    for handler in [handler for handler in logger.handlers if getattr(handler, "terminal", False)]:
        logger.removeHandler(handler)
    handler = _handler(verbose)
    handler.setLevel(level)
    handler.terminal = True  # type: ignore[attr-defined]
    logger.addHandler(handler)
    if not verbose:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        for name in ("transformers", "datasets", "huggingface_hub", "accelerate", "bitsandbytes", "torch", "matplotlib"):
            logging.getLogger(name).setLevel(logging.ERROR)
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def is_verbose() -> bool:
    return _settings["level"] <= logging.DEBUG


def is_quiet() -> bool:
    return _settings["level"] >= logging.ERROR


def _handler(verbose: bool) -> logging.Handler:
    if not sys.stderr.isatty():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        return handler
    from rich.console import Console
    from rich.logging import RichHandler

    return RichHandler(
        console=Console(stderr=True), show_path=verbose, show_level=verbose, log_time_format="%H:%M:%S", omit_repeated_times=False
    )


@contextmanager
def bar(description: str, total: int | None = None) -> Iterator[Bar]:
    """A progress bar; on a stderr that is no terminal a plain line at most every `LINE_SECONDS`, and nothing with -q."""
    if is_quiet():
        yield _Silent()
    elif sys.stderr.isatty():
        with _rich_progress() as progress:
            yield _Drawn(progress, progress.add_task(description, total=total, fields=""))
    else:
        plain = _Lines(description, total)
        yield plain
        plain.finish()


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a progress bar."""
    length = total if total is not None else len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
    with bar(description, length) as shown:
        for item in items:
            yield item
            shown.advance()


def _rich_progress() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[fields]}"))
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True)


class _Silent:
    def advance(self, steps: int = 1, **fields: object) -> None:
        """Nothing to show."""


class _Drawn:
    def __init__(self, progress: "Progress", task: "TaskID") -> None:
        self.progress, self.task = progress, task

    def advance(self, steps: int = 1, **fields: object) -> None:
        self.progress.update(self.task, advance=steps, fields=_fields(fields))


class _Lines:
    def __init__(self, description: str, total: int | None) -> None:
        self.description, self.total, self.done, self.fields = description, total, 0, ""
        self.begun = self.spoke = time.monotonic()

    def advance(self, steps: int = 1, **fields: object) -> None:
        self.done += steps
        self.fields = _fields(fields)
        if (now := time.monotonic()) - self.spoke >= LINE_SECONDS:
            self.spoke = now
            self._say(f"about {self._left(now):.0f} s left" if self.total and self.done else "")

    def finish(self) -> None:
        self._say(f"in {time.monotonic() - self.begun:.1f} s")

    def _left(self, now: float) -> float:
        return (now - self.begun) / self.done * max((self.total or 0) - self.done, 0)

    def _say(self, ending: str) -> None:
        of = f"/{self.total}" if self.total is not None else ""
        parts = [f"{self.description}: {self.done}{of}", self.fields, ending]
        logging.getLogger(ROOT).info(", ".join(part for part in parts if part))


def _fields(fields: dict[str, object]) -> str:
    return "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in fields.items())
