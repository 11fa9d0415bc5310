"""Values inside and outside the range that a field's type declares, read off the type by other means than the program's own."""

import dataclasses
import types
from collections.abc import Iterator
from math import inf, isfinite, nan
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen, Predicate
from bitmend.pipelines.recipes.stage_settings import STAGES, methods
from hypothesis import strategies as st

WRONG: tuple[Any, ...] = (
    nan, inf, -inf, -1, -2, 0, 0.0, -0.5, 1.5, 1e300, -1e300, 10**12, 2**63, 2**70, 65537, True, False, None, "3", "nan", "", "(", "nothing", "4:2",
    "first:0", [], [[]], [-1], [True], [1.5], ["("], [""], {}, {"bits": 4, "more": 1}, {"bits": 5}, {"bits": True}, {"bits": 4, "group_size": 0},
)  # fmt: skip
"""What people and programs write by mistake; of each field, those of them that its type does not take."""
TEXTS = {
    "is_pattern": ["unstructured", "2:4", "1:99999"],
    "is_regex": ["all", "q,down", "q_proj", "."],
    "is_depth": ["all", "first:1", "middle:1", "last:1", "0", "0,1"],
}
"""Examples inside, by the name of the predicate."""


def every_field() -> Iterator[tuple[str, str, str, Any]]:
    """(stage, method, field, its type) of every method's config, in the order of the registries."""
    for stage in STAGES:
        for method, row in methods(stage).items():
            hints = get_type_hints(row.config, include_extras=True)
            for item in dataclasses.fields(row.config):
                yield stage, method, item.name, hints[item.name]


def members(hint: Any) -> list[tuple[Any, tuple[Any, ...]]]:
    """(type, what is declared of it) of each member of a union."""
    kind, declared = (get_args(hint)[0], hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())
    if get_origin(kind) in (Union, types.UnionType):
        return [(inner, also + declared) for member in get_args(kind) for inner, also in members(member)]
    return [(kind, declared)]


def limits(kind: Any, declared: tuple[Any, ...]) -> tuple[Any, Any]:
    """The least and the greatest value. AssertionError for a number that is not bounded on both sides."""
    low = [m for m in declared if isinstance(m, Ge | Gt)]
    high = [m for m in declared if isinstance(m, Le | Lt)]
    assert len(low) == len(high) == 1, "declares no range"
    if kind is int:
        return (low[0].ge if isinstance(low[0], Ge) else low[0].gt + 1), (high[0].le if isinstance(high[0], Le) else high[0].lt - 1)
    least = low[0].ge if isinstance(low[0], Ge) else low[0].gt + 1e-300
    return float(least), float(high[0].le) if isinstance(high[0], Le) else high[0].lt - 1e-12


def takes(hint: Any, value: Any) -> bool:
    return any(_takes(kind, declared, value) for kind, declared in members(hint))


def _takes(kind: Any, declared: tuple[Any, ...], value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is types.NoneType:
        return value is None
    if get_origin(kind) is Literal:
        return value in get_args(kind) and not isinstance(value, bool)
    if kind is bool:
        return isinstance(value, bool)
    if kind in (int, float):
        low, high = limits(kind, declared)
        return number and (kind is float or isinstance(value, int)) and isfinite(value) and low <= value <= high
    if kind is str:
        assert any(isinstance(m, Predicate) for m in declared), "declares no range"
        return isinstance(value, str) and all(m.func(value) for m in declared if isinstance(m, Predicate))
    if get_origin(kind) is tuple:
        least = [m.min_length for m in declared if isinstance(m, MinLen)]
        return isinstance(value, list) and len(value) >= max([0, *least]) and all(takes(get_args(kind)[0], item) for item in value)
    hints = get_type_hints(kind, include_extras=True)
    needed = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    return isinstance(value, dict) and needed <= value.keys() <= hints.keys() and all(takes(hints[k], v) for k, v in value.items())


def ends(hint: Any) -> list[Any]:
    """Every choice, and both ends of every interval."""
    actual: list[Any] = []
    for kind, declared in members(hint):
        if kind is types.NoneType:
            actual.append(None)
        elif get_origin(kind) is Literal:
            actual += get_args(kind)
        elif kind is bool:
            actual += [False, True]
        elif kind in (int, float):
            actual += limits(kind, declared)
        elif kind is str:
            actual += next(TEXTS[m.func.__name__] for m in declared if isinstance(m, Predicate))
        elif get_origin(kind) is tuple:
            actual += [[item] for item in ends(get_args(kind)[0])]
        else:
            actual += [{"bits": bits, "group_size": size} for bits in (4, 8) for size in ends(_hint(kind, "group_size"))]
    return actual


def between(hint: Any) -> st.SearchStrategy[Any]:
    """Ends and values between them."""
    intervals = [(kind, limits(kind, declared)) for kind, declared in members(hint) if kind in (int, float)]
    return st.one_of(st.sampled_from(ends(hint)), *(st.integers(*ends_) if kind is int else st.floats(*ends_) for kind, ends_ in intervals))


def _hint(kind: type, name: str) -> Any:
    return get_type_hints(kind, include_extras=True)[name]


ALONE: dict[tuple[str, str], dict[str, Any]] = {
    **{("sparsegpt", field): {"bits": 4} for field in ("group_size", "symmetric", "clip", "activations")},
    **{(method, "spread"): {"allocation": "depth"} for method in ("magnitude", "wanda", "sparsegpt")},
    ("fish_mask", "swap"): {"reestimate_every": 1},
    ("perp", "rank"): {"lora": "mask_lora"},
    ("perp", "alpha"): {"lora": "mask_lora"},
}


def required_settings(stage: str, method: str, field: str, value: Any) -> dict[str, Any]:
    """The settings without which this one would not be read, or would contradict another's default."""
    other: dict[str, Any] = {}
    if stage == "decompose" and method != "svdquant":
        other = {"requantize": True, "overlap": 1.0}
        other |= {"quantizer": "gptq", "metric": "second_moment"} if field == "overlap" else {}
        other |= {"rank": max(value or 1, 1)} if field == "kept_rank" else {}
        other |= {"factor_bits": 16} if field == "factor_dtype" else {}
    return other | ALONE.get((method, field), {})
