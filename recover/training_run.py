"""One training run as data: its settings, its rates, and everything that changes while it goes on and is saved for a resume.

Knows parameters and moments; not batches, losses or the loop.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol

import torch
from torch import Tensor

from ..compress.precision import Matmul
from ..compress.ranges import Batch, FactorOrZero, Layers, Rate, ReadWhere, Steps, StepsOrZero, Targets, Temperature, Tokens
from .adamw import AdamW, TrainState
from .compressed_linear import CompressedLinear
from .losses import LossName
from .rate_search import Tried
from .student import Student
from .trainable import RATES, Attached, Trainable


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What the config of every method has that trains the whole model; a method's own settings are its subclass. learning_rate None = the method's default, search = that or a multiple of it, found by
    short runs on held-out text before the first step (`rate_search`); eval_every None = five times in the run; warmup is in
    steps (at most a quarter of the run). when_worse: what follows when held-out text got worse than it once was: restore goes on from the best
    values at half the rate, so that a rate too high for a model costs the steps of one evaluation. targets and layers: see `selection.where`.
    cache_dense keeps rebuilt weights in memory, those of a step that training made of them first (auto: when they fit). loss: distill imitates
    the teacher, cross_entropy learns the text, both is half of each. matmul: how exactly the training multiplies (`precision.Matmul`); what is
    kept is judged in float32 all the same. gradient_checkpointing recomputes each block in backward; auto is decided by whoever knows the
    device's memory (a pipeline's stage), and is off where nobody did."""

    steps: Steps = 200
    learning_rate: Rate | Literal["search"] | None = None
    batch_size: Batch = 4
    seq_len: Tokens = 256
    accumulation: Batch = 1
    warmup: StepsOrZero = 10
    loss: LossName = "distill"
    temperature: Annotated[Temperature, ReadWhere("loss is distill or both", lambda config: config.loss != "cross_entropy")] = 1.0
    clip: FactorOrZero = 1.0
    eval_every: Steps | None = None
    when_worse: Literal["continue", "restore"] = "continue"
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    targets: Targets = "all"
    layers: Layers = "all"
    cache_dense: Literal["auto", "always", "never"] = "auto"
    matmul: Matmul = "auto"


class Schedule(Protocol):
    """What rates follow from: TrainConfig, or a config of its own."""

    @property
    def steps(self) -> int: ...

    @property
    def warmup(self) -> int: ...

    @property
    def learning_rate(self) -> float | Literal["search"] | None: ...


def learning_rate(step: int, config: Schedule) -> float:
    """Share of the full rate at a step: linear warm-up, then cosine to 0."""
    warmup = min(config.warmup, config.steps // 4)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


def rates(trainables: Mapping[str, Trainable], config: Schedule, main: str | None = None) -> dict[str, float]:
    """Full learning rate by name. `config.learning_rate` is that of the method's main kind; the others keep their ratio to it. Before a search
    they are the defaults."""
    chosen = config.learning_rate
    factor = 1.0 if chosen is None or chosen == "search" or main is None else chosen / RATES[main]
    return {name: t.rate * factor for name, t in trainables.items()}


@dataclass
class TrainingRun:
    """What changes while training. `unread`: steps whose numbers lie on the device still: (step, tokens so far, float64 [loss, norm of the
    gradient, what `Limits` look at]); a state is taken when there are none."""

    student: Student
    attached: Attached
    optimizer: AdamW
    rates: dict[str, float]
    config: TrainConfig
    linears: Sequence[CompressedLinear] = ()
    step: int = 0
    start_loss: float = math.nan
    held_out: float = math.nan
    best_loss: float = math.inf
    best_step: int = 0
    factor: float = 1.0
    good_step: int = 0
    tokens: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    rollbacks: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)
    tried: list[Tried] = field(default_factory=list)
    unread: list[tuple[int, int, Tensor]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    good: dict[str, Tensor] = field(default_factory=dict)

    @property
    def trainables(self) -> dict[str, Trainable]:
        return self.attached.trainables

    def snapshot(self) -> dict[str, Tensor]:
        return {name: t.parameter.detach().clone() for name, t in self.trainables.items()} | {
            f"buffer:{name}": b.clone() for name, b in self._buffers().items()
        }

    def restore(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, t in self.trainables.items():
                t.parameter.copy_(values[name])
                t.parameter.grad = None
            for name, b in self._buffers().items():
                b.copy_(values[f"buffer:{name}"])

    def _buffers(self) -> dict[str, Tensor]:
        return {} if self.attached.buffers is None else self.attached.buffers()

    def state(self) -> TrainState:
        tensors = {f"value.{k}": v for k, v in self.snapshot().items()}
        for label, group in (("first", self.optimizer.first), ("second", self.optimizer.second), ("best", self.best), ("good", self.good)):
            tensors |= {f"{label}.{k}": v.clone() for k, v in group.items()}
        plain = ("step", "start_loss", "held_out", "best_loss", "best_step", "factor", "good_step", "tokens", "history", "rollbacks", "restored", "tried")
        meta = {name: getattr(self, name) for name in plain}
        return TrainState(
            tensors, {k: list(v) if isinstance(v, list) else v for k, v in meta.items()} | {"optimizer_steps": self.optimizer.steps}
        )

    def load(self, state: TrainState) -> None:
        """ValueError when the state is of other trainables."""
        names = {k.removeprefix("value.") for k in state.tensors if k.startswith("value.")}
        if names != set(self.snapshot()):
            odd = sorted(names ^ set(self.snapshot()))[:3]
            raise ValueError(f"the saved training state is of other parameters ({', '.join(odd)}, …); start this stage anew with --force")
        groups: dict[str, dict[str, Tensor]] = {"value": {}, "first": {}, "second": {}, "best": {}, "good": {}}
        for key, tensor in state.tensors.items():
            label, _, name = key.partition(".")
            groups[label][name] = tensor.clone()
        self.restore(groups["value"])
        device = {name: t.parameter.device for name, t in self.trainables.items()}
        self.optimizer.first = {k: v.to(device[k]) for k, v in groups["first"].items()}
        self.optimizer.second = {k: v.to(device[k]) for k, v in groups["second"].items()}
        self.best, self.good = groups["best"], groups["good"]
        meta = dict(state.meta)
        self.optimizer.steps = meta.pop("optimizer_steps")
        for name, value in meta.items():
            setattr(self, name, list(value) if isinstance(value, list) else value)
