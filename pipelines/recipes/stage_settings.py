"""One stage of a recipe: which methods there are, which keys each takes, and the validated settings.

Knows the registries of `compress` and `recover` by name and imports them only when a method is looked up (they bring torch).
Knows no files and no models; `recipe` lays the layers over one another, `stages/` does the work.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import doc

from ...compress.ggml_types import GGML_TYPES, OF_BITS, as_settings, type_for
from ...compress.ranges import Bits, Regex, is_pattern
from ..errors import UsageError
from .fields import FieldRange, field_ranges, hints, plain, range_words, refuse_unread, type_words, validated, value_of
from .settings import refuse_unknown, unknown

if TYPE_CHECKING:
    from ...compress.rounding import RtnConfig


@dataclass(frozen=True)
class FuseConfig:
    """`backend` as in kernels.linear: auto takes the fastest that this device has; the others insist.

    `integer_scales`: of matrices with rounded inputs (W4A8) every group's scale is rounded to a whole number times one float of its output, so
    that a code times it stays within a byte and the product is summed as integers (QServe, arXiv:2405.04532). This is a second rounding, which
    changes results: this stage's perplexity is measured with it. Off, nothing is rounded; such a product then runs where scales are exact."""

    backend: Literal["auto", "triton", "cpu-int4", "cpu-int8", "dense", "reference"] = "auto"
    integer_scales: bool = False


@dataclass(frozen=True)
class FuseMethod:
    config: type = FuseConfig
    version: int = 2
    does: str = "binds every matrix to the fastest kernel that the device has"
    paper: str = ""


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
SHARED = {
    "ignore": "regular expressions of modules that are left alone.",
    "include_head": "the output head as well, not the decoder blocks alone.",
    "true_sequential": "inside a block, matrices see the inputs that the compressed ones before them give.",
    "include_embeddings": "the token embeddings are rounded to `embedding_bits`, too.",
    "embedding_bits": "of the token embeddings, where they are included.",
    "head_bits": "an output head that the method leaves alone is rounded to so many; null: it stays as it is.",
    "overrides": "regular expressions and the settings of the modules that they match; a later match lies over an earlier one.",
}


@dataclass(frozen=True)
class StageSpec:
    """A stage with its validated settings.

    `config` is the frozen dataclass of the method; SHARED says what the settings of all methods mean. `address` is how --set, --from, --until and --force name it: `quantize`, or `quantize.2` for the second one.
    `named`: what --set gives it, even if it is the default; no part of what the stage is.
    """

    name: str
    address: str
    method: str
    config: Any
    ignore: Annotated[tuple[Regex, ...], doc("regular expressions")] = ()
    include_head: bool = False
    true_sequential: bool = False
    include_embeddings: bool = False
    embedding_bits: Bits = 8
    head_bits: Bits | None = None
    overrides: Annotated[dict[Regex, dict[str, object]], doc("{REGEX: {setting: value}}")] = field(default_factory=dict)
    named: frozenset[str] = field(default=frozenset(), compare=False)

    def skips(self, module: str) -> bool:
        return any(re.search(pattern, module) for pattern in self.ignore)

    def config_for(self, module: str) -> Any:
        """The config for one module, its overrides applied."""
        changes = self._changes(module)
        return validated(type(self.config), plain(self.config) | changes, f"{self.address}.overrides") if changes else self.config

    def overridden(self, module: str, keys: Collection[str]) -> bool:
        """Whether an override sets one of these keys for the module."""
        return not self._changes(module).keys().isdisjoint(keys)

    def _changes(self, module: str) -> dict[str, object]:
        changes: dict[str, object] = {}
        for pattern, fields in self.overrides.items():
            if re.search(pattern, module):
                changes.update(with_implied(fields))
        return changes

    def embedding_config(self, width: int, bits: Bits) -> "RtnConfig":
        """How token embeddings or a head [V, width] are rounded to nearest: the method's groups, or the largest below that divide; ggml's
        type of so many bits where the method's grid is one of ggml's. UsageError for rows that it does not fit."""
        from ...compress.rounding import RtnConfig

        if getattr(self.config, "grid", "uniform") != "uniform":
            kind = OF_BITS[bits]
            try:
                type_for(kind, width)
            except ValueError as error:
                raise UsageError(f"{self.address}: matrices outside the blocks: {error}") from error
            return RtnConfig(**as_settings(kind), clip="power", grid=kind)
        wanted = getattr(self.config, "group_size", None) or getattr(self.config, "block_size", 64)
        size = -1 if wanted == -1 else max(d for d in range(1, min(wanted, width) + 1) if width % d == 0)
        return RtnConfig(bits, size, getattr(self.config, "symmetric", False), clip="power")

    def settings(self) -> dict[str, object]:
        """Everything that decides the result, as plain YAML/JSON values; building from it gives an equal spec."""
        config = plain(self.config)
        common = {key: _yaml(getattr(self, key)) for key in STAGES[self.name][3] if key not in config}
        return {"method": self.method} | config | common


