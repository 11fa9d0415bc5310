"""The table of small budgets: plain GPTQ, and how the default recipe's texts, allocation, learned rounding and long training fare in as many bytes.

Every row is the last stage or the one before it of a run in a directory of its own kind, so that a killed one goes on. Measured on the demo model's
own text and on the two that nothing trains on. Knows settings; not how a stage works.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...reports import published
from ...reports.record import RunRecord, StageRecord, gap_closed
from ..doctor import cpu_name
from ..recipes import recipe
from ..run import runner
from .reference_rows import DEMO, SETTINGS

NAME = "budgets"
MIXTURE = {
    "data": {"calibration": "wiki=0.4,docs=0.2,self=0.4", "train": "wiki=0.4,docs=0.2,self=0.4"},
    "calibration": {"samples": 16, "seq_len": 512},
}
"""The demo profile's."""
PLAIN = {"data": {"calibration": DEMO}, "calibration": SETTINGS[DEMO]["calibration"]}
EMBEDDINGS = {"include_embeddings": True, "embedding_bits": 6, "head_bits": 6}
GRID = {"group_size": 64, "symmetric": False, **EMBEDDINGS}
LEARNED = {"method": "learned_rounding", **GRID, "steps": 50, "batch_size": 4, "seq_len": 256}
GUIDED = {"method": "gptq", "bits": 4, **GRID, "guided": 1, "true_sequential": True}
TRAINED = {
    "method": "scales", "norms": True, "scales": "auto", "loss": "both", "when_worse": "restore", "batch_size": 1, "accumulation": 2, "seq_len": 512,
}  # fmt: skip
WIDTHS = {"bits": [2, 3, 4], "group_sizes": [32, 64, 128]}


@dataclass(frozen=True)
class Way:
    """What leads to the rows of one budget: `bits` are those stored in the blocks, of `plain` GPTQ and of what is compared with it."""

    bits: str
    plain: Mapping[str, Any]
    quantize: Mapping[str, Any]
    recover: Mapping[str, Any]
    budget: str | None = None
    label: str = ""


def _long(bits: int, budget: str) -> Way:
    return Way(
        budget.removesuffix("bpw"),
        {"method": "gptq", "bits": bits, "group_size": 64, **EMBEDDINGS},
        {**LEARNED, "bits": bits},
        {**TRAINED, "steps": 300, "eval_every": 25},
        budget,
        "allocated learned_rounding",
    )


WAYS = (
    _long(2, "2.302bpw"),
    _long(3, "3.307bpw"),
    Way(
        "4.349",
        {"method": "gptq", "bits": 4, "group_size": 64, **EMBEDDINGS},
        GUIDED,
        {**TRAINED, "steps": 200, "eval_every": 25},
        label="guided gptq",
    ),
    Way("NF4's", {"method": "nf4", **EMBEDDINGS}, GUIDED, {**TRAINED, "steps": 40, "eval_every": 10}, "77.5MB", "guided gptq, allocated"),
)
COLUMNS = (
    ("bits", "bits", "text"), ("name", "way", "text"), ("perplexity", "perplexity", "perplexity"), ("closed", "of the gap", "percent"),
    ("news", "news", "perplexity"), ("news_closed", "of the gap", "percent"), ("code", "code", "perplexity"), ("code_closed", "of the gap", "percent"),
    ("kl_to_baseline", "KL to baseline", "number"), ("total_bytes", "bytes", "bytes"), ("seconds", "seconds", "seconds"),
)  # fmt: skip


def publish(directory: Path) -> list[Path]:
    """Run what is not finished, then write the table: a plain row, one behind quantizing and one behind training for every budget."""
    rows, records = list[dict[str, Any]](), list[RunRecord]()
    for way in WAYS:
        plain = _run(directory / "budgets-plain", PLAIN, [{"quantize": way.plain}])
        mine = _run(directory / f"budgets-{way.budget or way.bits}", MIXTURE, [{"quantize": way.quantize}, {"recover": way.recover}], way.budget)
        names = (str(way.plain["method"]), way.label, f"{way.label}, scales and norms {way.recover['steps']}")
        for name, stage in zip(names, (plain.stages[-1], *mine.stages[-2:]), strict=True):
            rows.append({"bits": way.bits, "name": name} | _row(stage, plain))
        records.append(mine)
    record = records[-1]
    protocols = {name: protocol.to_json() for name, protocol in {DEMO: record.protocol, **record.texts}.items()}
    dense = record.stages[0]
    notes = [
        f"Dense: {dense.perplexity:.2f}, news {dense.texts['news'].perplexity:.2f}, code {dense.texts['code'].perplexity:.2f}.",
        "Of the gap: 1 − ln(perplexity / dense) / ln(plain / dense), plain being the first row of as many bits, calibrated on 32 × 512 tokens of the demo text.",
        "The others are calibrated and trained on the default recipe's mixture, 1,024 tokens a step. Embeddings have 6 bits, or what a budget in bytes gives them.",
        f"Computed in bfloat16. {cpu_name()}, {os.cpu_count()} cores shared with other work: seconds are an upper bound. Made by `make publish TABLE={NAME}`.",
    ]
    return published.write(NAME, rows, COLUMNS, protocols, title="Small budgets on three texts", notes=notes)


def _run(directory: Path, text: Mapping[str, Any], stages: list[dict[str, Any]], budget: str | None = None) -> RunRecord:
    document = {
        "name": NAME,
        "model": DEMO,
        "dtype": "bfloat16",
        **text,
        "evaluation": {"seq_len": 512, "windows": 16, "also": ["news", "code"]},
        "stages": stages,
    }
    chosen = {} if budget is None else {"budget": budget, "allocation": WIDTHS}
    return runner.run(recipe.resolve(document | chosen, options={}), directory, page=False, device="cpu")


def _row(stage: StageRecord, plain: RunRecord) -> dict[str, Any]:
    own = {key: getattr(stage, key) for key in ("method", "perplexity", "kl_to_baseline", "total_bytes", "seconds")}
    dense, worst = plain.stages[0], plain.stages[-1]
    texts: dict[str, Any] = {"closed": gap_closed(stage.perplexity, worst.perplexity, dense.perplexity)}
    for name, text in stage.texts.items():
        texts |= {name: text.perplexity, f"{name}_closed": gap_closed(text.perplexity, worst.texts[name].perplexity, dense.texts[name].perplexity)}
    return own | texts
