"""Writing files so that a killed process or a full disk leaves the old one or the new one, never half of it. Knows no artifact."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...kernels.cache import cache_directory
from ..errors import InputError, OutOfMemoryError

log = logging.getLogger("bitmend")

SCRATCH = "bitmend-scratch-"
"""Begins the name of a directory among the temporary files; its process's number follows."""
PARTIAL = ".partial"
"""Ends the name of a directory that is not finished."""

CHECKSUM = "checksum"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity(path: Path) -> str:
    """Of a file whose contents have not changed: path, size, times of change of contents and of status, inode."""
    stat = path.stat()
    return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"


def cached_sha256(path: Path) -> str:
    """As it was when this very file was last hashed: same path, size, inode, times of change of contents and of status; else hashed now.
    Where the cache cannot be read or written it is hashed every time."""
    return remembered(path, "sha256", sha256)


def remembered(path: Path, what: str, find: Callable[[Path], str]) -> str:
    """The remembered result of `find` for this very file, else computed now and noted in the cache under `what`."""
    note = cache_directory() / what / hashlib.sha256(identity(path).encode()).hexdigest()
    with contextlib.suppress(OSError):
        return note.read_text()
    result = find(path)
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(note, result.encode())
    return result


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, read from its header. ValueError where it has none or is torn."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size)) if size < path.stat().st_size else None
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        raise ValueError(f"{path}: has no safetensors header with metadata")
    return header["__metadata__"]


def write_bytes(path: Path, data: bytes) -> None:
    """Whole or not at all: scratch name, fsync, rename."""
    write_pieces(path, (data,))


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview], patch: Callable[[], tuple[int, bytes]] | None = None) -> None:
    """The same for what need not fit into memory at once; `patch`, called when all is written, gives an offset and what belongs there."""
    with disk_errors(path):
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with scratch.open("wb") as file:
                for piece in pieces:
                    file.write(piece)
                if patch is not None:
                    offset, data = patch()
                    file.seek(offset)
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        except OSError:
            scratch.unlink(missing_ok=True)  # a full disk gets its space back
            raise


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """One of the program's own files, with a checksum of what it says."""
    plain = json.loads(json.dumps(value))  # as it will be read: keys are strings
    write_bytes(path, (json.dumps({**plain, CHECKSUM: _checksum(plain)}, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path, way_out: str = "") -> dict[str, Any]:
    """What `write_json` wrote, or another program's JSON object. InputError, which ends in the way out, for what is missing or unreadable, is no
    JSON object, or is not what was written."""
    end = f"; {way_out}" if way_out else ""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing{end}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}){end}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}, not a JSON object{end}")
    if CHECKSUM in content and content.pop(CHECKSUM) != _checksum(content):
        raise InputError(f"{path}: has changed since it was written (its checksum is another){end}")
    return content


def _checksum(content: Mapping[str, object]) -> str:
    return checksum(json.dumps(content, sort_keys=True))


def checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """An empty directory among the temporary files, gone at the end; those whose processes were killed go first."""
    place = Path(tempfile.gettempdir())
    for result in place.glob(f"{SCRATCH}*"):
        number = result.name.removeprefix(SCRATCH).partition("-")[0]
        if result.is_dir() and not result.is_symlink() and _abandoned(result, number):
            shutil.rmtree(result, ignore_errors=True)
            log.info("%s: removed; a process that was killed left it", result)
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}-") as made, _locked(Path(made)):
        yield Path(made)


def write_fresh(path: Path, text: str) -> None:
    """As `write_bytes`, while another process may write the same file; what killed ones left of it is removed first."""
    for result in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
        number = result.name[len(path.name) + 2 : -len(PARTIAL)]
        if result.is_file() and not result.is_symlink() and _abandoned(result, number):
            result.unlink(missing_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with disk_errors(path), scratch.open("w", encoding="utf-8") as file, _locked(scratch):
            file.write(text)
            file.flush()
            scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # without locks, a process's number alone says whether it lives
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _abandoned(path: Path, number: str) -> bool:
    """Whether its process is not there and nobody holds its lock: the number may be that of another machine's or container's process."""
    if not re.fullmatch(r"[1-9][0-9]{0,8}", number) or lives(int(number)):
        return False
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    target.unlink(missing_ok=True)
    with disk_errors(target):
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                raise
            shutil.copyfile(source, target)


def sync(path: Path) -> None:
    """What a file or a directory holds is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class disk_errors:
    """Turns 'no space left' into an OutOfMemoryError that names the place; what was finished stays. Other failures of the disk, which a write
    or a sync reports without a name, get the place's."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfMemoryError(
                f"{self.path}: no disk space left; free some and run the same command again, finished parts are kept"
            ) from error
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            raise OutOfMemoryError(
                f"{self.path}: larger than files may be here (ulimit -f); raise the limit and run the same command again, finished parts are kept"
            ) from error
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(self.path)
