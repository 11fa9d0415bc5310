"""The demo's own table: the default recipe's run, stage after stage, and plain methods on the same model, texts and embeddings.

Writes `plain.json`, which the report of every run of the demo model draws next to it, and `demo.{json,md,png,svg}`, the README's picture;
`demo-dtypes.{json,md}` is the recipe in float32 and in bfloat16.
Rows are stages of run directories, so that a killed one goes on. Knows the default recipe; not how a figure is drawn.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ...recover.training_run import TrainConfig
from ...reports import plain_rows, published
from ...reports.record import RunRecord, StageRecord, TextRecord
from ...reports.run_plots import size_against_perplexity
from ..doctor import cpu_name
from ..errors import InputError
from ..export.exporting import export
from ..recipes import recipe
from ..recipes.recipe import Recipe, run_directory
from ..run import runner
from ..stages.inputs import Inputs
from ..store.files import write_bytes
from . import other_programs
from .reference_rows import DEMO, SETTINGS

log = logging.getLogger("bitmend")
PLAIN: dict[str, dict[str, object]] = {
    "RTN": {"method": "rtn", "bits": 4, "group_size": 64},
    "GPTQ": {"method": "gptq", "bits": 4, "group_size": 64},
    "NF4": {"method": "nf4"},
}
"""As they come, but for the embeddings, which are the default recipe's. Calibrated on the text that they are measured on first."""
FAIR: dict[str, list[dict[str, dict[str, object]]]] = {
    "GPTQ, trained": [{"quantize": PLAIN["GPTQ"]}, {"recover": {"method": "scales", "norms": True, "scales": "auto"}}],
    "dense, norms trained": [{"recover": {"method": "perp", "norms": True, "biases": False}}],
}
"""Trained as the default recipe trains, on its texts."""
COMPUTED = {"dtype": "float32"}
"""On every machine, as the other tables are; `demo-dtypes` has bfloat16, which `auto` takes where a processor multiplies it faster."""
AUTO_ROUND = {"program": "auto_round", "bits": 4, "group_size": 64, "iterations": 200, "samples": 128, "batch_size": 8}
COLUMNS = (
    ("stage", "stage", "text"), ("method", "method", "text"), ("perplexity", "perplexity", "perplexity"), ("news", "news", "perplexity"),
    ("code", "code", "perplexity"), ("kl_to_baseline", "KL to baseline", "number"), ("total_bytes", "bytes", "bytes"),
    ("seconds", "seconds", "seconds"),
)  # fmt: skip

DTYPES = "demo-dtypes"
OF_DTYPES = (
    ("stage", "stage", "text"), ("method", "method", "text"), ("dtype", "dtype", "text"), ("perplexity", "perplexity", "perplexity"),
    ("to_float32", "to float32", "percent"), ("news", "news", "perplexity"), ("code", "code", "perplexity"),
    ("kl_to_baseline", "KL to baseline", "number"), ("total_bytes", "bytes", "bytes"), ("seconds", "seconds", "seconds"),
)  # fmt: skip


def publish_dtypes(directory: Path) -> list[Path]:
    """The default recipe's run in float32 and in bfloat16: what is not finished, then their stages side by side."""
    records = {}
    for dtype in ("float32", "bfloat16"):
        chosen = recipe.resolve("compress_and_recover", options={"model": DEMO, "profile": DEMO, "dtype": dtype})
        records[dtype] = runner.run(chosen, directory / f"demo-{dtype}", device="cpu")
    rows = []
    for of_stage in zip(*(record.stages for record in records.values()), strict=True):
        for dtype, stage in zip(records, of_stage, strict=True):
            rows.append({"dtype": dtype} | _row(stage) | {"to_float32": stage.perplexity / of_stage[0].perplexity - 1})
    record = records["float32"]
    protocols = {name: protocol.to_json() for name, protocol in {DEMO: record.protocol, **record.texts}.items()}
    notes = [
        "Each dtype is a run of its own, calibration, training and measuring included. What differs by more than a stage's measuring does is "
        "which codes GPTQ chose behind inputs that differ in their last bits.",
        f"{cpu_name()}, {os.cpu_count()} cores. Made by `make publish TABLE={DTYPES}`.",
    ]
    title = "The default recipe on the demo model in float32 and in bfloat16"
    return published.write(DTYPES, rows, OF_DTYPES, protocols, title=title, notes=notes)


def publish(directory: Path) -> list[Path]:
    """Run what is not finished, then write the files. `directory` is where the plain rows' runs lie; the default recipe's is its own."""
    chosen = recipe.resolve("compress_and_recover", options={"model": DEMO, "profile": DEMO, **COMPUTED})
    plain = _plain(chosen, directory)
    write_bytes(plain_rows.ROWS, (json.dumps(plain.to_json(), indent=1, ensure_ascii=False) + "\n").encode())
    record = runner.run(chosen, run_directory(chosen))
    rows = [_row(stage) for stage in (*record.stages, *plain.stages, *_fair(chosen, directory))]
    protocols = {name: protocol.to_json() for name, protocol in {DEMO: record.protocol, **record.texts}.items()}
    notes = [
        "Below the recipe's stages: plain methods, the recipe's embeddings, 32 × 512 calibration tokens of the demo text.",
        "Trained: plain GPTQ's scales and norms, and the dense model's own norms, as the recipe trains them and on its texts. imitate: the recipe of "
        "that name, taught by the dense model alone.",
        f"Computed in float32. {cpu_name()}, {os.cpu_count()} cores. Made by `make publish TABLE=demo`.",
    ]
    figure, title = size_against_perplexity(record.stages, plain_rows.rivals(record)), "The default recipe on the demo model"
    return published.write("demo", rows, COLUMNS, protocols, figure, title=title, notes=notes)


