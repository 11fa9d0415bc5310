"""The table of GPTQ against GPTQModel: seconds, memory and perplexity of both on the demo model, from the same windows, with as many threads.

One sitting: each program alone, one after the other. GPTQModel's checkpoint is measured by our evaluation. Knows the two programs' runs; not
how either solves.
"""

import os
from pathlib import Path
from typing import Any

import torch

from ...reports import published
from ..doctor import cpu_name
from ..errors import InputError
from ..export.exporting import export
from ..recipes import recipe
from ..run import runner
from ..run.evaluate import evaluate
from ..stages.inputs import Inputs
from ..store.rundir import RunDirectory
from . import other_programs
from .reference_rows import DEMO

NAME = "gptq-speed"
SAMPLES, SEQ_LEN, GROUP = 128, 512, 64
BITS = (4, 3)
WIKITEXT = "BITMEND_WIKITEXT2"
"""Where it is set: a directory with WikiText-2's wiki.valid.raw, to calibrate on, and wiki.test.raw, to measure on."""
COLUMNS = (
    ("program", "program", "text"), ("text", "text", "text"), ("bits", "bits", "exact"), ("dtype", "computes in", "text"),
    ("perplexity", "perplexity", "perplexity"), ("baseline_perplexity", "dense", "perplexity"), ("bits_per_weight", "bits per weight", "number"),
    ("seconds", "seconds", "seconds"), ("to_gptqmodel", "of its seconds", "number"), ("peak_bytes", "memory", "bytes"),
)  # fmt: skip


def publish(directory: Path) -> list[Path]:
    """Measure what is not there yet, then write the table. InputError without GPTQModel's environment."""
    settings = {"samples": SAMPLES, "seq_len": SEQ_LEN, "group_size": GROUP, "version": other_programs.VERSIONS["gptqmodel"]}
    kept = published.PublishedRows(directory / f"{NAME}.jsonl", ("program", "text", "bits"), settings)
    for text, data in _texts().items():
        for bits in BITS:
            if {"program": "GPTQModel", "text": text, "bits": bits} not in kept:
                for row in _pair(directory / NAME / text, text, data, bits):
                    kept.append(row)
    notes = (
        f"{cpu_name()}, {torch.get_num_threads()} threads. The demo model's blocks, embeddings as they are; {SAMPLES} × {SEQ_LEN} tokens, groups of {GROUP}, with "
        "zero points, matrices of a block group by group; both programs otherwise as they come, each in the dtype that it chooses. Measured by one evaluation, in float32.",
        f"GPTQModel {settings['version']}: from loading to the checkpoint on disk. Ours: the stage, without its evaluation.",
        f"Demo: calibrated on Wikipedia, measured on other articles. WikiText-2 (where {WIKITEXT} says it lies): calibrated on its validation part, measured on its test part.",
        f"Made by `make publish TABLE={NAME}`.",
    )  # fmt: skip
    order = {name: number for number, name in enumerate((DEMO, "WikiText-2"))}
    rows = sorted(kept, key=lambda row: (order[str(row["text"])], -int(str(row["bits"])), str(row["program"])))
    return published.write(NAME, rows, COLUMNS, title="GPTQ against GPTQModel", notes=notes)


def _texts() -> dict[str, dict[str, str]]:
    """Text → the recipe's settings of it."""
    texts: dict[str, dict[str, str]] = {DEMO: {}}
    if place := os.environ.get(WIKITEXT):
        parts = {"calibration": "wiki.valid.raw", "evaluation": "wiki.test.raw"}
        texts["WikiText-2"] = {part: str(Path(place) / name) for part, name in parts.items()}
        for path in texts["WikiText-2"].values():
            if not Path(path).is_file():
                raise InputError(f"{path}: no such file; {WIKITEXT} names the directory where it lies")
    return texts


def _pair(directory: Path, text: str, data: dict[str, str], bits: int) -> list[dict[str, Any]]:
    """Ours, then the other program's, of one text and width."""
    document = {
        "name": "speed",
        "data": data or DEMO,
        "calibration": {"samples": SAMPLES, "seq_len": SEQ_LEN},
        "evaluation": {"seq_len": SEQ_LEN, "windows": 16},
        "stages": [{"quantize": {"method": "gptq", "bits": bits, "group_size": GROUP, "true_sequential": True}}],
    }
    ours = runner.run(recipe.resolve(document, options={"model": DEMO}), directory / f"run-{bits}", page=False)
    last = ours.stages[-1]
    names = [stage["name"] for stage in RunDirectory(directory / f"run-{bits}").read()["stages"]]
    dense_ppl, our_ppl = (evaluate(str(directory / f"run-{bits}" / "stages" / name), dtype="float32")["perplexity"] for name in (names[0], names[-1]))
    dense = directory / "dense"
    if not dense.is_dir():
        export(directory / f"run-{bits}", "dense", dense, stage="baseline")
    asked = {"program": "gptqmodel", "bits": bits, "group_size": GROUP, "samples": SAMPLES, "batch_size": 4}
    ids_NT = Inputs(recipe.resolve(document, options={"model": DEMO}), dense).calibration()
    checkpoint, reported = other_programs.made(directory, dense, ids_NT, asked)
    measured = {**document, "dtype": "float32", "stages": [{"fuse": {"backend": "reference"}}]}
    options = {"model": str(checkpoint), **({} if data else {"data": DEMO})}
    theirs = runner.run(recipe.resolve(measured, options=options), other_programs.place_of(directory, asked) / "run", page=False).stages[0]
    shared = {"text": text, "bits": bits, "baseline_perplexity": dense_ppl}
    return [
        shared | {"program": "bitmend", "dtype": ours.protocol.dtype, "perplexity": our_ppl, "bits_per_weight": last.bits_per_weight}
        | {"seconds": last.seconds, "peak_bytes": last.peak_bytes, "to_gptqmodel": last.seconds / reported["seconds"]},
        shared | {"program": "GPTQModel", "dtype": reported["dtype"], "perplexity": theirs.perplexity, "bits_per_weight": theirs.bits_per_weight}
        | {"seconds": reported["seconds"], "peak_bytes": reported["peak_bytes"], "to_gptqmodel": 1.0},
    ]  # fmt: skip
