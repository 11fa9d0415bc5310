"""Reads a run's directory: its plan, its state, its record, and what may be deleted. Runs nothing.

Imports nothing heavy: `status`, `report show` and `gc` do not wait for torch.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...reports.record import RunRecord
from ..errors import InputError
from ..evaluation.scores import load_scores
from ..store.files import read_json, safetensors_metadata
from ..store.manifest import read_manifest, verify_files
from ..store.rundir import PARTS_META, TRAINING_PARTS, TRAINING_STATE, RunDirectory, finished_blocks


def status(directory: Path, verify: bool = False) -> dict[str, Any]:
    """What is done, what is under way (finished blocks or steps) and what is missing. With `verify` every file of every finished stage is
    hashed again: InputError names the first that is not as it was written."""
    place = RunDirectory(directory.resolve())
    last, rows = place.read(), []
    for row in last["stages"]:
        name, state = row["name"], place.state(row["name"])
        entry = {"stage": row["address"], "method": row["method"], "state": state, "directory": f"stages/{name}"}
        if verify and state == "done":
            final = place.artifact(name)
            verify_files(final, read_manifest(final), full=True)
        if state == "partial":
            entry["finished_parts"] = len(list(place.scratch(name).glob("*.part.json")))
            entry |= _training_step(place.scratch(name))
        scores = sorted(place.metrics(name).glob("????????.json"), key=lambda p: p.stat().st_mtime)
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


def _training_step(scratch: Path) -> dict[str, int]:
    """How far a training state has come; nothing where there is none."""
    path, parts = scratch / TRAINING_STATE, scratch / TRAINING_PARTS / PARTS_META
    if parts.is_file():
        return {"finished_steps": read_json(parts)["step"]}
    if not path.is_file():
        return {}
    try:
        return {"finished_steps": json.loads(safetensors_metadata(path)["meta"])["step"]}
    except (KeyError, ValueError):
        return {}


def _mean_perplexity(path: Path) -> float | None:
    result = load_scores(path)
    return result[0].perplexity if result else None


def record(directory: Path) -> RunRecord:
    """The record of a run as last measured. InputError when nothing was measured yet."""
    place = RunDirectory(directory.resolve())
    place.read()
    path = place.path / "record.json"
    if not path.is_file():
        raise InputError(f"{directory}: no stage has been measured yet; `pipeline resume {directory}` goes on")
    again = f"`pipeline resume {directory}` writes it anew"
    try:
        return RunRecord.from_json(read_json(path, again))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}; {again}") from error


def keep_plan(directory: Path) -> None:
    """What the run's plan names stays after another plan has taken its place: the points of a sweep, and the run that was swept."""
    place = RunDirectory(directory.resolve())
    if not (place.path / "run.json").is_file():
        return
    with place.held():
        last = place.read()
        kept = last.get("kept", {"stages": [], "allocations": []})
        names = {*kept["stages"], *(row["name"] for row in last["stages"] if place.artifact(row["name"]).is_dir())}
        tables = {*kept["allocations"], *([last["allocation"]] if "allocation" in last else [])}
        state = {key: value for key, value in last.items() if key not in ("schema", "program", "kept")}
        place.write({**state, "kept": {"stages": sorted(names), "allocations": sorted(tables)}})


_STAGE = re.compile(r"(\d\d-[a-z]+(\.\d+)?|teacher)-[0-9a-f]{8}(\.partial|\.metrics)?(\.removed)?")
_TABLE = re.compile(r"[0-9a-f]{8}")
_TORN = re.compile(r"\..+\.\d+")  # what `write_bytes` was writing when it was killed


def gc(directory: Path, dry_run: bool = False) -> dict[str, object]:
    """Drop what nothing names: stages of settings that are neither the last plan's nor a sweep's, their metrics, unfinished scratch
    directories, a teacher's states, torn files. What this program would not have named so is left, and named in `left`. With `dry_run`
    nothing is dropped."""
    place = RunDirectory(directory.resolve())
    place.read()
    with place.held():
        dropped, left = _garbage(place)
        freed = sum(_freed_bytes(path) for path in dropped)
        if not dry_run:
            for path in dropped:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            place.log("gc", dropped=[path.name for path in dropped], freed=freed)
    return {"dropped": [path.name for path in dropped], "freed_bytes": freed, "left": [path.name for path in left]}


def _garbage(place: RunDirectory) -> tuple[list[Path], list[Path]]:
    """(what is dropped, what is not the program's)."""
    last = place.read()
    kept = last.get("kept", {"stages": [], "allocations": []})
    wanted = {row["name"] for row in last["stages"]} | set(kept["stages"]) | {p.name for p in place.stages.glob("teacher-????????")}
    keep = wanted | {f"{name}.metrics" for name in wanted} | {f"{name}.partial" for name in wanted if not place.artifact(name).is_dir()}
    tables = {*kept["allocations"], last.get("allocation")}
    others = [path for path in (sorted(place.stages.iterdir()) if place.stages.is_dir() else []) if path.name not in keep]
    others += [path for path in sorted(place.path.glob("allocation/*")) if str(path.relative_to(place.path)) not in tables]
    made = {
        path
        for path in others
        if not path.is_symlink() and path.is_dir() and (_STAGE if path.parent == place.stages else _TABLE).fullmatch(path.name)
    }
    dropped = [path for path in others if path in made]
    if place.teacher_states.is_dir():
        dropped.append(place.teacher_states)
    torn = [*place.path.glob(".*"), *place.stages.glob("*/.*"), *place.path.glob("allocation/*/.*")]
    dropped += [path for path in torn if _TORN.fullmatch(path.name) and path.is_file() and path.parent not in made]
    return dropped, [path for path in others if path not in made]


def _freed_bytes(path: Path) -> int:
    """Of a file or of a directory's files; one that another stage links to as well stays on disk."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(f.stat().st_size for f in files if f.is_file() and f.stat().st_nlink == 1)
