"""safetensors directories: read lazily with every shape known beforehand, written in shards of a bounded size.

Knows files and tensors; not what a tensor means. Pickle files are never opened.
"""

import errno
import fcntl
import glob
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError, OutOfMemoryError, UsageError
from ..store.files import PARTIAL, lives, read_json, sync

log = logging.getLogger("bitmend")

SHARD_BYTES = 5_000_000_000
COUNTED = 0
"""As the size of a shard: every tensor is made and counted, none is written."""
ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOATING = ("F64", "F32", "F16", "BF16")
INDEX = "model.safetensors.index.json"
COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """One tensor on disk: where it lies, its shape and its safetensors dtype name (F16, I32, …)."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * ELEMENT_BYTES[self.dtype]

    def load(self) -> Tensor:
        """InputError, with tensor and file, when it cannot be read."""
        try:
            with safe_open(self.file, framework="pt") as handle:
                return handle.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.file}: tensor {self.name} cannot be read ({error}); fetch the file again") from error


def open_directory(directory: Path) -> dict[str, Stored]:
    """name → Stored of every tensor, from headers alone. InputError for pickle files, missing shards and truncated files."""
    out: dict[str, Stored] = {}
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (not a mapping)
                    piece = handle.get_slice(name)
                    if name in out:
                        raise InputError(
                            f"tensor {name} is in {out[name].file.name} and in {file.name} of {directory}; remove the file that is left over"
                        )
                    out[name] = Stored(file, name, tuple(piece.get_shape()), piece.get_dtype())
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is no whole safetensors file ({error}); fetch or write it again") from error
    if not out:
        raise InputError(f"{directory} holds no tensors")
    _check_index(directory, out)
    return out


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, those the index names when there is one."""
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory")
    index = directory / INDEX
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        for name in names:
            if Path(name).name != name:
                raise InputError(
                    f"{index} names {name!r}, which is no plain file name; only files in the index's directory are read: repair it"
                )
            if not (directory / name).is_file():
                raise InputError(f"{index} names {name}, which is not in {directory}; fetch the missing shard")
        return [_inside(directory / name) for name in names]
    if (directory / "model.safetensors").is_file():
        return [_inside(directory / "model.safetensors")]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in directory.glob(pattern))
        also = f"; {pickles[0]} is a pickle file, which is never opened: convert it to safetensors" if pickles else ""
        raise InputError(f"{directory}: no .safetensors file{also}")
    return [_inside(file) for file in files]


