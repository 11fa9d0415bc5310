"""`pipeline bench compress --count`: the operators that one block of a shape takes, and a step that trains it, counted and not timed.

A run on one block of random weights, with every operator that torch dispatches in its compression stage seen by a `TorchDispatchMode`: exact,
the same on every machine, and on the pretended card of the tests what a card would be sent (a kernel is one operator). What it depends on:
the shape, the settings and the device; statistics and hidden states also on the batches of calibration text, of which there are few here. What
other threads do (blocks are read ahead) is not seen.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import CodeType
from typing import Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...compress.feedback import factor_of, feed_back_, feed_back_uniform_
from ...compress.grids import fit, to_record
from ...compress.metrics import output_error
from ...compress.statistics import InputStatistics
from ...recover import train
from ..errors import UsageError
from ..recipes.settings import unknown
from ..stages.compress import compress
from ..stages.shared_inputs import solve_all
from ..stages.teacher import StreamedTeacher
from .scaling import BRIEF, Row, Settings, Text, made, recipe_document, work_directory
from .synthetic import SHAPES

TEXT: Text = {"calibration": {"samples": 4, "seq_len": 128}, "evaluation": {"seq_len": 128, "windows": 1}}
VOCABULARY = 512
"""The blocks of a model do not depend on it."""
PARTS: dict[CodeType, str] = {
    InputStatistics.update.__code__: "statistics",
    factor_of.__code__: "factor",
    fit.__code__: "clip search",
    feed_back_.__code__: "sweep",
    feed_back_uniform_.__code__: "sweep",
    to_record.__code__: "packing",
    output_error.__code__: "error",
    solve_all.__code__: "rest of the solver",
    compress.__code__: "model",
}
"""An operator belongs to the first of these functions that its caller's callers come to; those outside of the stage are not counted."""
BEFORE_SOLVER = ("statistics", "model")
STEP_PART = "step"
TRAINING: dict[CodeType, str] = {StreamedTeacher._look_ahead.__code__: "teacher ahead", train._update.__code__: STEP_PART}
STEPS = 2
TRAINED = ("scales", "lora")
STEP: Settings = {"norms": True, "steps": STEPS, "batch_size": 1, "seq_len": 128, "loss": "both", "eval_every": STEPS}
WAITS = frozenset({"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"})
"""Operators whose result, or the size of whose result, the host waits for."""


@dataclass
class OperatorCount:
    """Operators; those among them that move no data (views); bytes of all tensors that the others were given, of which a kernel may read a
    part; bytes that went from one device to another; and how often the host waited for a card, or would have: for a number, a size or a copy
    (a `tolist` on the CPU is no operator)."""

    operators: int = 0
    views: int = 0
    read_bytes: int = 0
    copied_bytes: int = 0
    waits: int = 0

    def __add__(self, other: "OperatorCount") -> "OperatorCount":
        return OperatorCount(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


class TorchOperator(Protocol):
    """The part of a torch operator's interface (`OpOverload`) that is used here."""

    is_view: bool

    def name(self) -> str: ...

    def __call__(self, *args: object, **kwargs: object) -> object: ...


class Counter(TorchDispatchMode):
    """Counts, by part, while it is entered."""

    def __init__(self, parts: dict[CodeType, str]) -> None:
        super().__init__()
        self.parts, self.counts = parts, {part: OperatorCount() for part in parts.values()}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # torch would wrap what follows, at twice its price
        return False

    def __torch_dispatch__(
        self, func: TorchOperator, types: Sequence[type], args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        part = self._part()
        if part is not None:
            _count(self.counts[part], func, list(_tensors((args, kwargs or {}))), out)
        return out

    def _part(self) -> str | None:
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_code in self.parts:
                return self.parts[frame.f_code]
            frame = frame.f_back
        return None


def _count(count: OperatorCount, func: TorchOperator, given: list[Tensor], out: object) -> None:
    count.operators += 1
    if func.is_view:
        count.views += 1
        return
    count.read_bytes += sum(t.nbytes for t in given)
    name = func.name().split("::")[1].split(".")[0]
    devices = [t.device.type for t in (*given, *_tensors(out)) if t.dim() and not t.is_meta]
    if given and given[0].dim() and len(set(devices)) > 1:
        source = given[-1]  # copy_(to, from); all others are given what they copy alone
        count.copied_bytes += source.nbytes
        count.waits += source.device.type != "cpu"
    by_mask = name.startswith("index") and any(t.dtype == torch.bool for t in given[1:])
    count.waits += name in WAITS or by_mask


def _tensors(values: object) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def of_block(name: str, only: Sequence[str], device: str, output: Path | None) -> list[Row]:
    """A row for each quantizer and part of its stage, and one for all that is not "statistics" or "model"; where no method is named also
    for a step of some recoveries, head and losses included. UsageError for a shape or a method that is not known."""
    from ..recipes.recipe import resolve
    from ..recipes.stage_settings import methods
    from ..run import runner

    if name not in SHAPES:
        raise UsageError(f"--shape: {unknown('shape', name, SHAPES)}")
    for method in only:
        if method not in methods("quantize"):
            raise UsageError(f"bench compress --count: {unknown('method', method, methods('quantize'))}")
    rows = []
    with work_directory(output, f"count-{name}") as place:
        model, _ = made(place / "model", replace(SHAPES[name], blocks=1, vocabulary=VOCABULARY), TEXT)
        def counts(method: str, stages: list[dict[str, Settings]], parts: dict[CodeType, str]) -> dict[str, OperatorCount]:
            with Counter(parts) as counter:
                runner.run(resolve(recipe_document(model, TEXT, stages)), place / f"run-{method}-{device}", device=device, page=False)
            shown = {part: count for part, count in counter.counts.items() if count.operators}
            if not shown:
                raise UsageError(f"{place} holds a finished run of {method}, in which nothing is left to count: name another -o")
            return shown

        for method in only or ("gptq",):
            shown = counts(method, [{"quantize": {"method": method} | BRIEF.get(method, {})}], PARTS)
            shown["solver"] = sum((count for part, count in shown.items() if part not in BEFORE_SOLVER), OperatorCount())
            rows += [{"method": method, "shape": name, "part": part} | asdict(count) for part, count in shown.items()]
        for method in () if only else TRAINED:
            stages: list[dict[str, Settings]] = [{"quantize": {"method": "rtn", "bits": 4}}, {"recover": {"method": method} | STEP}]
            step = counts(method, stages, TRAINING)[STEP_PART]
            rows.append({"method": method, "shape": name, "part": STEP_PART} | {key: value // STEPS for key, value in asdict(step).items()})
    return rows
