"""The baseline stage: the unmodified model as an artifact, the teacher and the target of all later stages.

A directory whose tensor names are the model's own is referred to, not copied; anything else is brought over once.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from transformers import AutoModelForCausalLM

from ..errors import InputError, as_input_error
from ..formats import detect, read
from ..formats.checkpoint import Checkpoint, dtype_of
from ..formats.peft import adapter_settings, refuse_other_models_tokens
from ..formats.shards import FLOATING
from ..models.source import load_config, source_files, source_paths, weights_home
from ..models.structure import inspect, skeleton, tied_names
from ..store.artifact import Artifact, ArtifactWriter, shards_of
from ..store.manifest import FOR_TRANSFORMERS, SCHEMA

DOCUMENTS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
    "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def fingerprint(directory: Path) -> str:
    """Names the model: every weight file's hash and the config's, an adapter's included."""
    files, home = source_files(directory), weights_home(directory)
    settings = (home / "config.json").read_bytes() + (b"" if home == directory else adapter_settings(directory).read_bytes())
    config = hashlib.sha256(settings).hexdigest()
    return hashlib.sha256(json.dumps([SCHEMA, config, {n: e["sha256"] for n, e in files.items()}]).encode()).hexdigest()


def build_baseline(directory: Path, scratch: Path, final: Path, manifest: dict[str, Any]) -> Artifact:
    """Write the baseline artifact of a local model directory."""
    home = weights_home(directory)
    documents = {n: (home / n).read_bytes() for n in DOCUMENTS if (home / n).is_file()}
    raw = json.loads((home / "config.json").read_text())
    quantized = raw.pop("quantization_config", None)
    documents["config.json"] = json.dumps({**_with_dtype(raw), **FOR_TRANSFORMERS}, indent=2, sort_keys=True).encode()
    writer = ArtifactWriter(scratch, None)
    if quantized is not None or home != directory:
        _import(writer, directory)
    elif _names_match(directory):
        files = source_files(directory)
        writer.finished["source"] = {"files": files, "linears": {}, "extra": {}}
        manifest = manifest | {"source": str(directory)}
    else:
        _convert(writer, directory)
    return writer.seal(final, manifest, documents)


def artifact_of(checkpoint: Checkpoint, files: Path, scratch: Path, final: Path, manifest: Mapping[str, object]) -> Artifact:
    """The artifact of a checkpoint that was read, with the config and tokenizer files of `files`."""
    documents = {n: (files / n).read_bytes() for n in ("config.json", *DOCUMENTS) if (files / n).is_file()}
    writer = ArtifactWriter(scratch, None)
    _write_checkpoint(writer, checkpoint, files)
    return writer.seal(final, manifest, documents)


def _with_dtype(config: dict[str, Any]) -> dict[str, object]:
    """transformers would look for the type in the weights."""
    return config if config.get("dtype") or config.get("torch_dtype") else {**config, "dtype": str(dtype_of(config)).removeprefix("torch.")}


def check_source(directory: Path) -> None:
    """InputError for what the headers of a dense model's files show to be wrong, and for an adapter in the same directory that does not fit."""
    if weights_home(directory) != directory:
        _read(directory)
    elif detect(directory) == "dense":
        _names_match(directory)


def _read(directory: Path) -> Checkpoint:
    """A quantized checkpoint, or a base with an adapter: InputError where its virtual tokens are those of another model."""
    checkpoint = read(directory)
    for extra in checkpoint.extra_modules:
        refuse_other_models_tokens(extra, skeleton(load_config(directory)), directory)
    return checkpoint


def _names_match(directory: Path) -> bool:
    """Whether the checkpoint's tensors are the model's own, name by name. InputError for a shape that is not the model's, and for weights that
    are no floating-point numbers."""
    model = skeleton(load_config(directory))
    result: dict[str, list[int]] = {}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for file in source_paths(directory).values():
        try:
            with safetensors.safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118
                    piece = shard.get_slice(name)
                    result[name] = piece.get_shape()
                    if name in parameters and piece.get_dtype() not in FLOATING:
                        raise InputError(
                            f"{file}: {name} is stored as {piece.get_dtype()}, and config.json says nothing of a quantization; "
                            f"give a checkpoint in one of {', '.join(FLOATING)}, or the quantization_config that belongs to this one"
                        )
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{file}: not a readable safetensors file ({error}); download the model again") from error
    tied = tied_names(model)
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    if not wanted.keys() <= result.keys():
        return False
    for name, shape in wanted.items():
        if result[name] != shape:
            raise InputError(f"{directory}: {name} has shape {result[name]}, config.json says {shape}; the two belong to different models")
    return True


def _convert(writer: ArtifactWriter, directory: Path) -> None:
    """Load through transformers (which knows every checkpoint layout) and write the tensors by their names in memory."""
    with as_input_error(f"{directory}: transformers cannot load it"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto", trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    model, info = loaded
    missing = sorted(set(info["missing_keys"]) - set(tied_names(model)))
    if missing:
        raise InputError(
            f"{directory}: no tensor for {missing[0]} ({len(missing)} missing); the checkpoint is incomplete or of another architecture"
        )
    _write_model(writer, model, {})


def _import(writer: ArtifactWriter, directory: Path) -> None:
    """A checkpoint that some program quantized: its codes, scales and zeros as they are."""
    detect(weights_home(directory))
    _write_checkpoint(writer, _read(directory), weights_home(directory))


def _write_checkpoint(writer: ArtifactWriter, checkpoint: Checkpoint, files: Path) -> None:
    model = skeleton(load_config(files))
    structure = inspect(model, include_head=True)
    for index in range(structure.blocks):
        prefix = f"{structure.prefix}.{index}."
        linears = {n: checkpoint.linears[n] for n in checkpoint.linears if n.startswith(prefix)}
        tensors = {n: checkpoint.tensors[n] for n in checkpoint.tensors if n.startswith(prefix)}
        writer.write_part(f"block-{index:05d}", shards_of(tensors, linears), linears)
    blocks, tied = f"{structure.prefix}.", tied_names(model)
    linears = {n: checkpoint.linears[n] for n in checkpoint.linears if not n.startswith(blocks)}
    tensors = {n: checkpoint.tensors[n] for n in checkpoint.tensors if not n.startswith(blocks) and n not in tied}
    writer.write_part("rest", {"tensors": tensors, **shards_of({}, linears)}, linears)
    for extra in checkpoint.extra_modules:
        writer.write_extra_modules(extra)


def _write_model(writer: ArtifactWriter, model: torch.nn.Module, linears: dict[str, Any]) -> None:
    structure = inspect(model)
    state, tied = model.state_dict(), tied_names(model)
    for index in range(structure.blocks):
        prefix = f"{structure.prefix}.{index}."
        writer.write_part(f"block-{index:05d}", shards_of({n: t for n, t in state.items() if n.startswith(prefix)}, {}), {})
    outside = {n: t for n, t in state.items() if not n.startswith(f"{structure.prefix}.") and n not in tied}
    writer.write_part("rest", {"tensors": outside}, linears)
