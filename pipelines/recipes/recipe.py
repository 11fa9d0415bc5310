"""A recipe: what to do with which model, from YAML, a settings file and the command line, validated once.

Layers (`layers`), the upper one wins: command line > settings file > recipe > what the profile gives. A file may write out every default, as
`pipeline show` does and a run's own recipe; a setting of the command line that nothing reads is refused at its default, too, unless it takes back what a file says. Stages are a list; a stage is addressed by its name
(`quantize`), the second of that name as `quantize.2`. Knows no model and no files but the recipe's own.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import MinLen, Predicate, doc
from pydantic import BeforeValidator, Field, InstanceOf, PlainSerializer, ValidationError

from ...compress.ranges import DtypeName, Seed
from ..errors import UsageError
from .budget import AllocationSettings, Budget
from .fields import complaint
from .layers import COMMAND_LINE, PROFILES, Draft, command_line, document_of, mapping_of
from .mixture import NAMED, with_sources
from .sections import Calibration, Data, Evaluation, Model, Section
from .settings import absolute, dump, merged, read_mapping, unknown
from .stage_settings import FUSE, STAGES, StageSpec, build, config_keys, methods

__all__ = [
    "FUSE",
    "STAGES",
    "Budget",
    "Recipe",
    "StageSpec",
    "config_keys",
    "known_recipes",
    "methods",
    "resolve",
    "run_directory",
]

RECIPES = Path(__file__).parent


class Recipe(Section):
    """Everything that decides a run's results, validated. `stages` holds those that run; `skipped` remembers, by their place
    in the written list, those with `method: none`, so that addresses survive the round trip through YAML. `dtype`: that of forward passes;
    `deterministic` false lets a GPU sum in any order, faster, so that a resumed run may differ in its last bits (`devices`)."""

    name: Annotated[str, Predicate(lambda name: re.fullmatch(r"[\w.-]+", name) is not None), doc("letters, digits, . _ -")] = "recipe"
    about: Annotated[str, doc("text")] = ""
    model: Model = "demo"
    revision: Annotated[str, MinLen(1), doc("a revision of a Hub model")] | None = None
    teacher: Model | None = None
    data: Data = Data()
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()
    seed: Seed = 0
    dtype: DtypeName = "auto"
    deterministic: bool = True
    profile: Literal["demo", "standard"] = "standard"
    budget: Annotated[
        Budget | None,
        BeforeValidator(Budget.parse),
        PlainSerializer(lambda budget: budget.text if budget else None),
        doc("bits per weight or bytes, as in 3.0bpw or 60MB, or null"),
    ] = None
    allocation: AllocationSettings = AllocationSettings()
    stages: list[InstanceOf[StageSpec]] = Field(default_factory=list)
    skipped: dict[int, str] = Field(default_factory=dict, exclude=True)

    def stage(self, address: str) -> StageSpec:
        """The stage of that address; UsageError with the nearest known one."""
        for spec in self.stages:
            if spec.address == address.removesuffix(".1"):
                return spec
        raise UsageError(unknown("stage", address, [spec.address for spec in self.stages]))

    def check_addresses(self, first: str | None, last: str | None, force: str | None) -> None:
        """As the function, of this recipe's stages and "baseline"."""
        check_addresses(["baseline", *(spec.address for spec in self.stages)], first, last, force)

    def settings(self) -> dict[str, Any]:
        """Plain values, as in the YAML file."""
        plain = self.model_dump(mode="json", exclude={"stages", "skipped"})
        written: list[dict[str, object]] = []
        running = iter(self.stages)
        for place in range(len(self.stages) + len(self.skipped)):
            if place in self.skipped:
                written.append({self.skipped[place]: {"method": "none"}})
            else:
                spec = next(running)
                written.append({spec.name: spec.settings()})
        return plain | {"stages": written}

    def to_yaml(self) -> str:
        """What recipe.resolved.yaml holds; `resolve` on that file gives an equal recipe."""
        return dump(self.settings())


FIELDS = [name for name in Recipe.model_fields if name != "skipped"]


def check_addresses(known: Sequence[str], first: str | None = None, last: str | None = None, force: str | None = None) -> None:
    """UsageError for an address that is not known, and for a first stage (--from) behind the last one (--until)."""
    for address in (first, last, force):
        if address is not None and address.removesuffix(".1") not in known:
            raise UsageError(unknown("stage", address, known))
    if first is not None and last is not None and known.index(first.removesuffix(".1")) > known.index(last.removesuffix(".1")):
        raise UsageError(f"--from {first} lies behind --until {last}: nothing would be done; the stages are {', '.join(known)}")


def _refuse_unread(chosen: Recipe, named: frozenset[str]) -> None:
    """UsageError for what the stages of this recipe do not read; `named` settings of the allocation even at their default."""
    usual = AllocationSettings()
    given = [key for key in AllocationSettings.model_fields if key in named or getattr(chosen.allocation, key) != getattr(usual, key)]
    if chosen.budget is None and given:
        key = given[0]
        raise UsageError(f"allocation.{key}: is read only where there is a budget; give one, as in --budget 3.0bpw, or leave it out")
    unread = [key for key in given if key in _not_chosen(chosen)]
    if unread:
        raise UsageError(
            f"allocation.{unread[0]}: is not read, since the grid of the quantize stage is {'a type of ggml' if unread[0] != 'grids' else 'none of ggml'}; "
            f"{'name types in allocation.grids' if unread[0] != 'grids' else 'set quantize.grid, as in quantize.grid=q4_k'}, or leave it out"
        )
    learns = any(spec.name == "recover" and getattr(spec.config, "loss", None) != "cross_entropy" for spec in chosen.stages)
    if chosen.teacher is not None and not learns:
        raise UsageError("teacher: no stage of this recipe learns from one; add a recover stage (loss distill or both), or leave it out")


