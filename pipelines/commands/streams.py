"""Standard streams of a command: replaced where they were closed, and set to encode every character. Knows no command."""

import codecs
import contextlib
import os
import sys
import unicodedata
from collections.abc import Iterator

_PLAIN = {
    "×": "x",
    "·": ".",
    "…": "...",
    "–": "-",
    "—": "-",
    "−": "-",
    "Δ": "delta",
    "±": "+-",
    "→": "->",
    "∈": "in",
    "‖": "|",
    "≥": ">=",
    "≤": "<=",
}
_BOX_DRAWING = range(0x2500, 0x2580)
HANDLER = "bitmend-plain"
STDOUT = "stdout"


def plain(error: UnicodeError) -> tuple[str, int]:
    """What stands for the characters that a stream's encoding lacks: the nearest in ASCII, else their escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_nearest, error.object[error.start : error.end])), error.end


def _nearest(character: str) -> str:
    if character in _PLAIN:
        return _PLAIN[character]
    if ord(character) in _BOX_DRAWING:
        return "-" if "HORIZONTAL" in (name := unicodedata.name(character)) and "VERTICAL" not in name and "DOWN" not in name else "|"
    ascii_only = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return ascii_only or character.encode("ascii", "backslashreplace").decode()


def prepare_streams() -> None:
    """A closed stream becomes the null device, so that no file that is opened later takes its place; none fails over a character."""
    codecs.register_error(HANDLER, plain)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors=HANDLER)


def echo(text: str, end: str = "\n") -> None:
    """A line of results. (typer's own writes UTF-8 into a stream whose encoding is ASCII.) OSError names STDOUT where it takes no more."""
    with _named_stdout():
        print(text, end=end)


def flush() -> None:
    with _named_stdout():
        sys.stdout.flush()


@contextlib.contextmanager
def _named_stdout() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, STDOUT) from error


def takes(text: str) -> bool:
    """Whether stdout has every character of it."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def abandon(name: str) -> None:
    """Nothing more is written to a stream that failed, and the interpreter must not complain when it flushes at exit."""
    setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def settle_streams() -> None:
    """Flushed, or abandoned where that fails: the failure has been reported already."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError:
            abandon(name)
