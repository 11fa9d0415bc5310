"""What may go wrong, by the exit code it ends in (DESIGN: 2 usage, 3 bad input, 4 quality gate, 5 out of memory).

The message is one line: what is wrong, with the numbers, and what to do about it.
"""


class PipelineError(Exception):
    """Something the user can mend; shown as one line, without a traceback unless -v."""

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
