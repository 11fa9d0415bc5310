"""Ranges of config fields, read off their types: checked before any work, and described for a reader.

Strict: a number written as text, true or false for a number, a number for text are refused; a whole number is a number. Knows types
and values; no stage, no method, no file.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin

from annotated_types import DocInfo, Ge, Gt, Le, Lt

from ...compress.ranges import ReadWhere
from ...reports.json_values import JsonObject
from ..errors import UsageError
from .settings import refuse_unknown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from pydantic import TypeAdapter, ValidationError

Config = TypeVar("Config")

SHOWN = 80
"""Characters of a refused value at most."""


@dataclass(frozen=True)
class FieldRange:
    """A field as `pipeline list METHOD` shows it: `type` and `range` in words ("integer", "1 … 65,536"), `default` as a recipe writes it,
    `where` it is read ("requantize is true"; empty where it always is)."""

    name: str
    type: str
    range: str
    default: object
    where: str = ""


def field_ranges(config_type: type, defaults: Mapping[str, object]) -> list[FieldRange]:
    """Of every field in order; `defaults` lie over the dataclass's own. TypeError for a field whose type declares no range."""
    known, result = hints(config_type), []
    for item in dataclasses.fields(config_type):
        hint, default = known[item.name], _default(item, defaults)
        where = " and ".join(condition.words for condition in _conditions(hint))
        default = list(default) if isinstance(default, tuple) else default
        result.append(FieldRange(item.name, type_words(hint), range_words(hint), default, where))
    return result


def refuse_unread(config: "DataclassInstance", defaults: Mapping[str, object], where: str, named: Collection[str]) -> None:
    """UsageError for a field that differs from its default, or is among those `named`, where the other settings say that nothing reads it."""
    known = hints(type(config))
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        for condition in _conditions(known[item.name]):
            if (item.name in named or value != _default(item, defaults)) and not condition.holds(config):
                raise UsageError(f"{where}.{item.name}: {shown(value)} is read only where {condition.words}; change that, or leave it out")


def _default(item: "dataclasses.Field[object]", defaults: Mapping[str, object]) -> object:
    own = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
    return defaults.get(item.name, None if own is dataclasses.MISSING else own)


def _conditions(hint: object) -> list[ReadWhere]:
    return [m for m in split_annotated(hint)[1] if isinstance(m, ReadWhere)]


def hints(config_type: type) -> dict[str, object]:
    return typing.get_type_hints(config_type, include_extras=True)


def options(hint: object) -> tuple[object, ...]:
    """The members of a union, else the hint alone."""
    kind, metadata = split_annotated(hint)
    if metadata and not all(isinstance(m, ReadWhere) for m in metadata):
        return (hint,)
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def range_words(hint: object) -> str:
    """Which values a type takes. TypeError where it does not say."""
    words = [_range(option) for option in options(hint)]
    plain = all(get_origin(option) is Literal or option in (bool, types.NoneType) for option in options(hint))
    return ("|" if plain else " or ").join(words)


def type_words(hint: object) -> str:
    """ "integer", "number", "choice", "true or false", "text", "list", "settings"."""
    words = [_type(option) for option in options(hint) if option is not types.NoneType]
    return "choice" if set(words) == {"choice", "true or false"} else " or ".join(dict.fromkeys(words))


def split_annotated(hint: object) -> tuple[object, tuple[object, ...]]:
    """(the type, its metadata, nested ones flattened)."""
    return (get_args(hint)[0], get_args(hint)[1:]) if get_origin(hint) is Annotated else (hint, ())


def bounds(metadata: tuple[object, ...]) -> tuple[tuple[float, bool], tuple[float, bool]] | None:
    """((low, whether it is a value), (high, whether it is)); None where an end is missing."""
    low = next(((_number(m.ge), True) if isinstance(m, Ge) else (_number(m.gt), False) for m in metadata if isinstance(m, (Ge, Gt))), None)
    high = next(((_number(m.le), True) if isinstance(m, Le) else (_number(m.lt), False) for m in metadata if isinstance(m, (Le, Lt))), None)
    return None if low is None or high is None else (low, high)


def _number(end: object) -> float:
    if not isinstance(end, int | float):
        raise TypeError(f"a range ends in a number, not in {end!r}")
    return end


