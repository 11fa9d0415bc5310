"""`pipeline bench generate`: tokens a second and resident bytes of a compressed model against its dense self.

Knows runs and loaded models; how speed is measured is `speed`.
"""

import logging
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
import transformers

from ...kernels.choices import device_name
from ...kernels.timing import clocks
from ..devices.compute import chosen_device
from ..errors import UsageError
from ..evaluation.speed import measure, resident_bytes
from ..recipes.recipe import resolve
from .kernel_tables import short_name
from .scaling import Row, Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

RECIPES: Mapping[str, list[dict[str, Settings]]] = {
    "4 bits, rank 16": [
        {"quantize": {"method": "rtn", "bits": 4, "group_size": 64}}, {"decompose": {"method": "zeroquant_v2", "rank": 16}}, {"fuse": {}},
    ],
    "4 bits, rank 16, 8-bit embeddings": [
        {"quantize": {"method": "rtn", "bits": 4, "group_size": 64, "include_embeddings": True}},
        {"decompose": {"method": "zeroquant_v2", "rank": 16}}, {"fuse": {}},
    ],
}  # fmt: skip
"""Compressed models that generate against the dense one: speed does not depend on how codes and factors were chosen, so the quickest methods make them."""
PROMPTS = (32, 512)
NEW_TOKENS = 32
PATIENCE = 2.0  # seconds: a model that reads the short prompt more slowly is not measured on the long one
TEXT = "The river rises in the hills to the north of the town and flows through a wide valley of fields and woods to the sea. "


class SpeedReport(TypedDict):
    """What the benchmark gives and writes."""

    schema: int
    bench: str
    environment: dict[str, object]
    rows: list[Row]


def generate(device: str, model: str | None, repeats: int, output: Path | None) -> SpeedReport:
    """Tokens a second of compressed and dense models, the same prompt, each model in turn. `model`: a run directory, whose last stage
    writes against its baseline; or anything that names a model (default: demo), which is compressed first, by RECIPES."""
    place = chosen_device(device)
    models, words = _models(place, model, (output or Path("runs")) / "bench-generate")
    speeds = {PROMPTS[0]: measure(models, words[:, : PROMPTS[0]], NEW_TOKENS, repeats)}
    patient = {name: model for name, model in models.items() if speeds[PROMPTS[0]][name].prompt_seconds <= PATIENCE}
    speeds[PROMPTS[1]] = measure(patient, words, NEW_TOKENS, repeats)
    dense = next(resident_bytes(loaded) for name, loaded in models.items() if name == "dense bfloat16")
    rows: list[Row] = []
    for name, speed in speeds[PROMPTS[0]].items():
        seconds: dict[str, float | None] = {}
        for length, of_length in speeds.items():
            seconds[f"read_{length}_seconds"] = of_length[name].prompt_seconds if name in of_length else None
            seconds[f"whole_{length}_seconds"] = of_length[name].whole_seconds if name in of_length else None
        rows.append(
            {
                "variant": name,
                "tokens_per_second": speed.tokens_per_second,
                "spread": max(speed.samples) - min(speed.samples),
                **seconds,
                "resident_bytes": resident_bytes(models[name]),
                "bfloat16_share": resident_bytes(models[name]) / dense,
            }
        )
        log.info("%s: %.1f tokens a second", name, speed.tokens_per_second)
    measured: SpeedReport = {"schema": 1, "bench": "generate", "environment": _environment(place, repeats), "rows": rows}
    if output is not None:
        _write_generate(measured, output, model or "demo")
    return measured


def _models(place: torch.device, model: str | None, directory: Path) -> tuple[dict[str, "PreTrainedModel"], torch.Tensor]:
    """(name → loaded model, compressed ones first; ids of the long prompt [1, T])."""
    from ..models.source import load_tokenizer
    from ..run import runner
    from ..run.opening import load

    models: dict[str, PreTrainedModel] = {}
    if model is not None and (Path(model) / "run.json").is_file():
        run = Path(model)
        if not runner.last_artifact(run).linears:
            raise UsageError(f"{model}: its last stage compressed nothing; bench generate compares a compressed model with its baseline")
        models["compressed"] = load(run, str(place))
    else:
        run = directory
        for name, stages in RECIPES.items():
            short = {"calibration": {"samples": 1, "seq_len": 64}, "evaluation": {"seq_len": 256, "windows": 4}}
            runner.run(resolve({"name": "bench-generate", "model": model or "demo", "stages": stages, **short}), run, device=str(place))
            models[name] = load(run, str(place))
    baseline = runner.last_artifact(run, "baseline").directory
    for dtype in (torch.float32, torch.bfloat16):
        models[f"dense {str(dtype).removeprefix('torch.')}"] = load(baseline, str(place), dtype)
    ids = load_tokenizer(baseline)(TEXT * 40, return_tensors="pt").input_ids[:, : PROMPTS[1]]
    return models, ids


def _write_generate(measured: SpeedReport, output: Path, model: str) -> None:
    from ...reports import published

    columns = (
        ("variant", "model", "text"), ("tokens_per_second", "tokens/s", "number"), ("spread", "spread", "number"),
        *((f"whole_{length}_seconds", f"{length} read, {NEW_TOKENS} written in", "seconds") for length in PROMPTS),
        *((f"read_{length}_seconds", f"of it {length} read in", "seconds") for length in PROMPTS),
        ("resident_bytes", "weights in memory", "bytes"), ("bfloat16_share", "of bfloat16", "percent"),
    )  # fmt: skip
    notes = [
        f"Tokens/s: {NEW_TOKENS} greedy tokens after a prompt of {PROMPTS[0]}, the time to read the prompt left out; spread: from the slowest to "
        "the fastest. Medians of the repeats, every model in turn.",
        f"– : it took more than {PATIENCE:g} s for {PROMPTS[0]} tokens and was not measured.",
    ]
    name = f"generate-{short_name(measured['environment'])}"
    title = f"{model} writes on {measured['environment']['device_name']}"
    for path in published.write(name, measured["rows"], columns, measured["environment"], title=title, notes=notes, directory=output):
        log.info("written: %s", path)


def _environment(place: torch.device, repeats: int) -> dict[str, object]:
    return {
        "device": str(place), "device_name": device_name(place), "clocks": clocks(place), "threads": torch.get_num_threads(),
        "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "warm_up": 1, "repeats": repeats,
    }  # fmt: skip
