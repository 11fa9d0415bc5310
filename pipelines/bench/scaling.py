"""`pipeline bench compress --depths`: whole runs on models made on the spot, each in a process of its own.

What is to be seen: seconds grow with the number of blocks, memory does not. Peak memory is the high-water mark of the process's resident
memory, everything included: imports, the model's import, the stage, its measurement. What `shape` runs, runs in such processes too.
"""

import json
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from ...reports.json_values import integer, mapping, mappings, real
from ..errors import PipelineError
from ..store.files import scratch_directory
from .synthetic import Shape, write_model, write_text

log = logging.getLogger(__name__)

SMALL = Shape(0, 512, 1408, 8, 4, 2048)
"""Of the models that differ in their number of blocks only."""
Text = dict[str, dict[str, int]]
Row: TypeAlias = dict[str, object]
"""A line of a benchmark's table, or what a process answered, as JSON holds it."""
Settings: TypeAlias = dict[str, object]
"""Of a stage."""
TEXT: Text = {"calibration": {"samples": 16, "seq_len": 256}, "evaluation": {"seq_len": 256, "windows": 4}}
METHODS = ("gptq",)
BRIEF: dict[str, Settings] = {name: {"steps": 20} for name in ("learned_rounding", "block_training")}
"""Settings of methods that train a block: their time is that of their steps."""
Launch = Callable[[Path, Path, str], Row]
"""(recipe file, run directory, device) → {"record", "peak_bytes"} or {"error"}."""


def by_depth(
    depths: Sequence[int], rows: Sequence[tuple[str, str]], device: str, output: Path | None, launch: "Launch | None" = None
) -> list[Row]:
    """A row for each (stage, method) and number of blocks."""
    out = []
    with work_directory(output, "depths") as place:
        for depth in depths:
            model, parameters = made(place / f"blocks-{depth}", replace(SMALL, blocks=depth), TEXT)
            for stage, method in rows:
                result = _run(place, model, stage, method, device, launch or in_a_process)
                if "seconds" in result:
                    result["seconds_per_block"] = real(result["seconds"]) / depth
                out.append({"stage": stage, "method": method, "blocks": depth, "parameters": parameters} | result)
                log.info("%s, %d blocks: %s", method, depth, result)
    return out


def growth(rows: Sequence[Row]) -> list[Row]:
    """Per method: the straight line through seconds against blocks, how far a point lies off it, and how far apart peak memories are."""
    out = []
    for method in dict.fromkeys(row["method"] for row in rows):
        points = [
            (integer(row["blocks"]), real(row["seconds"]), integer(row["peak_bytes"]))
            for row in rows
            if row["method"] == method and "seconds" in row
        ]
        if len({blocks for blocks, _, _ in points}) < 2:
            continue
        mean_x, mean_y = (sum(p[i] for p in points) / len(points) for i in (0, 1))
        slope = sum((x - mean_x) * (y - mean_y) for x, y, _ in points) / sum((x - mean_x) ** 2 for x, _, _ in points)
        off = max(abs(y - (mean_y + slope * (x - mean_x))) / y for x, y, _ in points)
        peaks = [peak for _, _, peak in points]
        out.append(
            {
                "method": method,
                "seconds_per_block": slope,
                "seconds_beside": mean_y - slope * mean_x,
                "largest_deviation": off,
                "peak_growth": max(peaks) / min(peaks) - 1,
            }
        )
    return out


@contextmanager
def work_directory(output: Path | None, name: str) -> Iterator[Path]:
    """A directory for models and runs: under `output` and kept, or temporary without one."""
    if output is None:
        with scratch_directory() as scratch:
            yield scratch
    else:
        (output / name).mkdir(parents=True, exist_ok=True)
        yield output / name


def made(directory: Path, shape: Shape, text: Text) -> tuple[Path, int]:
    """A model of this shape with text enough for its calibration, and its number of parameters; written once."""
    done = directory / "parameters.json"
    if not done.is_file():
        parameters = write_model(directory, shape)
        calibration = text["calibration"]
        write_text(directory / "text.jsonl", shape.vocabulary, 8 * calibration["samples"] * calibration["seq_len"])
        done.write_text(json.dumps(parameters))
    return directory, json.loads(done.read_text())


def recipe_document(model: Path, text: Text, stages: list[dict[str, Settings]]) -> dict[str, object]:
    """A recipe on what `made` wrote."""
    source = str(model / "text.jsonl")
    data = {"calibration": source, "train": source, "evaluation": source}
    return {"name": "bench", "model": str(model), "data": data, **text, "stages": stages}


def _run(place: Path, model: Path, stage: str, method: str, device: str, launch: Launch) -> Row:
    recipe = place / f"{model.name}-{stage}-{method}.yaml"
    stages = [{stage: {"method": method} | BRIEF.get(method, {})}]
    recipe.write_text(json.dumps(recipe_document(model, TEXT, stages)), encoding="utf-8")
    result = launch(recipe, place / f"run-{model.name}-{stage}-{method}", device)
    if "error" in result:
        log.warning("%s %s: %s", stage, method, result["error"])
        return result
    stages_done = mappings(mapping(result["record"])["stages"])
    baseline, last = stages_done[0], stages_done[-1]
    fields = ("seconds", "total_bytes", "bits_per_weight", "perplexity")
    return {"peak_bytes": result["peak_bytes"], **{name: last[name] for name in fields}, "baseline_perplexity": baseline["perplexity"]}


def in_a_process(recipe: Path, directory: Path, device: str) -> Row:
    """The run in a process of its own, which says what it was at most."""
    answer = directory.with_suffix(".json")
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-P", "-m", f"{__package__}.scaling", str(recipe), str(directory), device, str(answer)]
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, cwd=recipe.parent, env=os.environ, check=False)
    if not answer.is_file():
        return {"error": f"the process ended with {ended.returncode}" + (" (out of memory?)" if ended.returncode == -9 else "")}
    return json.loads(answer.read_text())


def peak_resident_bytes() -> int:
    """The most resident memory this process has had; what a parent had when it forked does not count."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_and_answer(recipe: str, directory: str, device: str, answer: str) -> None:
    """What the process does."""
    from ..recipes.recipe import resolve
    from ..run import runner

    try:
        record = runner.run(resolve(recipe), Path(directory), device=device)
        result: Row = {"record": record.to_json(), "peak_bytes": peak_resident_bytes()}
    except PipelineError as error:
        result = {"error": str(error)}
    Path(answer).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    run_and_answer(*sys.argv[1:])
