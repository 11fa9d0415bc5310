"""The steps of a run: every stage with its key; keys of a budget's stages are known once its allocation is chosen.

key(stage) = hash(parent's key, stage, method, method version, settings, data fingerprint, device and dtype, schema). Reads text (for fingerprints), no weights
beyond their hashes.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from ..allocation.choice import Choice, choice_path, read_choice, resolved
from ..allocation.error_tables import table_key
from ..allocation.spending import outside, settings_of, spent
from ..devices.compute import Compute
from ..models.source import load_config
from ..models.structure import inspect, is_tied, skeleton
from ..recipes.recipe import Recipe
from ..recipes.stage_settings import StageSpec, methods
from ..stages.baseline import fingerprint
from ..stages.inputs import Inputs
from ..store.manifest import SCHEMA
from ..store.rundir import RunDirectory

log = logging.getLogger("bitmend")
SUMS = 2
"""Of the order in which sums over the calibration text are taken; rises when it changes."""
SAME_BITS = {"gradient_checkpointing": False, "shard": False}
"""Settings that decide memory and time, not results, and the value that stands for all of theirs in a key; where shards are added up in an order of their
own, the number of ranks is in it."""


@dataclass
class Step:
    """One stage of the plan."""

    address: str
    method: str | None
    key: str
    name: str  # directory name
    settings: dict[str, object]
    spec: StageSpec | None = None


def plan_steps(chosen: Recipe, source: Path, inputs: Inputs, compute: Compute, place: RunDirectory | None = None, ranks: int = 1) -> list[Step]:
    """Every stage; those that a budget chooses for, and all behind them, have no key until the choice lies in the run's directory."""
    model = fingerprint(source)
    steps = [Step("baseline", None, model, f"00-baseline-{model[:8]}", {"model": chosen.model})]
    stages = spent(chosen) if chosen.budget is not None else None
    specs = list(chosen.stages)
    if stages is not None:
        steps += _keyed(chosen, specs[: stages.first], inputs, compute, steps, ranks)
        _, choice = stored_choice(chosen, steps[-1].key, inputs, compute, place)
        if choice is None:
            return steps + [
                Step(spec.address, spec.method, "", f"{number:02d}-{spec.address}", spec.settings(), spec)
                for number, spec in enumerate(specs[stages.first :], stages.first + 1)
            ]
        specs = resolved(chosen, stages, choice)
    return [*steps[:1], *_keyed(chosen, specs, inputs, compute, steps[:1], ranks)]


def _keyed(chosen: Recipe, specs: list[StageSpec], inputs: Inputs, compute: Compute, before: list[Step], ranks: int) -> list[Step]:
    steps = list(before)
    for number, spec in enumerate(specs, 1):
        row = methods(spec.name)[spec.method]
        settings = spec.settings()
        decisive = settings | {name: value for name, value in SAME_BITS.items() if name in settings}
        identity = [SCHEMA, steps[-1].key, spec.name, spec.method, row.version, decisive, chosen.seed, inputs.fingerprint(spec, row)]
        identity += [{"sums": SUMS}] if inputs.reads_calibration(spec, row) else []
        identity += [{"ranks": ranks}] if getattr(spec.config, "shard", False) and ranks > 1 else []  # here alone it decides the last bits
        identity += [where] if (where := compute.identity()) else []
        key = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        steps.append(Step(spec.address, spec.method, key, f"{number:02d}-{spec.address}-{key[:8]}", settings, spec))
    return steps[len(before) :]


def stored_choice(
    chosen: Recipe, parent_key: str, inputs: Inputs, compute: Compute, place: RunDirectory | None
) -> tuple[Path, Choice | None]:
    """The directory of the budget's table, and the choice stored in it, if it was made."""
    stages = spent(chosen)
    settings, model = settings_of(chosen, stages), skeleton(load_config(inputs.model))
    structure = inspect(model, include_head=True)
    outside_blocks = outside(chosen, stages, structure, is_tied(model, structure))
    key = table_key(parent_key, inputs.calibration_fingerprint(), stages, settings, outside_blocks, chosen.allocation, compute.identity())
    directory = (place.path if place is not None else Path()) / "allocation" / key[:8]
    return directory, read_choice(choice_path(chosen, directory)) if place is not None else None
