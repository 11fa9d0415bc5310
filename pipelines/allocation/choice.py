"""The allocation chosen for a budget: one setting per matrix, from a table of errors, stored in the table's directory, and applied to the stages.

Knows a table and costs; not where they come from (`error_tables`, `allocation`), nor how the program is solved (`compress/allocate`).
Legend: M matrices, K settings, V views of an error (as it is; weighed by the loss's gradient).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...compress.allocate import InfeasibleBudget, choose
from ...compress.ggml_types import GGML_TYPES
from ...compress.options import Grid, Setting, overrides
from ...reports.record import StageRecord
from ..errors import UsageError
from ..models.sizes import sizes_before
from ..recipes.recipe import Recipe
from ..recipes.stage_settings import StageSpec
from ..stages.context import Context
from ..store.artifact import Artifact
from ..store.files import read_json, write_json
from .error_tables import ErrorTable, build
from .spending import Costs, Spent, costs, infeasible, settings_of, spent

VERSION = 1
"""Rises when a fix makes another choice of the same table."""


@dataclass(frozen=True)
class ChosenSetting:
    """What one matrix was given, what it stores, and what was predicted: losses (weighed, as they are summed) and relative output
    errors, with the low-rank term and for Q alone. Of a matrix outside the blocks, `key` is the setting of quantize that says its bits, and `tied`
    whether it is both ends of the model."""

    name: str
    setting: Setting
    bytes: int
    predicted_loss: float
    predicted_error: float
    predicted_loss_q: float
    predicted_error_q: float
    key: Literal["embedding_bits", "head_bits"] | None = None
    tied: bool = False


@dataclass(frozen=True)
class Choice:
    """What the integer program chose, and from what. `stored` is in the budget's unit, at the end of the run; `settings` counts those
    that were left once the dominated ones were gone; seconds: of the program alone, and of the table."""

    budget: str
    weighting: str
    rows: list[ChosenSetting]
    settings: int
    stored: str
    stored_bytes: int
    total_loss: float
    gap: float
    seconds: float
    table_seconds: float
    note: str | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Choice":
        rows = [
            ChosenSetting(**{**row, "setting": Setting(**{**row["setting"], "grid": Grid(**row["setting"]["grid"])})})
            for row in data["rows"]
        ]
        return cls(**{**data, "rows": rows})


def choice_path(recipe: Recipe, directory: Path) -> Path:
    """The file of this recipe's choice, in the directory of the table it is made from."""
    budget, allocation = recipe.budget.text if recipe.budget else None, recipe.allocation.model_dump(mode="json", exclude_none=True)
    identity = json.dumps([VERSION, budget, allocation, [s.settings() for s in recipe.stages]], sort_keys=True, default=str)
    return directory / f"choice-{hashlib.sha256(identity.encode()).hexdigest()[:8]}.json"


def read_choice(path: Path) -> Choice | None:
    return Choice.from_json(read_json(path, "delete it and resume")) if path.is_file() else None


def spend(recipe: Recipe, parent: Artifact, directory: Path, context: Context) -> Choice:
    """Build the table in `directory`, or go on with it, choose, and keep the choice. UsageError names the smallest feasible budget."""
    stages = spent(recipe)
    counted = costs(recipe, stages, sizes_before(parent))
    table = build(directory, parent, stages, settings_of(recipe, stages), counted.outside, recipe.allocation, context)
    made = choose_settings(recipe, stages, counted, table)
    write_json(choice_path(recipe, directory), asdict(made))
    return made


def choose_settings(recipe: Recipe, stages: Spent, counted: Costs, table: ErrorTable) -> Choice:
    """Solve the integer program for this table."""
    losses_MK = losses(table, recipe.allocation.weighting)
    limit, usable = stages.budget.bytes_for(counted.weights, counted.rest_bytes), np.isfinite(counted.bytes_MK)
    try:
        result = choose(np.where(usable, counted.bytes_MK, 0.0), np.where(usable, losses_MK, np.inf), limit)
    except InfeasibleBudget as error:
        raise UsageError(infeasible(recipe, stages, counted)) from error
    alone = {setting.grid: k for k, setting in enumerate(counted.settings) if not setting.rank}
    outside = {each.site.name: each for each in counted.outside}
    rows = []
    for m, k in enumerate(result.choice):
        setting = counted.settings[k]
        errors, lost = (table.relative_MVK[m, 0] ** 0.5).tolist(), losses_MK[m].tolist()
        q = alone[setting.grid]
        name, stored_bytes = counted.sites[m].name, round(counted.bytes_MK[m, k])
        row = ChosenSetting(name, setting, stored_bytes, lost[k], errors[k], lost[q], errors[q])
        rows.append(replace(row, key=outside[name].key, tied=outside[name].tied) if name in outside else row)
    most, stored = (stages.budget.text_of(n, counted.weights, counted.rest_bytes) for n in (counted.largest, result.total_bytes))
    note = f"the budget {stages.budget.text} is above all that the choices of `allocation` can store ({most}): every matrix got what errs least"
    measured = (result.settings, stored, result.total_bytes, result.total_loss, result.gap, result.seconds, table.seconds)
    return Choice(stages.budget.text, recipe.allocation.weighting, rows, *measured, note if limit > counted.largest else None)


