"""The layers of a recipe, laid over one another before anything is validated: a profile, documents, the command line.

Each document may hold `profiles: {demo: …, standard: …}`, laid over that document alone. Knows the notation, stages and their addresses; what a
key may hold is `recipe`'s and `stage_settings`'.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError
from .sections import Data
from .settings import merged, nested, refuse_unknown, split_assignment
from .stage_settings import STAGES, with_implied

PROFILES: dict[str, dict[str, Any]] = {
    "demo": {"calibration": {"samples": 16, "seq_len": 512}, "evaluation": {"seq_len": 512, "windows": 16}},
    "standard": {"calibration": {"samples": 128, "seq_len": 2048}, "evaluation": {"seq_len": 2048, "windows": None}},
}
COMMAND_LINE = "command line"
MOST_STAGES = 99
"""Their directories are numbered in two digits."""
_STAGE_KEY = re.compile(rf"({'|'.join(STAGES)})(?:\.([1-9][0-9]*))?")


@dataclass
class DraftStage:
    """A stage while layers are laid over one another; `soft` keys were meant for another method, `named` ones stand on the command line and take
    nothing back."""

    name: str
    address: str
    keys: dict[str, Any]
    soft: set[str] = field(default_factory=set)
    named: frozenset[str] = frozenset()

    def lay(self, keys: Mapping[str, object], origin: str) -> None:
        if origin == COMMAND_LINE:
            self.named |= _taking_nothing_back(keys, self.keys)
        keys = with_implied(keys)
        if "method" in keys and keys["method"] != self.keys.get("method", STAGES[self.name][2]):
            self.soft |= set(self.keys)
        self.soft -= set(keys)
        self.keys = merged(self.keys, keys)


@dataclass
class Draft:
    """The layers laid so far; `known`: the recipe's keys; `named` is of the allocation what it is of a stage."""

    fields: dict[str, Any]
    known: Collection[str]
    stages: list[DraftStage] = field(default_factory=list)
    named: frozenset[str] = frozenset()

    def lay(self, document: Mapping[str, object], origin: str) -> None:
        fields = {key: value for key, value in document.items() if key in self.known and key != "stages"}
        if origin == COMMAND_LINE and isinstance(given := fields.get("allocation"), Mapping):
            self.named |= _taking_nothing_back(given, self.fields.get("allocation"))
        self.fields = merged(self.fields, fields)
        if "stages" in document:
            self.stages = _stage_list(document["stages"], origin)
        for key, keys in document.items():
            if _STAGE_KEY.fullmatch(str(key)):
                self._stage(key, origin).lay(mapping_of(keys, f"{origin}: {key}"), origin)

    def _stage(self, key: str, origin: str) -> DraftStage:
        address = key.removesuffix(".1")
        for stage in self.stages:
            if stage.address == address:
                return stage
        here = ", ".join(stage.address for stage in self.stages) or "none"
        raise UsageError(f"{origin}: the recipe has no stage {address!r}; its stages are: {here}")


def _taking_nothing_back(keys: Mapping[str, object], below: object) -> set[str]:
    """Those that lower layers do not hold, or hold at the same value."""
    return {key for key, value in keys.items() if not isinstance(below, Mapping) or key not in below or below[key] == value}


def document_of(document: Mapping[str, object], origin: str, fields: Collection[str], inner: bool = False) -> dict[str, object]:
    """Top-level keys checked against `fields`, those of a recipe; `data: SRC` spread over its three uses. `inner`: of a profile."""
    known = [key for key in fields if not inner or key not in ("model", "profile", "name")] + ([] if inner else ["profiles"])
    for key in document:
        if not _STAGE_KEY.fullmatch(str(key)):
            refuse_unknown("key", [key], [*known, *STAGES], origin)
    checked = dict(document)
    if not inner:
        refuse_unknown("profile", mapping_of(document.get("profiles"), f"{origin}: profiles"), PROFILES, origin)
    if isinstance(checked.get("data"), str):
        checked["data"] = dict.fromkeys(Data.model_fields, checked["data"])
    return checked


def command_line(sets: list[str], options: Mapping[str, object]) -> dict[str, object]:
    """KEY=VALUE texts and options (None where not given) as one document."""
    given = {key: value for key, value in options.items() if value is not None}
    data = dict.fromkeys(Data.model_fields, given.pop("data")) if "data" in given else {}
    for option, use in (("calibration", "calibration"), ("train", "train"), ("eval", "evaluation")):
        if option in given:
            data[use] = given.pop(option)
    document = given | ({"data": data} if data else {})
    for text in sets:
        key, value = split_assignment(text)
        match = re.match(rf"(?:{_STAGE_KEY.pattern})(?=\.|$)", key)
        head = match[0] if match else key.split(".")[0]
        subkeys = key[len(head) + 1 :].split(".") if len(key) > len(head) else []
        if "data" in (head,) and not subkeys and isinstance(value, str):
            value = dict.fromkeys(Data.model_fields, value)
        document = merged(document, nested([head.removesuffix(".1"), *subkeys], value))
    return document


def _stage_list(stages: object, origin: str) -> list[DraftStage]:
    if not isinstance(stages, list):
        raise UsageError(f"{origin}: stages: expected a list, as in [{{quantize: {{method: gptq, bits: 4}}}}], got {stages!r}")
    if len(stages) > MOST_STAGES:
        raise UsageError(f"{origin}: stages: {len(stages)} are more than a recipe may have ({MOST_STAGES})")
    result: list[DraftStage] = []
    for place, item in enumerate(stages, start=1):
        entry = {item: None} if isinstance(item, str) else item
        if not isinstance(entry, Mapping) or len(entry) != 1:
            raise UsageError(f"{origin}: stages: entry {place} should be one `stage: {{settings}}`, got {item!r}")
        ((name, keys),) = entry.items()
        refuse_unknown("stage", [name], STAGES, f"{origin}: stages, entry {place}")
        nth = 1 + sum(stage.name == name for stage in result)
        result.append(DraftStage(name, name if nth == 1 else f"{name}.{nth}", with_implied(mapping_of(keys, f"{origin}: {name}"))))
    return result


def mapping_of(value: object, where: str) -> Mapping[str, object]:
    """Empty for None. UsageError for anything else that is no mapping."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UsageError(f"{where}: expected `key: value` settings, got {value!r}")
    return value
