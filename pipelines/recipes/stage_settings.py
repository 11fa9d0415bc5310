"""One stage of a recipe: which methods there are, which keys each takes, and the validated settings.

Knows the registries of `compress` and `recover` by name and imports them only when a method is looked up (they bring torch).
Knows no files and no models; `recipe` lays the layers over one another, `stages/` does the work.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from ..errors import UsageError
from .settings import refuse_unknown, unknown


@dataclass(frozen=True)
class FuseConfig:
    """`backend` as in kernels.linear: auto takes the fastest that this device has; the others insist."""

    backend: Literal["auto", "triton", "cpu-int4", "cpu-int8", "dense", "reference"] = "auto"


@dataclass(frozen=True)
class FuseMethod:
    config: type = FuseConfig
    version: int = 2


FUSE = {"bind": FuseMethod()}

_OF_QUANTIZE = ("include_embeddings", "embedding_bits", "head_bits")
# stage → module and name of its literal dict of methods, the method taken when none is named, the settings every method shares
STAGES: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "prune": ("...compress.methods", "PRUNE", "wanda", ("ignore", "include_head", "true_sequential", "overrides")),
    "quantize": ("...compress.methods", "QUANTIZE", "gptq", (*_OF_QUANTIZE, "ignore", "include_head", "true_sequential", "overrides")),
    "decompose": ("...compress.methods", "DECOMPOSE", "qera_exact", ("ignore", "true_sequential", "overrides")),
    "recover": ("...recover.recovery_methods", "RECOVER", "lora", ()),
    "fuse": (".stage_settings", "FUSE", "bind", ()),
}


@dataclass(frozen=True)
class StageSpec:
    """A stage with its validated settings.

    `config` is the frozen dataclass of the method; `ignore` are regexes of modules left alone; `overrides` maps regexes to
    config fields for the modules they match (a later match lies over an earlier one). `true_sequential`: inside a block, matrices
    see the inputs that the compressed ones before them give. `include_embeddings`: the token embeddings are rounded to
    `embedding_bits`, too; `head_bits`: an output head that the method leaves alone is rounded to so many. `address` is how --set, --from, --until and --force name it: `quantize`, or `quantize.2` for the second one.
    """

    name: str
    address: str
    method: str
    config: Any
    ignore: tuple[str, ...] = ()
    include_head: bool = False
    true_sequential: bool = False
    include_embeddings: bool = False
    embedding_bits: int = 8
    head_bits: int | None = None
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def skips(self, module: str) -> bool:
        return any(re.search(pattern, module) for pattern in self.ignore)

    def config_for(self, module: str) -> Any:
        """The config for one module, its overrides applied."""
        changes = self._changes(module)
        return _validated(type(self.config), _plain(self.config) | changes, f"{self.address}.overrides") if changes else self.config

    def overridden(self, module: str, keys: Collection[str]) -> bool:
        """Whether an override sets one of these keys for the module."""
        return not self._changes(module).keys().isdisjoint(keys)

    def _changes(self, module: str) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        for pattern, fields in self.overrides.items():
            if re.search(pattern, module):
                changes.update(with_implied(fields))
        return changes

    def embedding_config(self, width: int, bits: int | None = None) -> Any:
        """How token embeddings or a head [V, width] are rounded to nearest: `bits`, else `embedding_bits`; the method's groups or the largest
        that divides."""
        from ...compress.rounding import RtnConfig

        wanted = getattr(self.config, "group_size", None) or getattr(self.config, "block_size", 64)
        size = -1 if wanted == -1 else max(d for d in range(1, min(wanted, width) + 1) if width % d == 0)
        return RtnConfig(bits or self.embedding_bits, size, getattr(self.config, "symmetric", False), clip="power")

    def settings(self) -> dict[str, Any]:
        """Everything that decides the result, as plain YAML/JSON values; building from it gives an equal spec."""
        _, common = self.name, {key: getattr(self, key) for key in STAGES[self.name][3]}
        config = _plain(self.config)
        plain = {"ignore": list(self.ignore), "overrides": {key: dict(value) for key, value in self.overrides.items()}}
        return {"method": self.method} | config | {key: plain.get(key, value) for key, value in common.items() if key not in config}


def methods(stage: str) -> dict[str, Any]:
    """The literal dict of a stage's methods."""
    module, name, _, _ = STAGES[stage]
    return getattr(import_module(module, __package__), name)


def config_keys(row: Any) -> list[str]:
    return [item.name for item in dataclasses.fields(row.config)]


def build(name: str, address: str, settings: Mapping[str, Any], soft: frozenset[str] = frozenset()) -> StageSpec | None:
    """Validate a stage's settings; None where the method is `none`.

    `soft` keys were written for another method, further down; they are dropped where this one does not know them.
    """
    method = settings.get("method", STAGES[name][2])
    if method is None or method == "none":
        return None
    rows = methods(name)
    if method not in rows:
        raise UsageError(f"{address}.method: {unknown('method', method, [*rows, 'none'])}")
    row = rows[method]
    fields = config_keys(row)
    common = [key for key in STAGES[name][3] if key not in fields]
    written = {key: value for key, value in settings.items() if key != "method" and (key not in soft or key in fields or key in common)}
    refuse_unknown(f"setting of {name} {method}", written, [*fields, *common, "method"], address)
    values = dict(getattr(row, "defaults", None) or {}) | {key: value for key, value in written.items() if key in fields}
    config = _validated(row.config, values, address)
    spec = StageSpec(name, address, method, config, **_common({key: written[key] for key in common if key in written}, address))
    if getattr(row, "scope", "matrix") == "block":
        _refuse_for_blocks(spec)
    for pattern, changes in spec.overrides.items():
        where = f"{address}.overrides[{pattern}]"
        refuse_unknown(f"setting of {name} {method}", changes, fields, where)
        _validated(row.config, _plain(config) | with_implied(changes), where)
        if changes.get("allocation", "uniform") != "uniform":
            raise UsageError(
                f"{where}.allocation: one mean is shared among all blocks; set {address}.allocation, and here the `sparsity` of these matrices"
            )
    return spec