def _range(hint: object) -> str:
    kind, metadata = split_annotated(hint)
    written = next((m.documentation for m in metadata if isinstance(m, DocInfo)), None)
    if written is not None:
        return written
    if get_origin(kind) is Literal:
        return "|".join(str(value) for value in get_args(kind))
    if kind in (bool, types.NoneType):
        return "true|false" if kind is bool else "null"
    if _has_fields(kind):
        return "{" + ", ".join(f"{name}: {range_words(inner)}" for name, inner in hints(kind).items()) + "}"
    ends = bounds(metadata)
    if ends is None or kind not in (int, float):
        raise TypeError(f"{hint} declares no range")
    (low, has_low), (high, has_high) = ends
    if kind is int:
        return f"{low if has_low else low + 1:,} … {high if has_high else high - 1:,}"
    return f"{'[' if has_low else '('}{low:g}, {high:g}{']' if has_high else ')'}"


def _type(hint: object) -> str:
    kind = split_annotated(hint)[0]
    named = {bool: "true or false", int: "integer", float: "number", str: "text"}
    if kind in named:
        return named[kind]
    if get_origin(kind) is Literal:
        return "choice" if not all(isinstance(v, int) for v in get_args(kind)) or len(get_args(kind)) > 1 else "integer"
    return "list" if get_origin(kind) is tuple else "settings"


@lru_cache
def _adapter(hint: Any) -> "TypeAdapter[object]":
    from pydantic import TypeAdapter

    return TypeAdapter(hint)


def plain(config: object) -> JsonObject:
    """The fields of a config as YAML and JSON hold them."""
    return _adapter(type(config)).dump_python(config, mode="json")


def validated(config_type: type[Config], values: Mapping[str, object], where: str) -> Config:
    """An instance of the config dataclass; UsageError for an unknown key at any depth or a value outside its range."""
    from pydantic import ValidationError

    _refuse_unknown_fields(config_type, values, where)
    try:
        made = _adapter(config_type).validate_json(
            json.dumps(values), strict=True
        )  # of JSON, lists and mappings are what fields are made of
    except ValidationError as error:
        raise UsageError(f"{where}{complaint(config_type, values, error)}") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: {error}") from error
    assert isinstance(made, config_type)
    return made


def value_of(hint: object, value: object, where: str) -> Any:
    """A value of that type; UsageError outside its range."""
    from pydantic import ValidationError

    try:
        return _adapter(hint).validate_json(json.dumps(value), strict=True)
    except (TypeError, ValidationError) as error:
        raise UsageError(f"{where}: expected {range_words(hint)}, got {shown(value)}") from error


CHECKED = "checked"
"""The type of a validator's error whose message is complete as it is."""


def complaint(config_type: type, values: Mapping[str, object], error: "ValidationError") -> str:
    """The first of pydantic's complaints as `.field: expected its range, got value`; what a config says of two fields as it says it."""
    first = error.errors(include_url=False)[0]
    path, given, hint = "", values, config_type
    for part in first["loc"]:
        inner = next((o for o in options(hint) if _has_fields(o)), None)
        if inner is None or part not in hints(inner):
            break
        path, hint = f"{path}.{part}", hints(inner)[part]
        if not isinstance(given, Mapping) or part not in given:
            return f"{path}: is missing; expected {range_words(hint)}"
        given = given[part]
    if not path or first["type"] == CHECKED or (first["type"] == "value_error" and any(_has_fields(o) for o in options(hint))):
        return f"{path}: {first['msg'].removeprefix('Value error, ')}"
    return f"{path}: expected {range_words(hint)}, got {shown(given)}"


def shown(value: object) -> str:
    text = {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _has_fields(hint: object) -> TypeGuard["type[DataclassInstance]"]:
    return isinstance(hint, type) and typing.get_origin(hint) is None and (dataclasses.is_dataclass(hint) or hasattr(hint, "model_fields"))


def _refuse_unknown_fields(config_type: type, values: Mapping[str, object], where: str) -> None:
    known = hints(config_type)
    refuse_unknown("setting", values, [item.name for item in dataclasses.fields(config_type)], where)
    for key, value in values.items():
        inner = [o for o in options(known[key]) if _has_fields(o)]
        if isinstance(value, Mapping) and len(inner) == 1:
            _refuse_unknown_fields(inner[0], value, f"{where}.{key}")
