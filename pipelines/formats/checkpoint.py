"""A checkpoint as every format sees it: a config, compressed linears as records, all other tensors by name.

Knows no format. What cannot be written by anyone but us is refused here, with the format that can carry it.
Legend: O out, I in, G groups, E experts.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch import Tensor

from ...compress.weights import GgmlWeight, NormalFloatWeight, StoredWeight, UniformWeight
from ...recover.extra_modules import ExtraModules
from ..errors import UsageError

T = TypeVar("T")
BITS = (2, 3, 4, 8)
"""Widths of codes that the formats of other programs have."""


class Lazy(Mapping[str, T], Generic[T]):
    """A mapping whose values are made on access and not kept: a model larger than memory passes through."""

    def __init__(self, loaders: Mapping[str, Callable[[], T]]):
        self._loaders = dict(loaders)

    def __getitem__(self, name: str) -> T:
        return self._loaders[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)

    def __contains__(self, name: object) -> bool:
        return name in self._loaders


@dataclass(frozen=True)
class Checkpoint:
    """Everything an export needs and an import yields.

    config: the Hugging Face `config.json` without `quantization_config`.
    linears: module name → record [O, I]; a fused expert matrix is `<parameter name>.<expert index>`. Its bias, where it
        has one, is `<name>.bias` in `tensors`.
    tensors: every other tensor under its in-memory state-dict name.
    files: a directory with tokenizer and generation config to copy, or None.
    transposed: modules and fused parameters whose dense layout is [I, O] (GPT-2's `Conv1D`).
    tied: alias → source, both state-dict names ({"lm_head.weight": "model.embed_tokens.weight"}); an alias is not in
        `tensors`. A source may be the `.weight` of a compressed linear.
    card: what the model card says: `title`, `recipe`, `perplexity`, `baseline_perplexity`, `protocol`, `notes`, `read_by`.
    extra_modules: adapter modules that are not part of a linear: bottlenecks, virtual tokens.
    """

    config: dict[str, Any]
    linears: Mapping[str, StoredWeight]
    tensors: Mapping[str, Tensor]
    files: Path | None = None
    transposed: frozenset[str] = frozenset()
    tied: Mapping[str, str] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    extra_modules: tuple[ExtraModules, ...] = ()

    def with_linears(self, linears: Mapping[str, StoredWeight]) -> "Checkpoint":
        return replace(self, linears=linears)


def refuse_beyond_codes(name: str, record: StoredWeight, format_name: str) -> None:
    """UsageError when a record holds more than codes and a mask: no checkpoint format of others has room for it."""
    if record.activations is not None:
        raise UsageError(
            f"{name}: {format_name} here carries weights only, not the {record.activations.bits}-bit activations of this artifact; "
            "export the stage before the activation quantization, or set activations to none"
        )
    if record.smooth is not None:
        raise UsageError(f"{name}: {format_name} has no place for a smoothing vector on the input; --format dense folds it into the weight")
    if record.delta is not None:
        raise UsageError(
            f"{name}: {format_name} has no place for a sparse delta of {record.delta.values.numel()} weights; --format dense adds it in"
        )
    if record.low_rank is not None:
        raise UsageError(
            f"{name}: {format_name} has no place for a low-rank term of rank {record.low_rank.rank}; "
            "--adapter keeps it as a PEFT adapter next to the base, --format dense adds it in"
        )


def uniform_codes(name: str, record: StoredWeight, format_name: str) -> tuple[UniformWeight, Tensor, Tensor]:
    """(base, codes uint8 [O, I], zeros int64 [O, G]); masked weights sit on their zero point, hence decode to exactly 0."""
    refuse_beyond_codes(name, record, format_name)
    base = record.base
    if isinstance(base, NormalFloatWeight | GgmlWeight):
        refuse_other_grid(name, base, format_name)
    assert isinstance(base, UniformWeight)
    zeros = base.zeros_OG()
    whole = zeros.round()
    if not torch.equal(zeros, whole) or whole.min() < 0 or whole.max() >= 1 << base.bits:
        raise UsageError(
            f"{name}: {format_name} holds integer zero points 0…{(1 << base.bits) - 1}; these lie in {zeros.min():g}…{zeros.max():g} "
            "or are fractions; --format dense can carry them"
        )
    codes, zeros_OG, mask = base.codes_OI(), whole.to(torch.int64), record.mask_OI()
    if mask is not None:
        codes = codes.where(mask, column_zeros(base, zeros_OG).to(codes.dtype))
    return base, codes, zeros_OG


def in_bytes(checkpoint: Checkpoint, format_name: str) -> tuple[Checkpoint, list[str]]:
    """The checkpoint with codes of 5 and 6 bits in 8, value for value, since other programs' formats have no such widths; and a note."""
    names = [name for name, record in checkpoint.linears.items() if isinstance(record.base, UniformWeight) and record.base.bits not in BITS]
    if not names:
        return checkpoint, []

    def load(name: str) -> StoredWeight:
        record = checkpoint.linears[name]
        return replace(record, base=_in_bytes(record.base)) if name in wide and isinstance(record.base, UniformWeight) else record

    wide = set(names)
    linears = Lazy({name: partial(load, name) for name in checkpoint.linears})
    return checkpoint.with_linears(linears), [
        f"{len(names)} linears have codes of 5 or 6 bits, which {format_name} does not know: they are written in 8, the same values in more bytes"
    ]


def _in_bytes(base: UniformWeight) -> UniformWeight:
    """Codes and zero points move by the same number, so that a grid without zero points stays one."""
    shift = 128 - (1 << (base.bits - 1))
    zeros = None if base.zeros is None else base.zeros_OG(torch.float32 if base.float_zeros else torch.int64) + shift
    return UniformWeight.from_codes(base.codes_OI().int() + shift, base.scales, zeros, 8, base.group_size, base.group_index)


def refuse_other_grid(name: str, base: NormalFloatWeight | GgmlWeight, format_name: str) -> NoReturn:
    if isinstance(base, GgmlWeight):
        raise UsageError(f"{name}: {format_name} has no place for ggml's {base.type}; --format gguf carries it, --format dense its values")
    other = "--format bnb carries NF4" if base.bits == 4 else "--format dense can"
    raise UsageError(f"{name}: {format_name} holds uniform grids, not NormalFloat{base.bits}; {other}")


def column_zeros(base: UniformWeight, zeros_OG: Tensor) -> Tensor:
    """[O, I]: the zero point of every weight."""
    if base.group_index is not None:
        return zeros_OG[:, base.group_index.long()]
    return zeros_OG.repeat_interleave(base.in_features // base.groups, dim=1)


def half_scales(name: str, scales: Tensor, format_name: str) -> tuple[Tensor, bool]:
    """(float16 scales, whether rounding changed them). UsageError when one leaves the range of float16."""
    half = scales.half()
    if not torch.isfinite(half).all():
        raise UsageError(
            f"{name}: {format_name} stores scales as float16 and {scales.abs().max():g} is past 65504, its largest; --format dense can carry it"
        )
    return half, not torch.equal(half.float(), scales.float())


def masked_note(checkpoint_linears: int, format_name: str) -> str:
    return f"{checkpoint_linears} pruned linears: the zeros are exact, the masks themselves have no place in {format_name}"


def untie_compressed(checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """A compressed head shared with the embedding, as two: codes for the head, the same values densely for the embedding.

    No quantized format lets an embedding share a head's codes.
    """
    compressed = {alias: source for alias, source in checkpoint.tied.items() if alias.removesuffix(".weight") in checkpoint.linears}
    if not compressed:
        return checkpoint, []
    tensors = {name: partial(checkpoint.tensors.__getitem__, name) for name in checkpoint.tensors}
    for alias, source in compressed.items():
        tensors[source] = partial(_dense, checkpoint.linears, alias.removesuffix(".weight"), config_dtype(checkpoint))
    notes = [
        f"{alias} is compressed and was tied to {source}: both copies are written, the embedding densely"
        for alias, source in compressed.items()
    ]
    tied = {alias: source for alias, source in checkpoint.tied.items() if alias not in compressed}
    return replace(checkpoint, config={**checkpoint.config, "tie_word_embeddings": False}, tensors=Lazy(tensors), tied=tied), notes


def _dense(linears: Mapping[str, StoredWeight], name: str, dtype: torch.dtype) -> Tensor:
    return linears[name].dense(dtype)


def config_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating type the checkpoint's config names."""
    return dtype_of(checkpoint.config)


def dtype_of(config: Mapping[str, object]) -> torch.dtype:
    """The floating type a config.json names, float32 where it names none."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(f"the model's config says dtype {name!r}, which no weight can have; pass a dtype")
    return dtype