def with_implied(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings written together, and what they say without saying it: `pattern: "N:M"` fixes the sparsity, whatever a lower layer has."""
    pattern = settings.get("pattern")
    if "sparsity" in settings or not isinstance(pattern, str):
        return dict(settings)
    from ...compress.masks import parse_pattern

    try:
        parsed = parse_pattern(pattern)
    except ValueError:  # refused where it is validated
        parsed = None
    return dict(settings) | ({} if parsed is None else {"sparsity": 1 - parsed[0] / parsed[1]})


def _refuse_for_blocks(spec: StageSpec) -> None:
    """What a method that trains decoder blocks as a whole cannot do."""
    if spec.true_sequential:
        raise UsageError(
            f"{spec.address}.true_sequential: {spec.method} trains a block as a whole, so its matrices have no order; set it to false"
        )
    if spec.include_head:
        raise UsageError(
            f"{spec.address}.include_head: {spec.method} trains decoder blocks, and the head is in none; give it a quantize stage of its own"
        )


def _common(written: Mapping[str, Any], address: str) -> dict[str, Any]:
    """The settings every method of a stage shares, checked."""
    checked: dict[str, Any] = {}
    for key in ("include_head", "true_sequential", "include_embeddings"):
        if key in written:
            if not isinstance(written[key], bool):
                raise UsageError(f"{address}.{key}: expected true or false, got {written[key]!r}")
            checked[key] = written[key]
    if "embedding_bits" in written:
        checked["embedding_bits"] = _bits(written["embedding_bits"], f"{address}.embedding_bits")
    if written.get("head_bits") is not None:
        checked["head_bits"] = _bits(written["head_bits"], f"{address}.head_bits")
        if checked.get("include_head"):
            raise UsageError(
                f"{address}.head_bits: include_head compresses the head by the method; set head_bits to null, or include_head to false"
            )
    if (ignore := written.get("ignore")) is not None:
        patterns = [ignore] if isinstance(ignore, str) else ignore
        if not isinstance(patterns, (list, tuple)):
            raise UsageError(f"{address}.ignore: expected a list of regular expressions, got {ignore!r}")
        checked["ignore"] = tuple(_regex(pattern, f"{address}.ignore") for pattern in patterns)
    if (overrides := written.get("overrides")) is not None:
        if not isinstance(overrides, Mapping) or not all(isinstance(value, Mapping) for value in overrides.values()):
            raise UsageError(f"{address}.overrides: expected {{REGEX: {{setting: value}}}}, got {overrides!r}")
        checked["overrides"] = {_regex(key, f"{address}.overrides"): dict(value) for key, value in overrides.items()}
    return checked


def _bits(value: object, where: str) -> int:
    from ...compress.packing import BITS

    if not isinstance(value, int) or value not in BITS:
        raise UsageError(f"{where}: expected one of {', '.join(map(str, BITS))}, got {value!r}")
    return value


def _regex(pattern: object, where: str) -> str:
    if not isinstance(pattern, str):
        raise UsageError(f"{where}: expected a regular expression, got {pattern!r}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{where}: {pattern!r} is not a regular expression ({error})") from error
    return pattern


def _plain(config: Any) -> dict[str, Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(type(config)).dump_python(config, mode="json")


def _validated(config_type: type, values: Mapping[str, Any], where: str) -> Any:
    """An instance of the config dataclass; UsageError for an unknown key at any depth or a value of the wrong kind."""
    from pydantic import TypeAdapter, ValidationError

    _refuse_unknown_fields(config_type, values, where)
    _refuse_infinite(values, where)
    try:
        return TypeAdapter(config_type).validate_python(dict(values))
    except ValidationError as error:
        raise UsageError(f"{where}{validation_message(error)}") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: {error}") from error


def _refuse_infinite(value: Any, where: str) -> None:
    """UsageError for NaN and infinity at any depth: no setting has a use for them, and comparisons with them are silent."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{where}: {value} is no finite number")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_infinite(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            _refuse_infinite(inner, f"{where}[{number}]")


def _refuse_unknown_fields(config_type: type, values: Mapping[str, Any], where: str) -> None:
    hints = typing.get_type_hints(config_type)
    refuse_unknown("setting", values, [item.name for item in dataclasses.fields(config_type)], where)
    for key, value in values.items():
        hint = hints[key]
        candidates = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        inner = [item for item in candidates if dataclasses.is_dataclass(item) and isinstance(item, type)]
        if isinstance(value, Mapping) and len(inner) == 1:
            _refuse_unknown_fields(inner[0], value, f"{where}.{key}")


def validation_message(error: Any) -> str:
    """Pydantic's first complaint as `.key: what was expected, got value`."""
    first = error.errors(include_url=False)[0]
    location = "".join(f".{part}" for part in first["loc"] if not isinstance(part, str) or part.isidentifier())
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = "" if isinstance(given, Mapping) or dataclasses.is_dataclass(given) else f", got {given!r}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{location}: {message[0].lower()}{message[1:]}{shown}{more}"
