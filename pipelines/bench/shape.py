"""`pipeline bench compress --shape NAME [--blocks N]`: a model of real size and random weights through every quantizer, through `best`, and
through training steps of `scales` and `lora`; what a block takes of time and of both memories.

All rows share one run directory, so that what they have in common runs once; each is a process of its own, whose host peak is the high-water
mark of its resident memory, imports included. Knows runs; the model is `synthetic`'s, a step is `training_step`'s.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...reports.json_values import integer, real
from ..devices.compute import Compute, chosen_device, determinism
from ..errors import PipelineError, UsageError
from ..recipes.settings import unknown
from ..recipes.stage_settings import StageSpec, methods
from .scaling import BRIEF, Row, Settings, Text, made, peak_resident_bytes, recipe_document, work_directory
from .synthetic import SHAPES, Shape

log = logging.getLogger(__name__)

STANDARD: Text = {"calibration": {"samples": 128, "seq_len": 2048}, "evaluation": {"seq_len": 512, "windows": 2}}
SMALL: Text = {"calibration": {"samples": 8, "seq_len": 512}, "evaluation": {"seq_len": 512, "windows": 2}}
ROWS = (*(("quantize", name) for name in methods("quantize")), ("decompose", "best"), ("recover", "scales"), ("recover", "lora"))
SETTINGS: dict[str, Settings] = {
    **BRIEF, "best": {"rank": 8}, **{name: {"steps": 2, "batch_size": 1, "seq_len": 2048, "loss": "both"} for name in ("scales", "lora")},
}  # fmt: skip
BEFORE: dict[str, list[dict[str, Settings]]] = {
    "quantize": [],
    **{name: [{"quantize": {"method": "gptq"}}] for name in ("decompose", "recover")},
}
MODULE = f"{__package__}.shape"
Launch = Callable[[Sequence[str], Path], Row]
"""(arguments of this module's `main`, the file it answers in) → that file's object, or {"error"}."""


@dataclass(frozen=True)
class Bench:
    """What is measured, and where its files lie."""

    name: str
    shape: Shape
    text: Text
    device: str
    place: Path

    def model(self) -> tuple[Path, int]:
        return made(self.place / f"{self.name}-{self.shape.blocks}-blocks", self.shape, self.text)

    def row(self, stage: str, method: str, launch: Launch) -> Row:
        """A row of the table; one with "error" where the program refused or its process died."""
        model, parameters = self.model()
        settings = SETTINGS.get(method, {})
        if stage == "recover":
            settings = settings | {"seq_len": min(integer(settings["seq_len"]), self.text["calibration"]["seq_len"])}
        stages = [*BEFORE[stage], {stage: {"method": method} | settings}]
        recipe = self.place / f"{model.name}-{stage}-{method}.json"
        recipe.write_text(json.dumps(recipe_document(model, self.text, stages)), encoding="utf-8")
        answer = recipe.with_suffix(".answer.json")
        result = launch([str(recipe), str(self.place / f"run-{model.name}"), self.device, str(answer)], answer)
        shown = {"stage": stage, "method": method, "shape": self.name, "blocks": self.shape.blocks, "parameters": parameters}
        if "seconds" in result:
            shown["seconds_per_block"] = real(result["seconds"]) / self.shape.blocks
        row = shown | ({"steps": settings["steps"]} if method in BRIEF else {}) | result
        (log.warning if "error" in row else log.info)("%s, %s: %s", method, self.name, result)
        return row


def of_shape(name: str, blocks: int | None, only: Sequence[str], device: str, output: Path | None) -> list[Row]:
    """A row for each (stage, method). UsageError for a shape or a method that is not known."""
    if name not in SHAPES:
        raise UsageError(f"--shape: {unknown('shape', name, SHAPES)}")
    known = [method for _, method in ROWS]
    for method in only:
        if method not in known:
            raise UsageError(f"bench compress --shape: {unknown('method', method, known)}")
    shape = SHAPES[name] if blocks is None else replace(SHAPES[name], blocks=blocks)
    with work_directory(output, f"shape-{name}") as place:
        bench = Bench(name, shape, SMALL if name == "1b" else STANDARD, device, place)
        return [bench.row(stage, method, in_a_process) for stage, method in ROWS if not only or method in only]


def in_a_process(arguments: Sequence[str], answer: Path) -> Row:
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-P", "-m", MODULE, *arguments]
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, cwd=answer.parent, env=os.environ, check=False)
    if not answer.is_file():
        return {"error": f"the process ended with {ended.returncode}" + (" (out of memory?)" if ended.returncode == -9 else "")}
    return json.loads(answer.read_text())


# -- the process of one row ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Run the recipe, or all of it but its recovery and then steps of that; write the results, with both peaks, to the answer."""
    recipe, directory, device, answer = arguments
    try:
        result = _measured(recipe, Path(directory), device)
    except PipelineError as error:
        result = {"error": str(error)}
    Path(answer).write_text(json.dumps(result), encoding="utf-8")
    return 0


def _measured(recipe: str, directory: Path, device: str) -> Row:
    from ..recipes.recipe import resolve
    from ..run import runner

    resolved = resolve(recipe)
    last = resolved.stages[-1]
    if last.name == "recover":
        runner.run(resolved, directory, device=device, until_stage=resolved.stages[-2].address)
        return _steps(directory, last, chosen_device(device))
    made = runner.run(resolved, directory, device=device).stages
    fields = ("seconds", "total_bytes", "bits_per_weight", "perplexity")
    result = {name: getattr(made[-1], name) for name in fields} | {"baseline_perplexity": made[0].perplexity}
    on_card = chosen_device(device).type == "cuda"
    return result | {"device_peak_bytes": made[-1].peak_bytes if on_card else None, "host_peak_bytes": peak_resident_bytes()}


def _steps(directory: Path, spec: StageSpec, device: torch.device) -> Row:
    """Seconds of a step, in the run's dtype and as deterministic; a block's are the difference to a step on half of the blocks, what remains is the head's."""
    from ..models.source import load_config
    from ..models.structure import inspect, skeleton
    from ..run import runner
    from .training_step import step_seconds

    parent = runner.last_artifact(directory, "quantize")
    blocks = inspect(skeleton(load_config(parent.directory))).blocks
    kept = json.loads((directory / "environment.json").read_text())
    compute = Compute(device, getattr(torch, kept["dtype"]), kept["deterministic"])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with determinism(compute):
        result: Row = {**step_seconds(parent, [spec], device, 2, compute.dtype)[spec.method]}
        peaks = {"device_peak_bytes": _device_peak(device), "host_peak_bytes": peak_resident_bytes()}
        if blocks > 1:
            half = step_seconds(parent, [spec], device, 2, compute.dtype, blocks // 2)[spec.method]
            result["seconds_per_block"] = (real(result["seconds_per_step"]) - real(half["seconds_per_step"])) / (blocks - blocks // 2)
    return result | peaks


def _device_peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