def _inside(file: Path) -> Path:
    """The file, unless it is a link that leads out of its directory. The Hub's cache is one whose snapshots link to its blobs."""
    home, target = file.parent.resolve(), file.resolve()
    if not target.is_relative_to(home) and not (home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"):
        raise InputError(f"{file}: a link to {target}, out of its directory; copy the file to its place")
    if not os.access(file, os.R_OK):  # safetensors would say that there is no such file
        raise InputError(f"{file}: permission denied; make it readable")
    return file


def write_json(file: Path, content: Mapping[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_shards(directory: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> int:
    """Total bytes. `model.safetensors`, or shards of at most `shard_bytes` (one tensor may be larger) with their index; of `COUNTED` ones an
    index alone, which says how many bytes they are.

    Holds one shard in memory. UsageError when a name comes twice.
    """
    pending: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    pending_bytes, total = 0, 0
    seen: set[str] = set()

    def flush() -> None:
        save(directory / f"part-{len(shards):05d}.safetensors", pending)
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if name in seen:
            raise UsageError(f"tensor {name} would be written twice")
        seen.add(name)
        size = tensor.numel() * tensor.element_size()
        if shard_bytes == COUNTED:
            total += size
            continue
        if pending and pending_bytes + size > shard_bytes:
            flush()
            pending_bytes = 0
        pending[name] = tensor.detach().cpu().contiguous()
        pending_bytes, total = pending_bytes + size, total + size
    if shard_bytes == COUNTED:
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": {}})
        return total
    flush()
    _name_shards(directory, shards, total)
    return total


def counted_bytes(directory: Path) -> int:
    """Of what was written there with `COUNTED`, and of the small files that were written whole."""
    return sum(read_json(file)["metadata"]["total_size"] for file in directory.rglob(INDEX)) + sum(
        file.stat().st_size for file in directory.rglob("*.safetensors")
    )


def save(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file; tensors that share memory are copied. OutOfMemoryError when the disk is full."""
    separate: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if pointer in storages else tensor
        storages.add(pointer)
    try:
        file.touch()
        mode = file.stat().st_mode  # what the umask leaves; safetensors writes a file that only its owner may read
        save_file(separate, file, metadata={"format": "pt"})
        file.chmod(mode)
        sync(file)
    except (SafetensorError, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise OutOfMemoryError(
                f"no disk space left for {file.name}: {_gigabytes(tensors):.2f} GB; free some or choose another -o"
            ) from error
        raise


@contextmanager
def fresh_directory(directory: Path) -> Iterator[Path]:
    """A directory in a scratch place that becomes `directory` when the block ends well; nothing is left otherwise, and what a killed process left
    of the same is removed first.

    UsageError when `directory` exists and is not empty: exports never overwrite.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory} exists and is not empty; choose another directory or remove it first")
    directory.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(directory)
    with _claimed(directory.with_name(f".{directory.name}.{os.getpid()}{PARTIAL}")) as made:
        yield made
        for file in made.rglob("*"):
            if file.suffix != ".safetensors":  # these were synced as they were written
                sync(file)
        sync(made)
        if directory.exists():
            directory.rmdir()
        made.rename(directory)
        sync(directory.parent)


@contextmanager
def fresh_file(file: Path) -> Iterator[Path]:
    """A place in a scratch directory for `file`, which goes to its own place when the block ends well, with whatever was written next to it.

    UsageError when one of them exists: exports never overwrite.
    """
    if file.exists():
        raise UsageError(f"{file} exists; choose another name or remove it first")
    file.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(file)
    with _claimed(file.with_name(f".{file.name}.{os.getpid()}{PARTIAL}")) as made:
        yield made / file.name
        written = sorted(made.iterdir(), key=lambda path: path.name == file.name)
        for path in written[:-1]:
            if (file.parent / path.name).exists():
                raise UsageError(f"{file.parent / path.name} exists, and {file.name} needs it; choose another name or remove it first")
        for path in written:  # the file itself last
            sync(path)
            path.rename(file.parent / path.name)
        sync(file.parent)


LOCK, MADE = ".lock", "output"
"""In a scratch place: the file that its process locks and writes its claim into, and what becomes the output."""


@contextmanager
def _claimed(scratch: Path) -> Iterator[Path]:
    """An empty directory in a scratch place of this process, which is removed at the end. UsageError where the place is taken."""
    try:
        scratch.mkdir()
    except FileExistsError as error:
        raise UsageError(f"{scratch}: is there already, of a process that still writes or was killed; wait for it or remove it") from error
    try:
        with (scratch / LOCK).open("w") as lock:
            with suppress(OSError):  # where a file system has no locks, nothing proves that a process is gone
                fcntl.flock(lock, fcntl.LOCK_EX)
            lock.write(_claim(os.getpid()))
            lock.flush()
            (scratch / MADE).mkdir()
            yield scratch / MADE
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _claim(process: int) -> str:
    return f"bitmend export, process {process}\n"


def _remove_abandoned(directory: Path) -> None:
    """Scratch places of this output that a process of this program claimed and holds no more, and empty ones whose process is not there."""
    for scratch in directory.parent.glob(f".{glob.escape(directory.name)}.*{PARTIAL}"):
        number = scratch.name[len(directory.name) + 2 : -len(PARTIAL)]
        if re.fullmatch(r"[1-9][0-9]{0,8}", number) and scratch.is_dir() and not scratch.is_symlink():
            with suppress(OSError):
                _remove_if_abandoned(scratch, int(number))


def _remove_if_abandoned(scratch: Path, process: int) -> None:
    names = {path.name for path in scratch.iterdir()}
    if not names <= {LOCK, MADE}:
        return
    if not names and not lives(process):
        scratch.rmdir()
    else:
        with (scratch / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            claim = lock.read()
            if claim != _claim(process) and (claim or MADE in names or lives(process)):
                return
            shutil.rmtree(scratch)
    log.info("%s: removed; an export that was killed left it", scratch)


def copy_files(source: Path | None, directory: Path) -> None:
    """Tokenizer and generation config, whatever of them there is."""
    for name in COPIED if source is not None else ():
        file = Path(source or "") / name
        if file.is_file():
            shutil.copyfile(file, directory / name)


def _name_shards(directory: Path, shards: list[list[str]], total: int) -> None:
    if len(shards) == 1:
        (directory / "part-00000.safetensors").rename(directory / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        (directory / f"part-{i:05d}.safetensors").rename(directory / name)
    weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor → file name. InputError when the index is not made so."""
    result = read_json(index).get("weight_map")
    if not isinstance(result, dict) or not result or not all(isinstance(file, str) for file in result.values()):
        raise InputError(f"{index} has no weight_map from tensor to file; fetch the index again")
    return result


def _check_index(directory: Path, tensors: Mapping[str, Stored]) -> None:
    index = directory / INDEX
    if not index.is_file():
        return
    for name, file in _weight_map(index).items():
        if name not in tensors or tensors[name].file.name != file:
            raise InputError(f"{index} says tensor {name} is in {file}; it is not there")


def _gigabytes(tensors: Mapping[str, Tensor]) -> float:
    return sum(t.numel() * t.element_size() for t in tensors.values()) / 1e9
