"""The table of small budgets: plain GPTQ, and how the default recipe's texts, allocation, learned rounding and long training fare in as many bytes.

Every row is the last stage or the one before it of a run in a directory of its own kind, so that a killed one goes on. Measured on the demo model's
own text and on the two that nothing trains on. Knows settings; not how a stage works.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...reports import published
from ...reports.record import RunRecord, StageRecord, gap_closed
from ..doctor import cpu_name
from ..recipes import recipe
from ..recipes.recipe import Recipe
from ..run import runner
from .demo_table import PLAIN, embeddings_of, run_beside
from .reference_rows import DEMO

NAME = "budgets"
COMPUTED = {"dtype": "bfloat16"}
LEARNED = {"method": "learned_rounding", "group_size": 64, "symmetric": False, "steps": 50, "batch_size": 4, "seq_len": 256}


@dataclass(frozen=True)
class Way:
    """What leads to the rows of one budget: `bits` are those stored in the blocks, of `plain` and of what is compared with it. `quantize` and
    `recover`: what differs from the default recipe's stages, its quantizer replaced by another that is named."""

    bits: str
    plain: Mapping[str, object]
    label: str
    quantize: Mapping[str, object] = field(default_factory=dict)
    recover: Mapping[str, object] = field(default_factory=dict)
    budget: str | None = None


_LONG = {"steps": 300, "eval_every": 25}
WAYS = (
    Way("2.302", PLAIN["GPTQ"] | {"bits": 2}, "allocated learned_rounding", LEARNED | {"bits": 2}, _LONG, "2.302bpw"),
    Way("3.307", PLAIN["GPTQ"] | {"bits": 3}, "allocated learned_rounding", LEARNED | {"bits": 3}, _LONG, "3.307bpw"),
    Way("4.349", PLAIN["GPTQ"], "guided gptq", recover=_LONG | {"steps": 200}),
    Way("NF4's", PLAIN["NF4"], "guided gptq, allocated", budget="77.5MB"),
)
COLUMNS = (
    ("bits", "bits", "text"), ("name", "way", "text"), ("perplexity", "perplexity", "perplexity"), ("closed", "of the gap", "percent"),
    ("news", "news", "perplexity"), ("news_closed", "of the gap", "percent"), ("code", "code", "perplexity"), ("code_closed", "of the gap", "percent"),
    ("kl_to_baseline", "KL to baseline", "number"), ("total_bytes", "bytes", "bytes"), ("seconds", "seconds", "seconds"),
)  # fmt: skip


def publish(directory: Path) -> list[Path]:
    """Run what is not finished, then write the table: a plain row, one behind quantizing and one behind training for every budget."""
    default = recipe.resolve("compress_and_recover", options={"model": DEMO, "profile": DEMO, **COMPUTED})
    rows, records = list[dict[str, Any]](), list[RunRecord]()
    for way in WAYS:
        plain = run_beside(default, directory / "budgets-plain", [{"quantize": way.plain}], {"model": DEMO, **COMPUTED})
        mine = _run(default, directory / f"budgets-{way.budget or way.bits}", way)
        steps = mine.stages[-1].settings["steps"]
        names = (str(way.plain["method"]), way.label, f"{way.label}, scales and norms {steps}")
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


def _run(default: Recipe, directory: Path, way: Way) -> RunRecord:
    """The default recipe's texts, embeddings and stages, but for what the way says."""
    quantize, recover = (next(spec for spec in default.stages if spec.name == name) for name in ("quantize", "recover"))
    chosen = {**way.quantize, **embeddings_of(default)} if way.quantize else quantize.settings()
    document = {
        "name": NAME,
        **{part: getattr(default, part).model_dump(mode="json") for part in ("data", "calibration", "evaluation")},
        "stages": [{"quantize": chosen}, {"recover": recover.settings() | dict(way.recover)}],
    }
    budget = {} if way.budget is None else {"budget": way.budget}
    return runner.run(recipe.resolve(document | budget, options={"model": DEMO, **COMPUTED}), directory, page=False, device="cpu")


def _row(stage: StageRecord, plain: RunRecord) -> dict[str, Any]:
    own = {key: getattr(stage, key) for key in ("method", "perplexity", "kl_to_baseline", "total_bytes", "seconds")}
    dense, worst = plain.stages[0], plain.stages[-1]
    texts: dict[str, Any] = {"closed": gap_closed(stage.perplexity, worst.perplexity, dense.perplexity)}
    for name, text in stage.texts.items():
        texts |= {name: text.perplexity, f"{name}_closed": gap_closed(text.perplexity, worst.texts[name].perplexity, dense.texts[name].perplexity)}
    return own | texts
