"""The ranges that settings lie in, as types: a config's field says which one it is. Knows names and numbers only.

`doc` is how a range that is no interval is written for a reader; pipelines checks values against all of them before any work.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen, Predicate, doc

Bits = Literal[2, 3, 4, 5, 6, 8]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
"""Of forward passes."""
Width = Annotated[int, Ge(1), Le(65536)]
"""Of a rank, a group, a bottleneck: no more than the widest matrices have columns."""
SquareWidth = Annotated[int, Ge(1), Le(4096)]
"""Of a layer whose weights are the square of it, trained with their moments."""
WidthOrZero = Annotated[int, Ge(0), Le(65536)]
Group = Literal[-1] | Width
"""Columns of a group; −1 takes the whole row."""
RowGroupsOrZero = Annotated[int, Ge(0), Le(64)]
"""Of a matrix, each with a second moment of its own."""
Count = Annotated[int, Ge(1), Le(1_000_000)]
Iterations = Annotated[int, Ge(1), Le(10_000)]
Steps = Annotated[int, Ge(1), Le(10_000_000)]
StepsOrZero = Annotated[int, Ge(0), Le(10_000_000)]
Batch = Annotated[int, Ge(1), Le(65536)]
Tokens = Annotated[int, Ge(2), Le(1_048_576)]
"""Of a window: the first predicts nothing to learn from, so there are two at least."""
Seed = Annotated[int, Ge(0), Lt(2**63)]

Share = Annotated[float, Ge(0), Lt(1)]
ShareOrAll = Annotated[float, Ge(0), Le(1)]
SomeOrAll = Annotated[float, Gt(0), Le(1)]
Open = Annotated[float, Gt(0), Lt(1)]
Damp = Annotated[float, Ge(0), Le(10)]
Rate = Annotated[float, Gt(0), Le(100)]
RateOrZero = Annotated[float, Ge(0), Le(10)]
Factor = Annotated[float, Gt(0), Le(65536)]
FactorOrZero = Annotated[float, Ge(0), Le(65536)]
Temperature = Annotated[float, Ge(0.01), Le(100)]


@dataclass(frozen=True)
class ReadWhere:
    """Of a field that is read where other settings of its config say so alone: the condition in words, and as a function of the config.
    Elsewhere it must be what it is by default."""

    words: str
    holds: Callable[[Any], bool]


def is_pattern(text: str) -> bool:
    """ "unstructured", or "N:M" with 0 < N < M."""
    match = re.fullmatch(r"([0-9]{1,5}):([0-9]{1,5})", text)
    return text == "unstructured" or (match is not None and 0 < int(match[1]) < int(match[2]))


def is_regex(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return bool(text)


def is_depth(text: str) -> bool:
    return re.fullmatch(r"all|(first|middle|last):0*[1-9][0-9]{0,5}|[0-9]{1,6}(,[0-9]{1,6})*", text) is not None


Pattern = Annotated[str, Predicate(is_pattern), doc("unstructured, or N:M with 0 < N < M")]
Regex = Annotated[str, Predicate(is_regex), doc("a regular expression")]
Targets = (
    Annotated[str, Predicate(is_regex), doc("all, roles of q k v o gate up down, or a regular expression")]
    | Annotated[tuple[Regex, ...], MinLen(1), doc("a list of them")]
)
Layers = (
    Annotated[str, Predicate(is_depth), doc("all, first:k, middle:k, last:k or numbers (0,3)")]
    | Annotated[tuple[Annotated[int, Ge(0), Lt(1_000_000)], ...], MinLen(1), doc("a list of numbers")]
)