def _not_chosen(chosen: Recipe) -> set[str]:
    """Settings of the allocation that the grid of the quantize stage leaves without a meaning."""
    grids = {getattr(spec.config, "grid", "uniform") for spec in chosen.stages if spec.name == "quantize"}
    if not grids:
        return set()
    return {"grids"} if grids == {"uniform"} else {"bits", "group_sizes", "double_quantize"}


def known_recipes() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def run_directory(recipe: Recipe) -> Path:
    """Where a run lies unless -o says otherwise: runs/<recipe>, with the model's name where it is not the demo model."""
    model = "" if recipe.model == "demo" else "-" + re.sub(r"[^\w.-]+", "_", Path(recipe.model.rstrip("/")).name).strip("._")
    return Path("runs") / f"{recipe.name}{model}"


def planned_directory(
    recipe: str, *, file: Path | None = None, sets: list[str] | None = None, options: Mapping[str, object] | None = None
) -> Path:
    """`run_directory` of what `resolve` will give, before its methods are looked up, which brings torch. UsageError as there."""
    return run_directory(_without_stages(recipe, file, sets or [], options or {})[0])


def resolve(
    recipe: str | Mapping[str, object],
    *,
    file: Path | None = None,
    sets: list[str] | None = None,
    options: Mapping[str, object] | None = None,
) -> Recipe:
    """The validated recipe: of a name or a YAML file, or a mapping with what such a file would hold. `options` are the command line's (model, revision, data, calibration, train, eval, seed, dtype,
    profile, budget, teacher; None where not given), `sets` its KEY=VALUE texts. UsageError says which key of which layer is wrong."""
    checked, draft = _without_stages(recipe, file, sets or [], options or {})
    specs = [build(stage.name, stage.address, stage.keys, frozenset(stage.soft), stage.named) for stage in draft.stages]
    skipped = {place: draft.stages[place].name for place, spec in enumerate(specs) if spec is None}
    chosen = checked.model_copy(update={"stages": [spec for spec in specs if spec is not None], "skipped": skipped})
    _refuse_unread(chosen, draft.named)
    return chosen


def _without_stages(
    recipe: str | Mapping[str, object], file: Path | None, sets: list[str], options: Mapping[str, object]
) -> tuple[Recipe, Draft]:
    """All layers, validated but for the stages, which are yet to be built."""
    path = None if isinstance(recipe, Mapping) else _recipe_path(recipe)
    origin = str(path or "recipe")
    documents = [(document_of(recipe if isinstance(recipe, Mapping) else read_mapping(Path(origin)), origin, FIELDS), origin)]
    if file is not None:
        documents.append((document_of(read_mapping(file), str(file), FIELDS), str(file)))
    documents.append((document_of(command_line(sets, options), COMMAND_LINE, FIELDS), COMMAND_LINE))
    upper = {key: document[key] for document, _ in documents for key in ("model", "profile") if document.get(key) is not None}
    profile = upper.get("profile") or ("demo" if upper.get("model", "demo") == "demo" else "standard")
    if not isinstance(profile, str) or profile not in PROFILES:
        raise UsageError(unknown("profile", profile, PROFILES))
    draft = Draft(merged(PROFILES[profile], {} if path is None else {"name": path.stem}), FIELDS)
    for document, origin in documents:
        draft.lay(document, origin)
        overlay = mapping_of(document.get("profiles"), f"{origin}: profiles").get(profile)
        inner = f"{origin}: profiles.{profile}"
        draft.lay(document_of(mapping_of(overlay, inner), inner, FIELDS, inner=True), origin)
    if not draft.stages:
        raise UsageError("the recipe has no stages; give it a list, as in stages: [{quantize: {method: gptq, bits: 4}}]")
    return _checked(draft.fields | {"profile": profile}), draft


def _checked(fields: Mapping[str, Any]) -> Recipe:
    fields = dict(fields)
    for key in ("model", "teacher"):
        fields[key] = absolute(fields.get(key, Recipe.model_fields[key].default))
    if isinstance(fields.get("data"), Mapping):
        fields["data"] = {use: _absolute_sources(source) for use, source in fields["data"].items()}
    if isinstance(fields.get("evaluation"), Mapping):
        fields["evaluation"] = dict(fields["evaluation"])
        for key, made in (("also", _absolute_source), ("tasks", _absolute_task)):
            if isinstance(named := fields["evaluation"].get(key), list | tuple):
                fields["evaluation"][key] = [made(source) for source in named]
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "extra_forbidden":
            section = Recipe.model_fields[str(first["loc"][0])].annotation
            raise UsageError(f"{first['loc'][0]}: {unknown('key', first['loc'][-1], getattr(section, 'model_fields', {}))}") from error
        raise UsageError(complaint(Recipe, fields, error).removeprefix(".")) from error


def _absolute_source(source: object) -> Any:
    return source if isinstance(source, str) and source in NAMED else absolute(source)


def _absolute_task(task: object) -> Any:
    return absolute(task) if isinstance(task, str) and task.endswith(".jsonl") else task


def _absolute_sources(text: object) -> Any:
    try:
        return with_sources(text, _absolute_source) if isinstance(text, str) else text
    except ValueError:  # refused where it is validated
        return text


def _recipe_path(name_or_path: str) -> Path:
    packaged = RECIPES / f"{name_or_path}.yaml"
    if re.fullmatch(r"[\w-]+", name_or_path) and packaged.is_file():
        return packaged
    if name_or_path.endswith((".yaml", ".yml")) or Path(name_or_path).is_file():
        return Path(name_or_path)
    raise UsageError(f"{unknown('recipe', name_or_path, known_recipes())}, or the path of a .yaml file")
