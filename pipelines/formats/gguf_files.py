"""GGUF: one file for llama.cpp and what is built on it, with the model's settings and its tokenizer; a low-rank term becomes a LoRA adapter file.

Quantized weights go into the block type that holds them exactly, embeddings included; everything else in floating point, exactly as well. Rows of
q and k are in llama.cpp's order where a family needs it. Knows tensors and files; families, tokenizers and types have their own.
Legend: O out, I in, R rank.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from gguf.gguf_reader import ReaderTensor
from torch import Tensor

from ...compress.ggml_types import GGML_TYPES, GgmlName
from ...compress.weights import DenseWeight, GgmlWeight, LowRank, StoredWeight
from ..errors import InputError, UsageError, as_input_error
from .biases import with_room_for_biases
from .checkpoint import Checkpoint, Lazy, masked_note
from .folder import model_card
from .ggml_blocks import bytes_per_row, pack, unpack
from .gguf_families import GgufModel
from .gguf_tokenizer import vocabulary
from .gguf_types import FLOATS, LABEL, float_type, held
from .rows import take_rows
from .shards import COUNTED, INDEX, SHARD_BYTES, fresh_directory, fresh_file, write_json

MODEL, ADAPTER = "model.gguf", "adapter.gguf"
"""In a directory."""
HOW_TO_LOAD = "# llama.cpp, and what is built on it\nllama-cli -m {model}{adapter}"
FILE_TYPES: Mapping[str, LlamaFileType] = {
    "F32": LlamaFileType.ALL_F32, "F16": LlamaFileType.MOSTLY_F16, "BF16": LlamaFileType.MOSTLY_BF16, "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q4_1": LlamaFileType.MOSTLY_Q4_1, "q5_0": LlamaFileType.MOSTLY_Q5_0, "q5_1": LlamaFileType.MOSTLY_Q5_1, "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q2_k": LlamaFileType.MOSTLY_Q2_K, "q3_k": LlamaFileType.MOSTLY_Q3_K_M, "q4_k": LlamaFileType.MOSTLY_Q4_K_M,
    "q5_k": LlamaFileType.MOSTLY_Q5_K_M, "q6_k": LlamaFileType.MOSTLY_Q6_K,
}  # fmt: skip
"""The file's own word for what most of its weights are."""


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file, made when its turn comes."""

    name: str
    type: str  # a row of FILE_TYPES
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        if self.type in GGML_TYPES:
            return (self.shape[0], bytes_per_row(self.type, self.shape[1]))  # type: ignore[arg-type]
        return (*self.shape[:-1], self.shape[-1] * FLOATS[self.type].itemsize)

    @property
    def size_bytes(self) -> int:
        return torch.Size(self.bytes_shape).numel()


def write(checkpoint: Checkpoint, output: Path, adapter: bool = False, shard_bytes: int = SHARD_BYTES) -> list[str]:
    """What to tell the user. `output` is a .gguf file (an adapter goes to NAME.adapter.gguf), or a directory for model.gguf, adapter.gguf
    and a model card. `adapter`: a low-rank term goes there. It is one file whatever its size; with `COUNTED` an index of how many bytes it would be.
    UsageError, before anything is written, for what has no place in it."""
    checkpoint = with_room_for_biases(checkpoint)
    model = GgufModel.of(checkpoint.config)
    if checkpoint.extra_modules:
        raise UsageError(
            f"{checkpoint.extra_modules[0].method} adds modules to the model, which llama.cpp has no place for; export an earlier --stage"
        )
    tokens = vocabulary(checkpoint.files, model.config.vocab_size)
    factors = _factors(checkpoint, model)
    if bool(factors) != adapter:
        raise UsageError(
            f"{len(factors) // 2} linears have a low-rank term: --adapter writes it as a LoRA adapter file, --merge --requantize quantizes the sum"
            if factors
            else "no linear of this model has a low-rank term, so there is no adapter to write; leave --adapter out"
        )
    entries, notes = _entries(checkpoint, model)
    if shard_bytes == COUNTED:
        output.mkdir(parents=True)
        total = sum(e.size_bytes for e in entries) + sum(4 * tensor.numel() for tensor in factors.values())
        write_json(output / INDEX, {"metadata": {"total_size": total}, "weight_map": {}})
        return [*notes, *tokens.notes, *model.notes()]
    with _places(output) as (file, adapter_file, card):
        writer = GGUFWriter(file, model.family.arch.name.lower())
        writer.add_type("model")
        writer.add_name(str(checkpoint.card.get("title", "model")))
        model.write(writer)
        tokens.write(writer)
        most = Counter({kind: sum(e.size_bytes for e in entries if e.type == kind) for kind in {e.type for e in entries}}).most_common(1)[
            0
        ][0]
        writer.add_file_type(FILE_TYPES[most])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        _write_tensors(writer, entries)
        notes += [*tokens.notes, *model.notes()]
        if factors:
            _write_adapter(adapter_file, model, factors)
            notes.append(
                f"the low-rank term of {len(factors) // 2} linears is in {adapter_file.name}, a LoRA adapter of scale 1 (llama-cli --lora)"
            )
        if card is not None:
            how = HOW_TO_LOAD.format(model=file.name, adapter=f" --lora {adapter_file.name}" if factors else "")
            card.write_text(
                model_card(checkpoint.card, notes, how)
                .replace("```python", "```sh")
                .replace("library_name: transformers", "library_name: gguf")
            )
    return notes


def read(output: Path, like: Checkpoint) -> Checkpoint:
    """What `write` made, under the names of the config of `like`: quantized tensors as records, all others by name, an adapter's factors in the
    records. InputError for a file that is damaged, or of another model."""
    file, adapter_file = (output / MODEL, output / ADAPTER) if output.is_dir() else (output, adapter_path(output))
    model, tensors = GgufModel.of(like.config), _opened(file)
    shared = {source: alias for alias, source in like.tied.items() if alias.removesuffix(".weight") in like.linears}
    linears: dict[str, Callable[[], StoredWeight]] = {}
    plain: dict[str, Callable[[], Tensor]] = {}
    expected = [*like.tensors, *(f"{name}.weight" for name in like.linears)] if like.linears or like.tensors else _names_of(like, model)
    for name in expected:
        stored = tensors.get(model.name(like.tied.get(name, name)))
        if stored is None:
            raise InputError(f"{file}: holds no {model.name(name)}, which is the model's {name}; the file is of another model")
        kind = stored.tensor_type.name
        if kind in FLOATS:
            plain[like.tied.get(name, name)] = partial(_floats, stored, model, name)
        elif kind.lower() in GGML_TYPES:
            linears[shared.get(name, name).removesuffix(".weight")] = partial(_record, stored, model, name)
        else:
            raise InputError(f"{file}: {stored.name} is of type {kind}; read are {', '.join([*FLOATS, *GGML_TYPES]).upper()}")
    if adapter_file.is_file():
        _join(model, _opened(adapter_file), linears, plain, adapter_file)
    return replace(like, linears=Lazy(linears), tensors=Lazy(plain))


def _names_of(like: Checkpoint, model: GgufModel) -> list[str]:
    """The state dict's names, tied ones once."""
    from .naming import Names

    names = Names.of(like.config)
    return [name for name in names.shapes if name not in names.tied]


