"""What a run has left: its plan, its state, its record, its artifacts, and what may be dropped. Knows the directory; runs nothing."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ...reports.record import RunRecord
from .. import stages
from ..allocation.error_tables import finished_blocks
from ..errors import InputError
from ..evaluation.perplexity import load_scores
from ..planning.steps import Step
from ..store.artifact import Artifact, open_artifact
from ..store.rundir import RunDirectory


def status(directory: Path) -> dict[str, Any]:
    """What is done, what is under way (finished blocks or steps) and what is missing."""
    place = RunDirectory(directory.resolve())
    last, rows = place.read(), []
    for row in last["stages"]:
        step = Step(row["address"], row["method"], row["key"], row["name"], row["settings"])
        state = step.state(place)
        entry = {"stage": step.address, "method": step.method, "state": state, "directory": f"stages/{step.name}"}
        if state == "partial":
            entry["finished_parts"] = len(list(place.scratch(step.name).glob("*.part.json")))
            entry |= _training_step(place.scratch(step.name) / stages.STATE)
        scores = sorted(place.metrics(step.name).glob("????????.json"), key=lambda p: p.stat().st_mtime)
        if scores:
            entry["perplexity"] = _mean_perplexity(scores[-1])
        rows.append(entry)
    return {"run": place.path.name, "directory": str(place.path), **_table(place, last), "stages": rows}


def _table(place: RunDirectory, last: Mapping[str, Any]) -> dict[str, Any]:
    """How far the table of a budget is."""
    if "allocation" not in last:
        return {}
    directory = place.path / last["allocation"]
    made = "chosen" if all(row["key"] for row in last["stages"]) else "not chosen yet"
    return {"allocation": {"state": made, "finished_blocks": finished_blocks(directory), "directory": last["allocation"]}}


def _training_step(path: Path) -> dict[str, int]:
    """How far a training state has come; nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return {"finished_steps": json.loads((file.metadata() or {})["meta"])["step"]}
    except (SafetensorError, KeyError, ValueError):
        return {}


def _mean_perplexity(path: Path) -> float | None:
    found = load_scores(path)
    return found[0].perplexity if found else None


def record(directory: Path) -> RunRecord:
    """The record of a run as last measured. InputError when nothing was measured yet."""
    place = RunDirectory(directory.resolve())
    place.read()
    path = place.path / "record.json"
    if not path.is_file():
        raise InputError(f"{directory}: no stage has been measured yet; `pipeline resume {directory}` goes on")
    return RunRecord.from_json(json.loads(path.read_text()))


def last_artifact(directory: Path, stage: str | None = None) -> Artifact:
    """The artifact of a stage (by address), or the last finished one."""
    place = RunDirectory(directory.resolve())
    rows = [row for row in place.read()["stages"] if place.artifact(row["name"]).is_dir()]
    if stage is not None:
        rows = [row for row in rows if row["address"] == stage]
    if not rows:
        what = f"stage {stage!r}" if stage else "finished stage"
        raise InputError(f"{directory}: has no {what}; `pipeline status {directory}` lists what there is")
    return open_artifact(place.artifact(rows[-1]["name"]))


def gc(directory: Path) -> dict[str, Any]:
    """Drop what the last plan does not name: stages of other settings, their metrics, unfinished scratch directories, a teacher's states,
    torn files."""
    place = RunDirectory(directory.resolve())
    last = place.read()
    plan = last["stages"]
    with place.held():
        wanted = {row["name"] for row in plan} | {p.name for p in place.stages.glob("teacher-????????")}
        keep = wanted | {f"{name}.metrics" for name in wanted} | {f"{name}.partial" for name in wanted if not place.artifact(name).is_dir()}
        dropped, freed = [], 0
        for path in sorted(place.stages.iterdir()) if place.stages.is_dir() else []:
            if path.name not in keep:
                freed += sum(f.stat().st_size for f in path.rglob("*") if f.is_file() and f.stat().st_nlink == 1)
                shutil.rmtree(path)
                dropped.append(path.name)
        if place.teacher_states.is_dir():
            freed += sum(f.stat().st_size for f in place.teacher_states.rglob("*") if f.is_file())
            shutil.rmtree(place.teacher_states)
            dropped.append(place.teacher_states.name)
        for path in sorted(place.path.glob("allocation/*")):
            if str(path.relative_to(place.path)) != last.get("allocation"):
                freed += sum(f.stat().st_size for f in path.iterdir())
                shutil.rmtree(path)
                dropped.append(path.name)
        for path in [*place.path.glob(".*"), *place.stages.glob("*/.*"), *place.path.glob("allocation/*/.*")]:
            if re.fullmatch(r"\..+\.\d+", path.name):  # what `write_bytes` was writing when it was killed
                freed += path.stat().st_size
                path.unlink()
                dropped.append(path.name)
        place.log("gc", dropped=dropped, freed=freed)
    return {"dropped": dropped, "freed_bytes": freed}
