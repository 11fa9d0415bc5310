"""Faults at the operations that change files: the n-th of them ends the process, fails, or writes half of what it should.

Counted is what goes through Python's files and `os`; not what a library writes by itself (safetensors' own writer, in exports).
"""

import builtins
import ctypes
import errno
import io
import os
import signal
from collections.abc import Callable
from typing import Any

KINDS = ("kill", "short", "ENOSPC", "EIO")
CHANGES = ("replace", "rename", "link", "unlink", "mkdir", "rmdir", "fsync")
"""Functions of `os` that change files, or promise that they are on the disk."""


def unprivileged() -> None:
    """From now on the modes of files count for this process, as for an ordinary user, though it may be root's. OSError where it cannot be."""
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    overrides = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    if libc.capget(header, data) == 0:
        data[0] &= ~overrides
        data[1] &= ~overrides
        if libc.capset(header, data) == 0:
            return
    raise OSError(ctypes.get_errno(), "capabilities cannot be laid down")


class Faults:
    """The `step`-th operation on a path that contains `below` suffers a fault of this kind; None: operations are only counted."""

    def __init__(self, kind: str | None, step: int, below: str) -> None:
        self.kind, self.step, self.below = kind, step, below
        self.operations = 0
        self.open: dict[int, str] = {}

    def inject(self) -> None:
        for name in CHANGES:
            setattr(os, name, self._counted(getattr(os, name)))
        builtins.open = io.open = self._opened(open)

    def _strikes(self, target: Any) -> bool:
        path = self.open.get(target, "") if isinstance(target, int) else os.fsdecode(target)
        if self.below not in path:
            return False
        self.operations += 1
        if self.operations == self.step and self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return self.operations == self.step and self.kind is not None

    def _failure(self, target: Any) -> OSError:
        number = errno.EIO if self.kind == "EIO" else errno.ENOSPC
        return OSError(number, os.strerror(number), None if isinstance(target, int) else str(target))

    def _counted(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *arguments: Any, **options: Any) -> Any:
            if self._strikes(target):
                raise self._failure(target)
            return plain(target, *arguments, **options)

        return call

    def _opened(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            made: Any = plain(file, mode, *arguments, **options)
            if not isinstance(file, int):
                self.open[made.fileno()] = os.fsdecode(file)
                if set(mode) & set("wax+"):
                    self._watch(made, file)
            return made

        return call

    def _watch(self, made: Any, file: Any) -> None:
        plain = made.write

        def write(data: Any) -> int:
            if self._strikes(file):
                if self.kind == "short":
                    plain(data[: len(data) // 2])
                    made.flush()
                raise self._failure(file)
            return plain(data)

        made.write = write
