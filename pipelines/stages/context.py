"""A stage's inputs other than its parent and config (`Context`), and its result (`Outcome`). Knows no stage."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...recover.peers import Peers
from ..ranks.exchange import ONE, OrderedSum, Ranks
from ..store.artifact import Artifact
from .inputs import Inputs


@dataclass(frozen=True)
class Context:
    """`teacher` is whom recovery imitates: the baseline, or the model given with --teacher; None when the baseline is itself a quantized
    checkpoint and no teacher was given. `teacher_states` is where what it computed may be kept for other stages. `scratch` is the stage's own directory, where it may keep what makes it resumable; `stop()` says that the user requested a stop:
    a stage then saves what it has and raises KeyboardInterrupt (`check_stop`). Where several `ranks` share a stage, they agree in `stop()`, which all
    call equally often."""

    baseline: Artifact
    teacher: Artifact | None
    baseline_metrics: Path
    teacher_states: Path
    scratch: Path
    device: torch.device
    dtype: torch.dtype
    seed: int
    inputs: Inputs
    stop: Callable[[], bool]
    ranks: Ranks = ONE

    @property
    def peers(self) -> Peers:
        """The ranks, as recovery knows them."""
        return Peers(self.ranks.rank, self.ranks.size, self.ranks.gathered, partial(OrderedSum, self.ranks))


@dataclass(frozen=True)
class Outcome:
    """One dict for each matrix (name, output_error, metrics), what was measured on the way, words for the report, and
    files to seal into the artifact in addition to its parent's."""

    layers: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    trainable_parameters: int | None = None
    tokens_per_second: float | None = None
    documents: Mapping[str, bytes] = field(default_factory=dict)


def check_stop(context: Context) -> None:
    if context.stop():
        raise KeyboardInterrupt
