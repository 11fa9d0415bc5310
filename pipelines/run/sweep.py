"""One recipe under every combination of some settings, in one run directory, compared in one table.

Stage directories are named by their keys, so combinations that agree up to a stage share it, and a sweep that was stopped goes
on where it was. A combination that fails is reported in its row; the others still run. Torch comes in with the first combination that is
resolved, after the directory is there.
"""

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...reports.record import RunRecord
from ..errors import PipelineError, UsageError
from ..recipes.recipe import Recipe, planned_directory, resolve
from .ledger import keep_plan

log = logging.getLogger(__name__)

TITLES = {
    "perplexity_ratio": "× baseline",
    "kl_to_baseline": "KL",
    "bits_per_weight": "bits/weight",
    "total_bytes": "size",
    "trainable_parameters": "trained",
    "seconds": "time",
    "within_budget": "in budget",
}


@dataclass(frozen=True)
class Point:
    """One combination: `settings` are its KEY → text of the value."""

    settings: dict[str, str]
    recipe: Recipe

    @property
    def label(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.settings.items())


@dataclass(frozen=True)
class Result:
    """What a combination came to: a reports RunRecord, or the error that stopped it."""

    point: Point
    record: RunRecord | None = None
    error: PipelineError | None = None

    def trainable(self) -> int | None:
        counts = (
            [stage.trainable_parameters for stage in self.record.stages if stage.trainable_parameters is not None] if self.record else []
        )
        return max(counts, default=None)

    def perplexity(self) -> float:
        value = self.record.stages[-1].perplexity if self.record and self.record.stages else None
        return float("inf") if value is None else value


@dataclass(frozen=True)
class SweepOutcome:
    """All combinations, best perplexity first; those above the limit of trainable parameters after the others."""

    results: tuple[Result, ...]
    max_trainable: int | None = None

    def within(self, result: Result) -> bool:
        return self.max_trainable is None or (result.trainable() or 0) <= self.max_trainable

    def ranked(self) -> list[Result]:
        return sorted(self.results, key=lambda result: (result.error is not None, not self.within(result), result.perplexity()))

    def rows(self) -> list[dict[str, Any]]:
        """One mapping a combination, ready for a table or JSON."""
        return [self._row(result) for result in self.ranked()]

    def _row(self, result: Result) -> dict[str, Any]:
        last = result.record.stages[-1] if result.record and result.record.stages else None
        fields = ("perplexity", "perplexity_ratio", "kl_to_baseline", "bits_per_weight", "total_bytes")
        row: dict[str, Any] = dict(result.point.settings) | {name: getattr(last, name, None) for name in fields}
        row["trainable_parameters"] = result.trainable()
        seconds = [stage.seconds for stage in result.record.stages if stage.seconds is not None] if result.record else []
        row["seconds"] = sum(seconds) if seconds else None
        if self.max_trainable is not None:
            row["within_budget"] = self.within(result) if result.record else None
        if any(other.error for other in self.results):
            row["error"] = str(result.error) if result.error else None
        return row

    def to_json(self) -> dict[str, object]:
        return {"schema": 1, "max_trainable_parameters": self.max_trainable, "runs": self.rows()}

    def raise_failure(self) -> None:
        """The first combination's error, if any failed; the count says how many."""
        failed = [result for result in self.results if result.error]
        if failed and failed[0].error:
            first = failed[0].error
            raise type(first)(f"{len(failed)} of {len(self.results)} combinations failed; {failed[0].point.label}: {first}")


def combinations(
    name: str, over: Sequence[str], *, file: Path | None = None, sets: Sequence[str] = (), options: Mapping[str, object] | None = None
) -> list[Point]:
    """Every combination of the `KEY=A,B,C` texts, each resolved and checked before anything runs."""
    return [Point(settings, resolve(name, file=file, sets=_assignments(sets, settings), options=options)) for settings in _product(over)]


def directory(
    name: str, over: Sequence[str], *, file: Path | None = None, sets: Sequence[str] = (), options: Mapping[str, object] | None = None
) -> Path:
    """runs/<recipe>-sweep: separate from the single run, so that its pages stay its own. Known before a method is looked up, which brings torch;
    UsageError as in `combinations`, but for the stages."""
    single = planned_directory(name, file=file, sets=_assignments(sets, _product(over)[0]), options=options)
    return single.with_name(f"{single.name}-sweep")


def _product(over: Sequence[str]) -> list[dict[str, str]]:
    """The KEY → value of every combination."""
    axes = [_axis(text) for text in over]
    keys = [key for key, _ in axes]
    if len(set(keys)) < len(keys):
        raise UsageError(f"--over names a setting twice: {', '.join(keys)}; give all its values in one list")
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(values for _, values in axes))]


def _assignments(sets: Sequence[str], settings: Mapping[str, str]) -> list[str]:
    return [*sets, *(f"{key}={value}" for key, value in settings.items())]


def trainable_limit(budget: str | None) -> int | None:
    """`200k` → 200000; None where the text is a size (3.0bpw, 60MB) or absent."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)([kM]?)", budget or "")
    return round(float(match[1]) * {"": 1, "k": 10**3, "M": 10**6}[match[2]]) if match else None


def sweep(
    points: Sequence[Point], directory: Path, *, device: str = "auto", max_trainable: int | None = None, jobs: int = 1
) -> SweepOutcome:
    """Run each combination in `directory`, up to `jobs` at once; each record and one page that compares them lie in its `sweep/`."""
    from ...reports.render import compare
    from . import runner

    results: list[Result] = []
    keep_plan(directory)
    failed = _side_by_side(points, directory, device, jobs) if jobs > 1 else {}
    for place, point in enumerate(points, start=1):
        log.info("combination %d of %d: %s", place, len(points), point.label)
        try:
            if place - 1 in failed:
                raise failed[place - 1]
            record = replace(runner.run(point.recipe, directory, device=device), run=point.label)
        except PipelineError as error:
            log.error("%s: %s", point.label, error)
            results.append(Result(point, error=error))
            continue
        _write(directory / "sweep" / f"{_file_name(point.label)}.json", json.dumps(record.to_json(), indent=1))
        keep_plan(directory)
        results.append(Result(point, record=record))
    if done := [result.record for result in results if result.record]:
        _write(directory / "sweep" / "compare.html", compare(done, "html"))
    return SweepOutcome(tuple(results), max_trainable)


def _side_by_side(points: Sequence[Point], directory: Path, device: str, jobs: int) -> dict[int, PipelineError]:
    """What is left to do of the combinations, by processes; the errors of those that failed, by number."""
    from . import runner, sweep_jobs

    first = points[0].recipe
    sweep_jobs.check_jobs(jobs, directory, first, device)
    try:
        runner.run(first, directory, until_stage="baseline", device=device, page=False)
    except PipelineError:
        return {}  # the error shows up again, combination by combination
    return sweep_jobs.made_ahead([(point.label, point.recipe) for point in points], directory, device, min(jobs, len(points)))


def _axis(text: str) -> tuple[str, list[str]]:
    """`recover.targets=[q, v],[o],all` → the key and its values, split at commas outside brackets and quotes."""
    key, equals, values = text.partition("=")
    parts = re.findall(r"""(?:[^,\[{"']|\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*')+""", values)
    if not equals or not key.strip() or not parts:
        raise UsageError(f"--over {text}: expected KEY=A,B,C, as in --over quantize.bits=3,4")
    return key.strip(), [part.strip() for part in parts]


def _file_name(label: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9=.-]+', '_', label)[:80]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
