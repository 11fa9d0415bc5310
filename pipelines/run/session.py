"""The state of a run in progress: what its stages share, its recorded plan, and which stages a changed setting repeats."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from ..allocation.choice import Choice
from ..allocation.spending import spent
from ..devices.compute import Compute
from ..errors import UsageError
from ..evaluation.perplexity import batches
from ..planning.steps import Step, plan_steps, stored_choice
from ..ranks.exchange import ONE, SLOTS, Ranks
from ..recipes.recipe import Recipe
from ..recipes.stage_settings import methods
from ..stages.inputs import Inputs
from ..store.rundir import RunDirectory
from .signals import Stop

log = logging.getLogger("bitmend")


class StageAddresses(TypedDict, total=False):
    """Which of the stages that are there are done again from, which one is the last, which one is done again."""

    from_stage: str | None
    until_stage: str | None
    force: str | None


def given_addresses(
    from_stage: str | None = None, until_stage: str | None = None, force: str | None = None
) -> tuple[str | None, str | None, str | None]:
    """The three in order; TypeError for any other name."""
    return from_stage, until_stage, force


@dataclass
class Session:
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
    ranks: Ranks = ONE

    def log(self, event: str, **fields: object) -> None:
        """One line of log.jsonl, which one rank writes."""
        if self.ranks.leads:
            self.directory.log(event, **fields)

    def plan_and_share(self) -> None:
        """Rank 0's plan, on every rank: it follows from what lies on the disk."""
        if self.ranks.leads:
            plan_run(self)
        self.steps, self.table, self.choice = self.ranks.broadcast((self.steps, self.table, self.choice))


def plan_run(session: Session) -> None:
    """The steps as far as they are known, and the budget's choice if it was made."""
    chosen, inputs, compute, place = session.recipe, session.inputs, session.compute, session.directory
    session.steps = plan_steps(chosen, inputs.model, inputs, compute, place, session.ranks.size)
    if chosen.budget is not None:
        parent = session.steps[spent(chosen).first]
        session.table, session.choice = stored_choice(chosen, parent.key, inputs, compute, place)


def check_ranks(chosen: Recipe, inputs: Inputs, ranks: Ranks) -> None:
    """UsageError for ranks that would have nothing to do, with the number that has; a warning for those that idle while recovery trains."""
    if ranks.size == 1:
        return
    if ranks.size > SLOTS:
        raise UsageError(f"WORLD_SIZE {ranks.size}: the calibration text is shared out in {SLOTS} parts; start {SLOTS} processes or fewer")
    if any(inputs.reads_calibration(spec, methods(spec.name)[spec.method]) for spec in chosen.stages):
        samples, seq_len = chosen.calibration.samples, chosen.calibration.seq_len
        if (parts := len(list(batches(samples, seq_len)))) < ranks.size:
            each = next(batches(samples, seq_len)).stop
            raise UsageError(
                f"WORLD_SIZE {ranks.size}: calibration.samples {samples} of calibration.seq_len {seq_len} are {parts} batch{'es' * (parts > 1)}, so "
                f"that {ranks.size - parts} of the ranks would have none; start {parts}, or set calibration.samples to {each * (ranks.size - 1) + 1} or more"
            )
    for spec in chosen.stages:
        accumulation = getattr(spec.config, "accumulation", None)
        if accumulation is not None and accumulation < ranks.size:
            log.warning(
                "%s: %d micro-batch%s a step for %d ranks: the others wait while it trains; %s.accumulation=%d with a smaller %s.batch_size keeps all at work",
                spec.address, accumulation, "es" * (accumulation > 1), ranks.size, spec.address, ranks.size, spec.address,
            )  # fmt: skip
        windows = None if accumulation is not None or not hasattr(spec.config, "steps") else getattr(spec.config, "batch_size", None)
        if windows is not None and windows < ranks.size:
            log.warning(
                "%s: %d window%s a step for %d ranks: the others wait while it trains; %s.batch_size=%d keeps all at work",
                spec.address, windows, "s" * (windows > 1), ranks.size, spec.address, ranks.size,
            )  # fmt: skip


def take_up(session: Session) -> None:
    """Make these steps the plan of record, and say what it sends back to work."""
    if not session.ranks.leads:
        return
    place = session.directory
    announce(session.steps, session.before, session.compute, place)
    place.write_recipe(session.recipe.to_yaml())
    rows = [{"address": s.address, "method": s.method, "key": s.key, "name": s.name, "settings": s.settings} for s in session.steps]
    table = {} if session.table is None else {"allocation": str(session.table.relative_to(place.path))}
    computed = {"compute": session.compute.words()}
    kept = {"kept": session.before["kept"]} if "kept" in session.before else {}
    place.write({**kept, "stages": rows, "model": session.recipe.model, "recipe": session.recipe.name, **computed, **table})


def announce(steps: list[Step], before: Mapping[str, Any], compute: Compute, place: RunDirectory) -> None:
    """Say which stages a changed setting or another device sends back to work, and why; `before`: the last plan."""
    rows = {row["address"]: row for row in before["stages"]}
    moved = before.get("compute", compute.words()) != compute.words()
    for step in steps:
        old = rows.get(step.address)
        if (
            old is not None
            and step.key
            and old["key"] != step.key
            and place.state(step.name) != "done"
            and place.artifact(old["name"]).is_dir()
        ):
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
