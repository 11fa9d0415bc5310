"""The program's internal safetensors files (training states, hidden states, Fisher information, tables of errors), each with a
checksum in its header: what is torn or flipped is made again, never used.

Knows files and tensors; not what they mean. The shards of artifacts have their checksums in the manifest.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

import safetensors
from torch import Tensor, uint8

from .files import remembered, safetensors_metadata, write_pieces

FIELD = "sha256"
UNKNOWN = "0" * 64
CHUNK_BYTES = 1 << 22


def keep(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Whole or not at all."""
    entries: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": NAMES[str(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    keep_pieces(path, entries, map(data_of, tensors.values()), metadata)


def keep_pieces(path: Path, entries: Mapping[str, object], pieces: Iterable[memoryview], metadata: Mapping[str, str] | None = None) -> None:
    """The same for data that need not fit into memory at once: `entries` as in a safetensors header, `pieces` in their order."""
    header = json.dumps({"__metadata__": {FIELD: UNKNOWN, **(metadata or {})}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()

    def hashed() -> Iterator[bytes | memoryview]:
        for piece in chain((len(header).to_bytes(8, "little"), header), pieces):
            digest.update(piece)
            yield piece

    write_pieces(path, hashed(), lambda: (8 + header.index(UNKNOWN.encode()), digest.hexdigest().encode()))


def data_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(uint8).numpy().data


def is_whole(path: Path) -> bool:
    """Whether the file is there as it was written. One that has not changed since it was last verified is not read again."""
    if not path.is_file():
        return False
    try:
        recorded = safetensors_metadata(path)[FIELD]
    except (OSError, ValueError, KeyError):
        return False
    return remembered(path, "kept", lambda file: _digest(file, recorded.encode())) == recorded


def kept(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and metadata; None for a file that is not there or not whole."""
    if not is_whole(path):
        return None
    with safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _digest(path: Path, recorded: bytes) -> str:
    """Of the file as it was before its own checksum was put in."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = file.read(8)
        digest.update(size)
        digest.update(file.read(int.from_bytes(size, "little")).replace(recorded, UNKNOWN.encode(), 1))
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


NAMES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.int64": "I64",
    "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8", "torch.bool": "BOOL",
}  # fmt: skip
"""safetensors' names of torch's dtypes."""
