"""What a row and a table of reference results are, and the stages that many rows begin with. Knows names and settings.

A row is a model, the stages that lead to it in recipe form, and what identifies it in its table. Rows of one model share a run
directory, so a stage that many of them begin with is done once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Stage = Mapping[str, Mapping[str, Any]]

SMALL = "small"
DEMO = "demo"
SETTINGS: dict[str, dict[str, Any]] = {
    DEMO: {"calibration": {"samples": 32, "seq_len": 512}, "evaluation": {"seq_len": 512, "windows": 16}},
    SMALL: {"calibration": {"samples": 64, "seq_len": 128}, "evaluation": {"seq_len": 128, "windows": 64}},
}
"""Text of the rows, by model: the demo text, or that of tests/small_model."""


@dataclass(frozen=True)
class ReferenceRow:
    """`tags` are columns that tell rows of one name apart: bits, rank, kind, seed."""

    name: str
    stages: tuple[Stage, ...]
    tags: Mapping[str, object] = field(default_factory=dict)
    model: str = DEMO
    seed: int = 0
    budget: str | None = None
    dtype: str = "float32"
    rival: Mapping[str, Any] | None = None
    """What another program quantizes first (`rivals.made`); the stages begin at its checkpoint."""


@dataclass(frozen=True)
class ReferenceTable:
    """`tags` in the order of the columns; `panel` and `series` say how the figure is drawn."""

    title: str
    rows: Sequence[ReferenceRow]
    tags: tuple[str, ...]
    panel: str | None = None
    x: str = "bits_per_weight"
    notes: tuple[str, ...] = ()
    lines: bool = False
    """Draw a line for each series instead of points and the Pareto line."""
    within: tuple[str, ...] = ()
    """Rows that differ in one of these tags do not compete for bytes."""
    other_text: bool = False
    """Measure on text of another kind too, so that an adaptation to the training text is told from a recovery."""


def quantize(bits: int, method: str = "gptq", **settings: object) -> Stage:
    size = "block_size" if method in ("normal_float", "gptq_nf", "nf4") else "group_size"
    return {"quantize": {"method": method, "bits": bits, size: 64, **settings}}


def prune(method: str = "wanda", pattern: str = "unstructured", sparsity: float = 0.5) -> Stage:
    return {"prune": {"method": method, "sparsity": sparsity, "pattern": pattern}}


SHORT = {"steps": 50, "batch_size": 2}
"""Of the methods that train a block: a quarter of their default, so that a row takes minutes."""
SHORT_NOTE = "block_training and learned_rounding: 50 steps of 1,024 tokens a block, a quarter of their default."
