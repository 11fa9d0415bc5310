"""A recipe's size budget: bits per weight or bytes, and the settings of its allocation. Knows text and numbers only."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import MinLen, Predicate, doc
from pydantic import BaseModel, BeforeValidator, ConfigDict

from ...compress.ggml_types import GgmlName
from ...compress.ranges import Bits, Group, WidthOrZero

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Budget:
    """Bits per weight over the matrices it is spent on (those of the blocks; the embeddings and the head, where `allocation.embedding_bits` says
    so), or bytes of the whole artifact; exactly one is set."""

    text: str
    bits_per_weight: float | None = None
    total_bytes: int | None = None

    @classmethod
    def parse(cls, given: object) -> "Budget | None":
        if given is None or isinstance(given, Budget):
            return given
        match = re.fullmatch(r"\s*([0-9]{0,9}\.?[0-9]{1,9})\s*(bpw|[kmg]?i?b)\s*", str(given), flags=re.IGNORECASE)
        if match is None or float(match[1]) <= 0 or match[2].upper() == "IB":
            raise ValueError("expected bits per weight or bytes, as in 3.0bpw or 60MB")
        text = f"{match[1]}{match[2]}"
        if match[2].lower() == "bpw":
            return cls(text, bits_per_weight=float(match[1]))
        return cls(text, total_bytes=round(float(match[1]) * _UNITS[match[2].upper()]))

    def bytes_for(self, weights: int, rest_bytes: float) -> float:
        """What the matrices it is spent on may store: all of it in bits per weight, or what `rest_bytes` leave of the artifact."""
        return self.bits_per_weight * weights / 8 if self.bits_per_weight is not None else (self.total_bytes or 0) - rest_bytes

    def text_of(self, stored_bytes: float, weights: int, rest_bytes: float) -> str:
        """A size of those matrices in the budget's own unit, rounded up: as a budget it is enough."""
        if self.bits_per_weight is not None:
            return f"{_up(stored_bytes * 8 / weights)}bpw"
        unit = re.sub(r"[0-9.]", "", self.text)
        return f"{_up((stored_bytes + rest_bytes) / _UNITS[unit.upper()])}{unit}"


def _up(value: float) -> str:
    """Three decimals, rounded up."""
    return f"{-(-value * 1000 // 1) / 1000:.3f}"


def _listed(value: object) -> Any:
    """A single value where a list is meant; nothing twice."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return tuple(item for number, item in enumerate(items) if item not in items[:number])


def _listed_or_null(value: object) -> Any:
    return None if value is None else _listed(value)


def _texts(value: object) -> Any:
    """0.5 is a share whether it was written as a number or as text."""
    return tuple(str(item) if isinstance(item, float) else item for item in _listed(value))


def _is_sparsity(text: str) -> bool:
    try:
        pattern(text)
    except ValueError:
        return False
    return True


Sparsity = Annotated[str, Predicate(_is_sparsity)]


class AllocationSettings(BaseModel):
    """What every matrix may be given, and what is minimised. The product of all lists is the table of settings.

    double_quantize counts for NormalFloat methods only. grids: where the quantize stage's own `grid` is a type of ggml, the types that a matrix may
    be of, in place of bits and group_sizes, which are then refused; rows that are no multiple of 256 take the type that llama.cpp gives them, and its
    bytes. sparsities are "dense", an "N:M" pattern or a share of each row ("0.5"), and
    need a prune stage, which otherwise does what it says. weighting: which sum of the matrices' errors is least. output: squared output errors as
    they are; relative: each as a share of its output's energy; fisher: each output weighed by the mean square of the loss's gradient
    there, which makes the sum an estimate of nats per token. embedding_bits: of the token embeddings and of a head of its own, where the quantize
    stage rounds them (include_embeddings, head_bits), in place of what it says; an empty list leaves both to the stage and out of the budget,
    null stands for 4, 5, 6, 8 with a budget in bytes and for the empty list with one in bits per weight. The output of embeddings is the rows
    that the calibration text looks up, that of a head its logits; where both are one matrix, its error is the sum of the two. errors: rounding: what is left of rounding W by the best term of each rank, read
    off one spectrum; iterates: what the decompose stage's own method leaves, solved for every setting with a rank, as LQ-LoRA takes its table
    from its iterates: a solution each, so that few settings are meant.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    bits: Annotated[tuple[Bits, ...], BeforeValidator(_listed), MinLen(1), doc("a list of 2|3|4|5|6|8")] = (2, 3, 4)
    group_sizes: Annotated[tuple[Group, ...], BeforeValidator(_listed), MinLen(1), doc("a list of -1 or 1 … 65,536")] = (32, 64, 128)
    double_quantize: Annotated[tuple[bool, ...], BeforeValidator(_listed), MinLen(1), doc("a list of true|false")] = (False, True)
    grids: Annotated[tuple[GgmlName, ...], BeforeValidator(_listed), MinLen(1), doc("a list of types of ggml, q4_0 … q6_k")] = (
        "q2_k", "q3_k", "q4_k", "q5_k", "q6_k",
    )  # fmt: skip
    ranks: Annotated[tuple[WidthOrZero, ...], BeforeValidator(_listed), MinLen(1), doc("a list of 0 … 65,536")] = (0, 4, 8, 16, 32)
    embedding_bits: Annotated[tuple[Bits, ...] | None, BeforeValidator(_listed_or_null), doc("a list of 2|3|4|5|6|8, or null")] = None
    factor_bits: Annotated[tuple[Literal[4, 8, 16], ...], BeforeValidator(_listed), MinLen(1), doc("a list of 4|8|16")] = (16, 8)
    sparsities: Annotated[tuple[Sparsity, ...], BeforeValidator(_texts), doc("a list of dense, N:M or shares such as 0.5")] = ()
    weighting: Literal["output", "relative", "fisher"] = "fisher"
    errors: Literal["rounding", "iterates"] = "rounding"


def pattern(text: str) -> tuple[str, float]:
    """("dense", 0.0), ("2:4", 0.5) or ("unstructured", 0.5) from how a recipe writes it. ValueError for anything else."""
    if text == "dense":
        return "dense", 0.0
    if match := re.fullmatch(r"([0-9]+):([0-9]+)", text):
        kept, of = int(match[1]), int(match[2])
        if 0 < kept < of:
            return text, 1 - kept / of
    elif re.fullmatch(r"0?\.[0-9]+", text) and 0 < float(text) < 1:
        return "unstructured", float(text)
    raise ValueError(f"sparsity {text!r} is neither dense, nor N:M with 0 < N < M, nor a share such as 0.5")
