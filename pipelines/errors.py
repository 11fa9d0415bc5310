"""Error classes by the exit code they end in (DESIGN: 2 usage, 3 bad input, 4 quality gate, 5 out of memory).

The message is one line: what is wrong, with the numbers, and what to do about it.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
"""How a place says that this user may not write there."""


class PipelineError(Exception):
    """Something the user can fix; shown as one line, without a traceback unless -v."""

    exit_code = 1


class UsageError(PipelineError):
    """A wrong option, key, method or combination."""

    exit_code = 2


class InputError(PipelineError):
    """A model, text, artifact or run directory that cannot be used."""

    exit_code = 3


class QualityError(PipelineError):
    """The result exists and is worse than the gate allows."""

    exit_code = 4


class OutOfMemoryError(PipelineError):
    """No memory or no disk space left; what was finished is kept."""

    exit_code = 5


@contextmanager
def as_input_error(what: str, advice: str = "") -> Iterator[None]:
    """Around another library's reader of a file: whatever it raises becomes `what (its first line); advice`. A shortage of memory, and an
    error of our own, stay what they are."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        if is_shortage(error):
            raise
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"{what} ({first}){advice and f'; {advice}'}") from error


_SHORTAGE_TEXTS = ("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory")
"""How torch says on a CPU, and CUDA in a library's words, that an allocation failed: a plain RuntimeError."""


def is_shortage(error: BaseException) -> bool:
    """Whether memory ran out: the system's, or a device's (torch is not imported for it)."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    names = {kind.__name__ for kind in type(error).__mro__}
    return "OutOfMemoryError" in names or (isinstance(error, RuntimeError) and any(text in str(error) for text in _SHORTAGE_TEXTS))