def _plain(chosen: Recipe, directory: Path) -> RunRecord:
    result = {name: _measured(chosen, directory / "demo-plain", settings, {"model": DEMO, **COMPUTED}) for name, settings in PLAIN.items()}
    try:
        result["AutoRound"] = _auto_round(chosen, directory)
    except InputError as error:
        log.warning("AutoRound's row is left out: %s", error)
    stages = tuple(replace(record.stages[-1], stage=name, layers=(), metrics={}, notes=()) for name, record in result.items())
    first = next(iter(result.values()))
    return RunRecord("plain methods, the default recipe's embeddings", DEMO, first.protocol, stages, {}, first.texts)


def _fair(chosen: Recipe, directory: Path) -> list[StageRecord]:
    """The last stages of what is trained as the recipe trains, and of `imitate`."""
    (recover,) = [stage for stage in chosen.stages if stage.name == "recover"]
    same = {field.name: getattr(recover.config, field.name) for field in fields(TrainConfig)}
    result = {}
    for name, stages in FAIR.items():
        trained = [{**stage, "recover": {**same, **stage["recover"]}} if "recover" in stage else stage for stage in stages]
        result[name] = run_beside(chosen, directory / "demo-plain", trained, {"model": DEMO, **COMPUTED})
    imitating = recipe.resolve("imitate", options={"model": DEMO, "profile": DEMO, **COMPUTED})
    result["imitate"] = runner.run(imitating, directory / "demo-imitate", page=False)
    return [replace(record.stages[-1], stage=name) for name, record in result.items()]


def _measured(chosen: Recipe, directory: Path, settings: Mapping[str, object], options: Mapping[str, object]) -> RunRecord:
    """A run of one quantizer."""
    return run_beside(chosen, directory, [{"quantize": settings}], options)


def run_beside(chosen: Recipe, directory: Path, stages: Sequence[Mapping[str, Mapping[str, object]]], options: Mapping[str, object]) -> RunRecord:
    """A run calibrated on the demo text, with the recipe's embeddings, evaluation and training text."""
    embeddings = embeddings_of(chosen)
    document = {
        "name": "plain",
        "data": {"calibration": DEMO, "train": chosen.data.train, "evaluation": DEMO},
        "calibration": SETTINGS[DEMO]["calibration"],
        "evaluation": chosen.evaluation.model_dump(mode="json"),
        "stages": [{name: {**settings, **(embeddings if name == "quantize" else {})} for name, settings in stage.items()} for stage in stages],
    }
    return runner.run(recipe.resolve(document, options=options), directory, page=False)


def embeddings_of(chosen: Recipe) -> dict[str, object]:
    """What its quantize stage says of embeddings and head."""
    (quantize,) = [stage for stage in chosen.stages if stage.name == "quantize"]
    return {key: getattr(quantize, key) for key in ("include_embeddings", "embedding_bits", "head_bits")}


def _auto_round(chosen: Recipe, directory: Path) -> RunRecord:
    """The other program's checkpoint, of which the blocks stay as they are."""
    rivals = directory / "demo-plain-rivals"
    first = directory / "demo-plain"
    if not (rivals / "dense").is_dir():
        export(first, "dense", rivals / "dense", stage="baseline")
    document = {"name": "plain", "calibration": SETTINGS[DEMO]["calibration"], "stages": [{"quantize": PLAIN["RTN"]}]}
    ids_NT = Inputs(recipe.resolve(document, options={"model": DEMO}), rivals / "dense").calibration()
    checkpoint, reported = other_programs.made(rivals, rivals / "dense", ids_NT, AUTO_ROUND)
    untouched = {"method": "rtn", "ignore": [r"\.layers\."]}
    record = _measured(chosen, rivals / "run", untouched, {"model": str(checkpoint), "data": DEMO, **COMPUTED})
    last = _absolute(record.stages[-1])
    return replace(record, stages=(replace(last, method="auto_round", seconds=reported["seconds"], peak_bytes=reported["peak_bytes"]),))


def _absolute(stage: StageRecord) -> StageRecord:
    """Without what is relative to the run's own baseline, which is the other program's checkpoint."""
    texts = {name: TextRecord(text.perplexity, bits_per_byte=text.bits_per_byte) for name, text in stage.texts.items()}
    kept = ("stage", "method", "perplexity", "bits_per_byte", "total_bytes", "bits_per_weight")
    return StageRecord(**{name: getattr(stage, name) for name in kept}, texts=texts)


def _row(stage: StageRecord) -> dict[str, Any]:
    own = {key: getattr(stage, key) for key in ("stage", "method", "perplexity", "kl_to_baseline", "total_bytes", "seconds")}
    return own | {name: text.perplexity for name, text in stage.texts.items()}