def methods(stage: str) -> dict[str, Any]:
    """The literal dict of a stage's methods."""
    module, name, _, _ = STAGES[stage]
    return getattr(import_module(module, __package__), name)


def config_keys(row: Any) -> list[str]:
    return [item.name for item in dataclasses.fields(row.config)]


def fields_of(stage: str, method: str) -> list[FieldRange]:
    """What a recipe may set for a method: its own fields, then those that every method of the stage shares."""
    row = methods(stage)[method]
    own = field_ranges(row.config, getattr(row, "defaults", None) or {})
    shared, known = StageSpec(stage, stage, method, None), hints(StageSpec)
    names = [key for key in STAGES[stage][3] if key not in config_keys(row)]
    return own + [FieldRange(n, type_words(known[n]), range_words(known[n]), _yaml(getattr(shared, n))) for n in names]


def _yaml(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def build(
    name: str, address: str, settings: Mapping[str, object], soft: frozenset[str] = frozenset(), named: frozenset[str] = frozenset()
) -> StageSpec | None:
    """Validate a stage's settings; None where the method is `none`.

    `soft` keys were written for another method, further down; they are dropped where this one does not know them.
    `named` keys are refused where nothing reads them even at their default, as are those of an override.
    """
    method = settings.get("method", STAGES[name][2])
    if method is None or method == "none":
        return None
    rows = methods(name)
    if not isinstance(method, str) or method not in rows:
        raise UsageError(f"{address}.method: {unknown('method', method, [*rows, 'none'])}")
    row = rows[method]
    fields = config_keys(row)
    unknown_to_blocks = {"true_sequential"} & soft if getattr(row, "scope", "matrix") == "block" else set()
    common = [key for key in STAGES[name][3] if key not in fields and key not in unknown_to_blocks]
    written = {key: value for key, value in settings.items() if key != "method" and (key not in soft or key in fields or key in common)}
    refuse_unknown(f"setting of {name} {method}", written, [*fields, *common, "method"], address)
    defaults = getattr(row, "defaults", None) or {}
    config = validated(row.config, {**defaults, **{key: value for key, value in written.items() if key in fields}}, address)
    refuse_unread(config, defaults, address, named)
    shared = _common({key: written[key] for key in common if key in written}, address)
    spec = StageSpec(name, address, method, config, **shared, named=named)
    if getattr(row, "scope", "matrix") == "block":
        _refuse_for_blocks(spec)
    for pattern, changes in spec.overrides.items():
        where = f"{address}.overrides[{pattern}]"
        refuse_unknown(f"setting of {name} {method}", changes, fields, where)
        refuse_unread(validated(row.config, plain(config) | with_implied(changes), where), vars(config), where, changes)
        by_matrix = getattr(row, "by_matrix", None)
        if by_matrix is not None and (whole := sorted(changes.keys() - by_matrix)):
            raise UsageError(f"{where}.{whole[0]}: {method} trains matrices jointly, so this is one for all; set {address}.{whole[0]}")
        if changes.get("allocation", "uniform") != "uniform":
            raise UsageError(
                f"{where}.allocation: one mean is shared among all blocks; set {address}.allocation, and here the `sparsity` of these matrices"
            )
    return spec


def with_implied(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings, with those that they imply: `pattern: "N:M"` fixes the sparsity, a `grid` of ggml's the bits and
    groups, whatever a lower layer has."""
    pattern, grid = settings.get("pattern"), settings.get("grid")
    implied = as_settings(grid) if isinstance(grid, str) and grid in GGML_TYPES else {}
    if isinstance(pattern, str) and ":" in pattern and is_pattern(pattern):  # what is no pattern is refused where it is validated
        kept, of = map(int, pattern.split(":"))
        implied["sparsity"] = 1 - kept / of
    return implied | dict(settings)


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


def _common(written: Mapping[str, object], address: str) -> dict[str, Any]:
    """The settings every method of a stage shares, checked; one pattern is a list of one."""
    known = hints(StageSpec)
    values = {key: [value] if key == "ignore" and isinstance(value, str) else value for key, value in written.items()}
    checked = {key: value_of(known[key], value, f"{address}.{key}") for key, value in values.items()}
    if checked.get("head_bits") is not None and checked.get("include_head"):
        raise UsageError(
            f"{address}.head_bits: include_head compresses the head by the method; set head_bits to null, or include_head to false"
        )
    return checked