def _entries(checkpoint: Checkpoint, model: GgufModel) -> tuple[list[_Entry], list[str]]:
    """(every tensor in the order of the file, notes). Each record is looked at once, so that refusals come before the work."""
    entries: list[_Entry] = []
    rounded = pruned = 0
    wider: dict[str, list[str]] = {}
    for name, record in checkpoint.linears.items():
        place = checkpoint.tied.get(f"{name}.weight", f"{name}.weight")
        made, lossy = held(name, replace(record, low_rank=None))
        rounded, pruned = rounded + lossy, pruned + (record.mask is not None)
        kind = made.type if isinstance(made, GgmlWeight) else float_type(made.weight)
        if isinstance(made, GgmlWeight) and made.bits != getattr(record.base, "bits", made.bits):
            wider.setdefault(made.type, []).append(name)
        entries.append(_Entry(model.name(place), kind, made.shape, partial(_bytes_of, checkpoint.linears, name, model.rows(place), kind)))
    for name in checkpoint.tensors:
        tensor = _in_file(checkpoint.tensors, model, name)
        kind = float_type(tensor)
        entries.append(_Entry(model.name(name), kind, tuple(tensor.shape), partial(_in_file, checkpoint.tensors, model, name)))
    extra = model.extra_tensors()
    entries += [_Entry(name, "F32", tuple(tensor.shape), partial(extra.__getitem__, name)) for name, tensor in extra.items()]
    notes = [f"{len(names)} linears are written as {kind.upper()}, the same values in other bytes" for kind, names in wider.items()]
    if pruned:
        notes.append(masked_note(pruned, LABEL))
    if rounded:
        notes.append(f"{rounded} linears had scales finer than float16, which is what {LABEL} stores; they are rounded")
    outside = [e for e in entries if e.name in ("token_embd.weight", "output.weight")]
    return entries, notes + [f"{e.name}: {e.type.upper()}, {e.size_bytes} bytes" for e in outside]


def _bytes_of(linears: Mapping[str, StoredWeight], name: str, rows: Tensor | None, kind: str) -> Tensor:
    record = linears[name]
    if rows is not None:
        record = take_rows(replace(record, low_rank=None), rows)
    made, _ = held(name, replace(record, low_rank=None))
    return pack(made) if isinstance(made, GgmlWeight) else made.weight.to(FLOATS[kind])


def _in_file(tensors: Mapping[str, Tensor], model: GgufModel, name: str) -> Tensor:
    tensor, rows, offset = tensors[name], model.rows(name), model.offset(name)
    tensor = tensor if rows is None else tensor[rows]
    return tensor.float() + offset if offset else tensor


