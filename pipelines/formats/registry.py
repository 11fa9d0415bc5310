"""The export formats by their names on the command line, and detection of a directory's format.

Knows names and configs; each format knows its bytes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..errors import InputError, UsageError
from ..store.manifest import QUANT_METHOD
from . import bitsandbytes, compressed_tensors, ggml_folder, gguf_files, gptq_files, peft, plain
from .checkpoint import Checkpoint
from .folder import read_config


@dataclass(frozen=True)
class Format:
    """`write(checkpoint, directory, **options)` returns notes for the user; `read(directory)` returns a Checkpoint. A `whole` format holds embeddings
    in their codes, writes a low-rank term itself and changes no value; it is read by the config of a checkpoint: `read(output, like)`."""

    write: Callable[..., list[str]]
    read: Callable[..., Checkpoint]
    whole: bool = False


FORMATS: Mapping[str, Format] = {
    "dense": Format(plain.write, plain.read),
    "gptq": Format(partial(gptq_files.write, version=1), gptq_files.read),
    "gptq-v2": Format(partial(gptq_files.write, version=2), gptq_files.read),
    "compressed-tensors": Format(compressed_tensors.write, compressed_tensors.read),
    "bnb": Format(bitsandbytes.write, bitsandbytes.read),
    "gguf": Format(gguf_files.write, gguf_files.read, whole=True),
}


def detect(directory: Path) -> str:
    """The name in FORMATS of what `directory` holds, or that of an imported GGUF file, which none writes, from its config. InputError for unknown formats and versions."""
    quantization = read_config(directory)[1]
    if quantization is None:
        return "dense"
    if quantization.get("quant_method") == ggml_folder.METHOD:
        return ggml_folder.METHOD
    method = quantization.get("quant_method", "gptq" if "desc_act" in quantization else None)
    if method == "gptq":
        kind = quantization.get("checkpoint_format") or "gptq"
        return {"gptq": "gptq", "gptq_v2": "gptq-v2"}.get(kind) or _unknown(directory, f"gptq checkpoint_format {kind!r}")
    if method == "bitsandbytes":
        return "bnb"
    if method in ("compressed-tensors", "compressed_tensors"):
        return "compressed-tensors"
    if method == QUANT_METHOD:
        raise InputError(f"{directory}: is a stage of a run, no checkpoint to start from; `pipeline export` its run and give the export")
    return _unknown(directory, f"quant_method {method!r}")


def write(name: str, checkpoint: Checkpoint, directory: Path, adapter: bool = False, **options: object) -> list[str]:
    """Export in format `name`, as one model; with `adapter` a low-rank term or virtual tokens go to DIR/adapter and everything else to DIR/base.
    UsageError for an unknown name, and for what has no place."""
    if name not in FORMATS:
        raise UsageError(f"unknown format {name!r}; known are {', '.join(FORMATS)}")
    if FORMATS[name].whole:
        return FORMATS[name].write(checkpoint, directory, adapter=adapter, **options)
    if adapter:
        return peft.write(checkpoint, directory, FORMATS[name].write, **options)
    tokens = peft.virtual_tokens(checkpoint)
    if tokens is not None:
        raise UsageError(
            f"{tokens.count} virtual tokens stand before this model and merge into nothing; --adapter writes DIR/base and DIR/adapter, for PEFT"
        )
    with_term = peft.with_low_rank(checkpoint)
    if with_term and name != "dense":
        raise UsageError(
            f"{with_term} linears have a low-rank term, which {name} has no place for: --adapter keeps it in DIR/adapter, for PEFT, next to DIR/base "
            "in this format; --format dense adds it into the weights; --merge --requantize quantizes the sum again"
        )
    return FORMATS[name].write(checkpoint, directory, **options)


def read_back(name: str, output: Path, written: Checkpoint) -> Checkpoint:
    """What `write` left in `output` of the checkpoint `written`."""
    return FORMATS[name].read(output, written) if FORMATS[name].whole else read(output)


def is_pair(directory: Path) -> bool:
    return (directory / peft.BASE / "config.json").is_file() and peft.adapter_settings(directory).is_file()


def read(directory: Path) -> Checkpoint:
    """Import whatever `directory` holds, a pair of base and adapter included. InputError for what is none of FORMATS."""
    if is_pair(directory):
        return peft.read(directory, read)
    result = detect(directory)
    return ggml_folder.read(directory) if result == ggml_folder.METHOD else FORMATS[result].read(directory)


def _unknown(directory: Path, what: str) -> str:
    raise InputError(f"{directory}: {what} is not known; read are {', '.join(FORMATS)} and base + adapter directories")
