"""Changes of a small valid directory, as JSON: what the fuzzers draw, and what the corpus keeps.

["json", file, path, value], ["drop", file, path]: in a JSON file, or, by the name of a safetensors file, in its header;
["tensor", file, name, how, value]: its shape, dtype, values or name; ["byte", file, place, xor], ["word", file, place, value] (eight bytes), ["cut", file, place]: places are shares of the file.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load, save

Files = dict[str, bytes]
Change = list[Any]
HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 5, 7, 8, 16, 31, 32, 63, 64, 65, 128, 256, 1.5, -0.0, 1e300, float("nan"), float("inf"), 2**31, 2**40, 2**62,
    2**63, 2**70, 10**400, "", "x", "nan", "4", "../x", "\x00", "\ud800", "x" * 5000, [], [[]], [1], ["x"], [64, 64], [-1, 5], [2**62, 2**62], {}, {"a": 1},
    {"": {}}, [None], [[1, 2], [3]], "F16", "I32", "U8", "F8_E4M3", "F4", "gptq", "bitsandbytes", "compressed-tensors", "llama", "mixtral", "mamba",
)  # fmt: skip
DTYPES = ("float16", "float32", "float64", "bfloat16", "int8", "uint8", "int32", "int64", "bool", "float8_e4m3fn", "complex64")


def files_of(directory: Path) -> Files:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def write_files(directory: Path, files: Files) -> Path:
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    return directory


def drawn(files: Files, until: float = 1.0) -> st.SearchStrategy[list[Change]]:
    """One to three changes of these files, those of single bytes in the first share `until`."""
    value = st.sampled_from(HOSTILE) | st.integers() | st.text(max_size=8) | st.lists(st.integers(-2, 300), max_size=4)
    kinds: list[st.SearchStrategy[Any]] = []
    for name in files:
        share, byte, word = (
            st.floats(0, until, exclude_max=True),
            st.integers(1, 255),
            st.sampled_from([0, 1, 2**31, 2**40, 2**63, 2**64 - 1]),
        )
        kinds += [st.tuples(st.just("byte"), st.just(name), share, byte), st.tuples(st.just("word"), st.just(name), share, word)]
        kinds += [st.tuples(st.just("cut"), st.just(name), share)]
        if (document := _document(name, files[name])) is not None:
            paths = [p for p in _paths(document) if p]
            at, new = st.sampled_from(paths), st.text(min_size=1, max_size=6)
            kinds += 3 * [st.tuples(st.just("json"), st.just(name), at, value), st.tuples(st.just("drop"), st.just(name), at)]
            kinds += [st.tuples(st.just("json"), st.just(name), st.tuples(at, new).map(lambda p: [*p[0][:-1], p[1]]), value)]
        if name.endswith(".safetensors"):
            tensor = st.sampled_from(sorted(load(files[name])))
            how = st.tuples(st.just("dtype"), st.sampled_from(DTYPES)) | st.tuples(
                st.just("shape"), st.lists(st.integers(0, 9), max_size=4)
            )
            how |= st.tuples(st.just("fill"), st.sampled_from([-1.0, 0.0, 1e30, 255.0, float("nan")])) | st.tuples(
                st.just("name"), st.text(max_size=5)
            )
            how |= st.tuples(st.just("rows"), st.sampled_from([-1, 1, 32])) | st.tuples(st.just("columns"), st.sampled_from([-1, 1, 32]))
            kinds += 4 * [st.tuples(st.just("tensor"), st.just(name), tensor, how).map(lambda c: [*c[:3], *c[3]])]
    return st.lists(st.one_of(kinds).map(list), min_size=1, max_size=3)


def changed(files: Files, changes: list[Change]) -> Files:
    """The files after the changes, in turn; one that finds nothing to change, because of an earlier one, changes nothing."""
    out = dict(files)
    for kind, name, *rest in changes:
        data = out[name]
        if kind == "byte" and data:
            place = int(rest[0] * len(data))
            out[name] = data[:place] + bytes([data[place] ^ rest[1]]) + data[place + 1 :]
        elif kind == "word":
            place = int(rest[0] * len(data))
            out[name] = data[:place] + rest[1].to_bytes(8, "little") + data[place + 8 :]
        elif kind == "cut":
            out[name] = data[: int(rest[0] * len(data))]
        elif kind in ("json", "drop") and (document := _document(name, data)) is not None:
            out[name] = _joined(name, data, _set(document, list(rest[0]), kind == "drop", rest[-1]))
        elif kind == "tensor":
            try:
                tensors = load(data)
            except Exception:
                continue
            if rest[0] in tensors:
                out[name] = save(_tensor(tensors, *rest), {"format": "pt"})
    return out


def _tensor(tensors: dict[str, torch.Tensor], name: str, how: str, value: Any) -> dict[str, torch.Tensor]:
    tensor = tensors.pop(name)
    if how == "name":
        return {**tensors, value: tensor}
    if how == "dtype":
        tensor = tensor.to(getattr(torch, value))
    elif how == "shape":
        tensor = torch.zeros(value, dtype=tensor.dtype)
    elif how == "fill":
        tensor = torch.full(tensor.shape, value).to(tensor.dtype)
    elif tensor.dim() > 0:
        along = 0 if how == "rows" else tensor.dim() - 1
        kept = tensor.narrow(along, 0, min(max(tensor.shape[along] + min(value, 0), 0), tensor.shape[along]))
        tensor = torch.cat([kept, tensor.narrow(along, 0, min(max(value, 0), tensor.shape[along]))], along)
    return {**tensors, name: tensor.contiguous()}


def _document(name: str, data: bytes) -> Any:
    """The JSON of a file, or of a safetensors file's header; None where there is none."""
    try:
        if name.endswith(".safetensors"):
            data = data[8 : 8 + int.from_bytes(data[:8], "little")]
        return json.loads(data) if name.endswith((".json", ".safetensors")) else None
    except ValueError:
        return None


def _joined(name: str, data: bytes, document: Any) -> bytes:
    made = json.dumps(document).encode()
    if not name.endswith(".safetensors"):
        return made
    return len(made).to_bytes(8, "little") + made + data[8 + int.from_bytes(data[:8], "little") :]


def _paths(document: Any, before: tuple[Any, ...] = ()) -> Iterator[list[Any]]:
    yield list(before)
    inner = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for key, value in inner:
        yield from _paths(value, (*before, key))


def _set(document: Any, path: list[Any], drop: bool, value: Any) -> Any:
    at = document
    try:
        for key in path[:-1]:
            at = at[key]
        if drop:
            del at[path[-1]]
        else:
            at[path[-1]] = value
    except (KeyError, IndexError, TypeError):
        pass
    return document
