"""The values of JSON as types, what is read from a file narrowed to them, and what is written made finite.

Knows nothing of what the values mean.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeGuard, overload

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
JsonObject: TypeAlias = dict[str, Json]


def mapping(value: object) -> Mapping[str, object]:
    """The value, an object of JSON. Raises ValueError where it is anything else."""
    if not isinstance(value, Mapping):
        raise ValueError(f"an object of JSON is expected, not {_shown(value)}")
    return value


def sequence(value: object) -> Sequence[object]:
    """The value, an array of JSON. Raises ValueError where it is anything else."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise ValueError(f"an array of JSON is expected, not {_shown(value)}")
    return value


def mappings(value: object) -> list[Mapping[str, object]]:
    """The value, an array of objects."""
    return [mapping(entry) for entry in sequence(value)]


def integer(value: object) -> int:
    """The value, a whole number. Raises ValueError where it is anything else, `true` included."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"a whole number is expected, not {_shown(value)}")
    return value


def real(value: object) -> float:
    """The value, a number. Raises ValueError where it is anything else, `true` included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a number is expected, not {_shown(value)}")
    return value


def text(value: object) -> str:
    """The value, a string. Raises ValueError where it is anything else."""
    if not isinstance(value, str):
        raise ValueError(f"a string is expected, not {_shown(value)}")
    return value


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"


def numbers(value: object, path: str = "") -> list[tuple[str, float]]:
    """Every number inside a JSON-like value with its dotted path; booleans and text are not numbers."""
    if isinstance(value, Mapping):
        return [pair for key, inner in value.items() for pair in numbers(inner, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list | tuple):
        return [pair for index, inner in enumerate(value) for pair in numbers(inner, f"{path}.{index}" if path else str(index))]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [(path, value)]
    return []


@overload
def finite(value: Mapping[str, object]) -> JsonObject: ...


@overload
def finite(value: object) -> Json: ...


def finite(value: object) -> Json:
    """The value in JSON's own types, with None for every number that is not finite."""
    return as_json(value, "", [])


def is_finite(value: object) -> TypeGuard[float]:
    """Whether it is a number, and neither an infinity nor NaN."""
    return isinstance(value, int | float) and math.isfinite(value)


def as_json(value: object, path: str, lost: list[str]) -> Json:
    """JSON types only; NaN and infinities become None and their paths are appended to `lost`."""
    if isinstance(value, Mapping):
        return {str(key): as_json(inner, f"{path}.{key}".lstrip("."), lost) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner, f"{path}.{index}".lstrip("."), lost) for index, inner in enumerate(value)]
    if value is None or isinstance(value, bool | str | int):
        return value
    number = value if isinstance(value, float) else _scalar(value)
    if isinstance(number, float) and not math.isfinite(number):
        lost.append(path)
        return None
    return number


def _scalar(value: object) -> int | float | str:
    """Numbers of other libraries (zero-dimensional tensors, numpy scalars) by their `item()`, anything else by its text."""
    item: Callable[[], object] | None = getattr(value, "item", None)
    plain = item() if callable(item) else value
    return plain if isinstance(plain, int | float) else str(plain)