def losses(table: ErrorTable, weighting: str) -> NDArray[np.float64]:
    """What is summed and made least, [M, K]. A matrix that no token reached, or whose outputs the loss does not feel, weighs what the
    middle one of the others does."""
    view = 1 if weighting == "fisher" else 0
    if weighting == "relative":
        return table.relative_MVK[:, view]
    energy_M = table.energy_MV[:, view]
    middle = float(np.median(energy_M[energy_M > 0])) if bool((energy_M > 0).any()) else 1.0
    return table.relative_MVK[:, view] * np.where(energy_M > 0, energy_M, middle)[:, None]


def resolved(recipe: Recipe, stages: Spent, chosen: Choice) -> list[StageSpec]:
    """The recipe's stages with the choice as overrides, one for each setting that was given, and as the bits of what lies outside the blocks; a
    stage that is left nothing to do is left out."""
    blocks, outside = [row for row in chosen.rows if row.key is None], {row.key: row.setting.grid.bits for row in chosen.rows if row.key}
    out = []
    for spec in recipe.stages:
        if spec.address not in stages.addresses:
            out.append(spec)
            continue
        groups: dict[str, list[str]] = {}
        idle = [row.name for row in blocks if spec.name not in overrides(row.setting)]
        for row in blocks:
            if spec.name in (given := overrides(row.setting)):
                groups.setdefault(json.dumps(given[spec.name]), []).append(row.name)
        if groups:
            more = {exactly(names): json.loads(given) for given, names in groups.items()}
            ignore = (*spec.ignore, exactly(idle)) if idle else spec.ignore
            changes = outside if spec.name == stages.quantize.name else {}
            out.append(replace(spec, overrides={**spec.overrides, **more}, ignore=ignore, **changes))
    return out


def exactly(names: Iterable[str]) -> str:
    """A regular expression that finds these names and no other."""
    return f"^(?:{'|'.join(re.escape(name) for name in names)})$"


# -- in the report -----------------------------------------------------------------------------------------------------------------


def explained(made: StageRecord, chosen: Choice, recipe: Recipe, before: Sequence[StageRecord]) -> StageRecord:
    """The record of a stage that the budget chose for, with what every matrix was given and the losses predicted and measured.

    The measured loss is the predicted one times (measured / predicted squared output error): the same weighting of the measured error.
    A matrix that the stage left alone has the error that the stage before left it. One that is embeddings and head has neither a predicted error
    nor a measured loss: the stage measures the rows that are looked up, and what was predicted is of logits as well.
    """
    stages = spent(recipe)
    if made.stage not in (stages.quantize.address, getattr(stages.decompose, "address", None)):
        return made
    rows, whole = {row.name: row for row in chosen.rows}, made.stage != stages.quantize.address
    earlier = {layer.name: layer.relative_output_error for layer in before[-1].layers} if whole else {}
    layers = []
    for layer in made.layers:
        if (row := rows.get(layer.name)) is not None:
            error = earlier.get(layer.name) if layer.relative_output_error is None else layer.relative_output_error
            layer = replace(layer, relative_output_error=error, metrics={**layer.metrics, **_explained(row, whole, error)})
        layers.append(layer)
    facts = {key: value for key, value in asdict(chosen).items() if key not in ("rows", "note")}
    notes = (*made.notes, chosen.note) if chosen.note and chosen.note not in made.notes else made.notes
    return replace(made, layers=tuple(layers), metrics={**made.metrics, "allocation": facts}, notes=notes)


def _explained(row: ChosenSetting, whole: bool, measured_error: float | None) -> dict[str, object]:
    setting = row.setting
    loss, error = (row.predicted_loss, row.predicted_error) if whole else (row.predicted_loss_q, row.predicted_error_q)
    given = {"bits": setting.grid.bits, "group_size": setting.grid.group_size, "bytes": row.bytes}
    given |= {"grid": setting.grid.kind} if setting.grid.kind in GGML_TYPES else {}
    given |= {"factor_bits": setting.factor_bits} if setting.rank and whole else {}
    if row.tied:
        return {**given, "predicted_output_error": None, "predicted_loss": loss, "measured_loss": None}
    measured = loss * measured_error / error**2 if measured_error is not None and error > 0 else None
    return {**given, "predicted_output_error": error**2, "predicted_loss": loss, "measured_loss": measured}
