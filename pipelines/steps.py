"""A run and its steps: every stage with its key, as far as they are known; a budget's stages are, once it has been spent.

key(stage) = hash(parent's key, stage, method, method version, settings, data fingerprint, device and dtype, schema). Reads text (for fingerprints), no weights
beyond their hashes.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .allocation import settings_of, spent
from .artifact import SCHEMA, write_bytes
from .choosing import Choice, choice_path, read_choice, resolved
from .devices import Compute
from .error_tables import table_key
from .inputs import Inputs
from .ledger import Step
from .recipe import Recipe
from .rundir import RunDirectory
from .stage_settings import StageSpec, methods
from .surroundings import Stop

log = logging.getLogger("bitmend")
SAME_BITS = {"gradient_checkpointing": False}
"""Settings that decide memory and time, not results, and the value that stands for all of theirs in a key."""


@dataclass
class Run:
    """A run under way, with everything the stages share. `before`: run.json as the last command left it; `table`: where a budget's table of errors
    lies or will, `choice` what was made of it."""

    recipe: Recipe
    directory: RunDirectory
    compute: Compute
    inputs: Inputs
    stop: Stop
    before: Mapping[str, Any]
    steps: list[Step] = field(default_factory=list)
    warnings: dict[str, str] = field(default_factory=dict)
    table: Path | None = None
    choice: Choice | None = None


def plan_steps(chosen: Recipe, source: Path, inputs: Inputs, compute: Compute, place: RunDirectory | None = None) -> list[Step]:
    """Every stage; those that a budget chooses for, and all behind them, have no key until the choice lies in the run's directory."""
    from .stages.baseline import fingerprint

    model = fingerprint(source)
    steps = [Step("baseline", None, model, f"00-baseline-{model[:8]}", {"model": chosen.model})]
    stages = spent(chosen) if chosen.budget is not None else None
    specs = list(chosen.stages)
    if stages is not None:
        steps += _keyed(chosen, specs[: stages.first], inputs, compute, steps)
        _, found = found_choice(chosen, steps[-1].key, inputs, compute, place)
        if found is None:
            return steps + [
                Step(spec.address, spec.method, "", f"{number:02d}-{spec.address}", spec.settings(), spec)
                for number, spec in enumerate(specs[stages.first :], stages.first + 1)
            ]
        specs = resolved(chosen, stages, found)
    return [*steps[:1], *_keyed(chosen, specs, inputs, compute, steps[:1])]


def _keyed(chosen: Recipe, specs: list[StageSpec], inputs: Inputs, compute: Compute, before: list[Step]) -> list[Step]:
    steps = list(before)
    for number, spec in enumerate(specs, 1):
        row = methods(spec.name)[spec.method]
        settings = spec.settings()
        decisive = settings | {name: value for name, value in SAME_BITS.items() if name in settings}
        identity = [SCHEMA, steps[-1].key, spec.name, spec.method, row.version, decisive, chosen.seed, inputs.fingerprint(spec, row)]
        identity += [where] if (where := compute.identity()) else []
        key = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        steps.append(Step(spec.address, spec.method, key, f"{number:02d}-{spec.address}-{key[:8]}", settings, spec))
    return steps[len(before) :]


def found_choice(
    chosen: Recipe, parent_key: str, inputs: Inputs, compute: Compute, place: RunDirectory | None
) -> tuple[Path, Choice | None]:
    """Where the budget's table lies (or will), and the choice beside it, if it was made."""
    stages = spent(chosen)
    settings = settings_of(chosen, stages)
    key = table_key(parent_key, inputs.calibration_fingerprint(), stages, settings, chosen.allocation.weighting, compute.identity())
    directory = (place.path if place is not None else Path()) / "allocation" / key[:8]
    return directory, read_choice(choice_path(chosen, directory)) if place is not None else None


def plan_run(under_way: Run) -> None:
    """The steps as far as they are known, and the budget's choice if it was made."""
    chosen, inputs, compute, place = under_way.recipe, under_way.inputs, under_way.compute, under_way.directory
    under_way.steps = plan_steps(chosen, inputs.model, inputs, compute, place)
    if chosen.budget is not None:
        parent = under_way.steps[spent(chosen).first]
        under_way.table, under_way.choice = found_choice(chosen, parent.key, inputs, compute, place)


def take_up(under_way: Run) -> None:
    """Make these steps the plan of record, and say what it sends back to work."""
    place = under_way.directory
    announce(under_way.steps, under_way.before, under_way.compute, place)
    write_bytes(place.recipe, under_way.recipe.to_yaml().encode())
    rows = [{"address": s.address, "method": s.method, "key": s.key, "name": s.name, "settings": s.settings} for s in under_way.steps]
    table = {} if under_way.table is None else {"allocation": str(under_way.table.relative_to(place.path))}
    computed = {"compute": under_way.compute.words()}
    place.write({"stages": rows, "model": under_way.recipe.model, "recipe": under_way.recipe.name, **computed, **table})


def announce(steps: list[Step], before: Mapping[str, Any], compute: Compute, place: RunDirectory) -> None:
    """Say which stages a changed setting or another device sends back to work, and why; `before`: the last plan."""
    rows = {row["address"]: row for row in before["stages"]}
    moved = before.get("compute", compute.words()) != compute.words()
    for step in steps:
        old = rows.get(step.address)
        if old is not None and step.key and old["key"] != step.key and step.state(place) != "done" and place.artifact(old["name"]).is_dir():
            changes = [_change(k, old["settings"].get(k), v) for k, v in step.settings.items() if old["settings"].get(k) != v]
            if old["method"] != step.method:
                changes.insert(0, f"method {old['method']} → {step.method}")
            if moved:
                changes.insert(0, f"computed on {before['compute']} before, on {compute.words()} now")
            why = ", ".join(changes) or "a stage before it, its data or the program changed"
            log.info("%s: %s; it is done again, the earlier result stays in %s", step.address, why, old["name"])


def _change(key: str, old: object, new: object) -> str:
    """What may name hundreds of matrices is not written out."""
    return f"{key} changed" if key in ("overrides", "ignore") else f"{key} {old} → {new}"
