"""The values of JSON as types, and what is read from a file narrowed to them.

Knows nothing of what the values mean.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

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