def _write_tensors(writer: GGUFWriter, entries: list[_Entry]) -> None:
    for entry in entries:
        kind = GGMLQuantizationType[entry.type.upper()]
        writer.add_tensor_info(
            entry.name, entry.bytes_shape, torch.empty(0, dtype=torch.uint8).numpy().dtype, entry.size_bytes, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        tensor = entry.load()
        tensor = tensor if entry.type in GGML_TYPES else tensor.to(FLOATS[entry.type])
        writer.write_tensor_data(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    writer.close()


def _factors(checkpoint: Checkpoint, model: GgufModel) -> dict[str, Tensor]:
    """`NAME.lora_a` [R, I] and `NAME.lora_b` [O, R] of every low-rank term. UsageError for one of the head where that is the embeddings too."""
    out: dict[str, Tensor] = {}
    for name in checkpoint.linears:
        term = checkpoint.linears[name].low_rank
        if term is None or not term.rank:
            continue
        if f"{name}.weight" in checkpoint.tied:
            raise UsageError(
                f"{name}: is one matrix with the embeddings, and an adapter would change both; --merge, or leave include_head out"
            )
        up, down = term.factors()
        rows, target = model.rows(f"{name}.weight"), model.name(f"{name}.weight")
        out |= {f"{target}.lora_a": down, f"{target}.lora_b": up if rows is None else up[rows]}
    return out


def _write_adapter(file: Path, model: GgufModel, tensors: Mapping[str, Tensor]) -> None:
    """Scale 1: an alpha of 0 stands for it whatever the ranks are; where they are all one, alpha is that rank, as other programs expect."""
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_a")}
    writer = GGUFWriter(file, model.family.arch.name.lower())
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(ranks.pop()) if len(ranks) == 1 else 0.0)
    _write_tensors(writer, [_Entry(name, "F32", tuple(tensor.shape), lambda t=tensor: t) for name, tensor in tensors.items()])


def adapter_path(file: Path) -> Path:
    """Where the adapter of a single file lies."""
    return file.with_name(f"{file.stem}.{ADAPTER}")


@contextmanager
def _places(output: Path) -> Iterator[tuple[Path, Path, Path | None]]:
    """(model, adapter, model card) in a scratch place that becomes `output` when the block ends well."""
    if output.suffix == ".gguf":
        with fresh_file(output) as file:
            yield file, adapter_path(file), None
    else:
        with fresh_directory(output) as made:
            yield made / MODEL, made / ADAPTER, made / "README.md"


def _opened(file: Path) -> dict[str, ReaderTensor]:
    with as_input_error(f"{file}: no whole GGUF file", "write or copy it again"):
        return {tensor.name: tensor for tensor in GGUFReader(file).tensors}


def _floats(stored: ReaderTensor, model: GgufModel, name: str) -> Tensor:
    kind = stored.tensor_type.name
    shape = tuple(int(n) for n in reversed(stored.shape))
    tensor = torch.from_numpy(stored.data.copy()).view(-1).view(torch.uint8).view(FLOATS[kind]).view(shape)
    rows, offset = model.rows(name), model.offset(name)
    tensor = tensor if rows is None else tensor[rows.argsort()]
    return tensor - offset if offset else tensor


def _record(stored: ReaderTensor, model: GgufModel, name: str) -> StoredWeight:
    columns, rows = (int(n) for n in stored.shape)
    record = StoredWeight(unpack(torch.from_numpy(stored.data.copy()), cast(GgmlName, stored.tensor_type.name.lower()), (rows, columns)))
    order = model.rows(name)
    return record if order is None else take_rows(record, order.argsort())


def _join(
    model: GgufModel,
    tensors: Mapping[str, ReaderTensor],
    linears: dict[str, Callable[[], StoredWeight]],
    plain: dict[str, Callable[[], Tensor]],
    file: Path,
) -> None:
    """The factors of an adapter into the records, which a dense weight becomes for it."""
    places = {model.name(f"{name}.weight"): name for name in linears} | {model.name(n): n.removesuffix(".weight") for n in plain}
    for target in sorted({name.rpartition(".")[0] for name in tensors}):
        name = places.get(target)
        if name is None:
            raise InputError(f"{file}: its adapter is for {target}, which is not in the model's file")
        base = linears.get(name) or partial(_dense_record, plain.pop(f"{name}.weight"))
        linears[name] = partial(_with_term, base, tensors[f"{target}.lora_b"], tensors[f"{target}.lora_a"], model.rows(f"{name}.weight"))


def _dense_record(load: Callable[[], Tensor]) -> StoredWeight:
    return StoredWeight(DenseWeight(load()))


def _with_term(base: Callable[[], StoredWeight], up: ReaderTensor, down: ReaderTensor, order: Tensor | None) -> StoredWeight:
    up_OR, down_RI = (torch.from_numpy(stored.data.copy()) for stored in (up, down))
    return replace(base(), low_rank=LowRank(up_OR if order is None else up_OR[order.argsort()], down_RI))
