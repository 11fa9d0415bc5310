"""The metrics' schema: what a run measured after every stage, as frozen records that go to JSON and back.

Knows names, units and what follows from two numbers; not how anything was measured.
A field that does not apply is None (null in JSON). JSON has no infinities: a number that is not finite becomes null and
the stage's notes say which one it was.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from .json_values import JsonObject, as_json, finite

SCHEMA = 2
OF_SCHEMA_1 = "root_relative_error"
"""Under this name a layer's metrics hold what schema 1 called `relative_output_error`: a root, under the statistics that its method collected."""


@dataclass(frozen=True)
class Protocol:
    """How perplexity was measured; two numbers compare only under the same protocol. `dtype`: that of the forward pass."""

    dataset: str | None = None
    split: str | None = None
    fingerprint: str | None = None
    tokenizer: str | None = None
    join: str | None = None
    bos: bool | None = None
    seq_len: int | None = None
    windows: int | None = None
    tokens: int | None = None
    details: Mapping[str, object] = field(default_factory=dict)
    dtype: str | None = None
    device: str | None = None

    def to_json(self) -> JsonObject:
        return _plain(self, [])

    def identity(self) -> str:
        """Equal where perplexities compare."""
        known = {**self.to_json(), "details": None, "device": None}  # the same sums on another device differ by rounding
        known["dtype"] = known["dtype"] or "float32"  # measured before protocols recorded a dtype
        return json.dumps(known, sort_keys=True)

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> "Protocol":
        return cls(**_known(cls, data, "protocol"))


@dataclass(frozen=True)
class LayerRecord:
    """One compressed linear. `block` and `role` are read from the name where they are not given. relative_output_error:
    E‖(W − Ŵ)x‖² / E‖Wx‖² on some of the stage's inputs, W the baseline's, the same quantity for every method.

    `metrics` holds what only some methods have; the pages know `predicted_loss` and `measured_loss` (allocation).
    """

    name: str
    relative_output_error: float | None = None
    bits_per_weight: float | None = None
    rank: int | None = None
    sparsity: float | None = None
    block: int | None = None
    role: str | None = None
    metrics: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        block, role = place_of(self.name)
        if self.block is None:
            object.__setattr__(self, "block", block)
        if self.role is None:
            object.__setattr__(self, "role", role)

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> "LayerRecord":
        return cls(**_known(cls, data, f"layer {data.get('name', '?')!r}"))


@dataclass(frozen=True)
class TextRecord:
    """The numbers of a further evaluation text; as in StageRecord."""

    perplexity: float | None = None
    perplexity_ratio: float | None = None
    bits_per_byte: float | None = None
    nll_difference: float | None = None
    nll_difference_stderr: float | None = None
    kl_to_baseline: float | None = None
    top1_agreement: float | None = None
    gap_closed: float | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> "TextRecord":
        return cls(**_known(cls, data, "text"))


@dataclass(frozen=True)
class TaskRecord:
    """A metric of a task: its score with the standard error over `documents`, and the score minus the baseline's with the paired one.
    `version`: the task's own, or the first digits of its file's sha256."""

    score: float | None = None
    stderr: float | None = None
    documents: int | None = None
    version: str | None = None
    difference: float | None = None
    difference_stderr: float | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> "TaskRecord":
        return cls(**_known(cls, data, "task"))


@dataclass(frozen=True)
class StageRecord:
    """What is true of the artifact a stage left on disk, and what making it took.

    perplexity_ratio: to the baseline. nll_difference ± nll_difference_stderr: mean negative log-likelihood per token minus
    the baseline's, in nats, with the paired standard error over windows; nll_difference_previous likewise against the stage
    before. kl_to_baseline: nats per token. top1_agreement, sparsity, gap_closed: fractions. bits_per_weight: over the
    compressed linears, everything they store. total_bytes: the artifact's weights on disk. settings: the stage's resolved
    configuration. metrics: whatever else was measured. texts: by name, the same on the further evaluation texts.
    tasks: by the task's name and its metric.
    """

    stage: str
    method: str | None = None
    perplexity: float | None = None
    perplexity_ratio: float | None = None
    bits_per_byte: float | None = None
    nll_difference: float | None = None
    nll_difference_stderr: float | None = None
    nll_difference_previous: float | None = None
    nll_difference_previous_stderr: float | None = None
    kl_to_baseline: float | None = None
    top1_agreement: float | None = None
    gap_closed: float | None = None
    total_bytes: int | None = None
    bits_per_weight: float | None = None
    sparsity: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    trainable_parameters: int | None = None
    tokens_per_second: float | None = None
    notes: tuple[str, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, object] = field(default_factory=dict)
    layers: tuple[LayerRecord, ...] = ()
    texts: Mapping[str, TextRecord] = field(default_factory=dict)
    tasks: Mapping[str, TaskRecord] = field(default_factory=dict)

    def to_json(self) -> JsonObject:
        lost: list[str] = []
        data = _plain(self, lost)
        data["notes"] = [*self.notes, *(note for name in lost if (note := f"{name} is not finite") not in self.notes)]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> "StageRecord":
        known = _known(cls, data, f"stage {data.get('stage', '?')!r}")
        known["notes"] = tuple(known.get("notes") or ())
        known["layers"] = tuple(LayerRecord.from_json(layer) for layer in known.get("layers") or ())
        known["texts"] = {name: TextRecord.from_json(text) for name, text in (known.get("texts") or {}).items()}
        known["tasks"] = {name: TaskRecord.from_json(task) for name, task in (known.get("tasks") or {}).items()}
        return cls(**known)


@dataclass(frozen=True)
class RunRecord:
    """One run: the model, the protocol of its perplexities and its stages in order.

    `environment` says where and how it ran (versions, device, command), as much as is known. `texts`: the protocols of the further
    evaluation texts, by name.
    """

    run: str
    model: str
    protocol: Protocol = field(default_factory=Protocol)
    stages: tuple[StageRecord, ...] = ()
    environment: Mapping[str, object] = field(default_factory=dict)
    texts: Mapping[str, Protocol] = field(default_factory=dict)

    def to_json(self) -> JsonObject:
        return {
            "schema": SCHEMA,
            "run": self.run,
            "model": self.model,
            "protocol": self.protocol.to_json(),
            "stages": [stage.to_json() for stage in self.stages],
            "environment": finite(self.environment),
            "texts": {name: protocol.to_json() for name, protocol in self.texts.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> "RunRecord":
        schema = data.get("schema")
        if schema not in (1, SCHEMA):
            raise ValueError(
                f"metrics of schema {schema!r}, this program reads schemas 1 and {SCHEMA}; export them again with the version that wrote them"
            )
        known = _known(cls, {key: value for key, value in data.items() if key != "schema"}, "run")
        known["protocol"] = Protocol.from_json(known.get("protocol") or {})
        known["texts"] = {name: Protocol.from_json(protocol) for name, protocol in (known.get("texts") or {}).items()}
        stages = tuple(StageRecord.from_json(stage) for stage in known.get("stages") or ())
        known["stages"] = tuple(map(_of_schema_1, stages)) if schema == 1 else stages
        return cls(**known)

    @property
    def baseline(self) -> StageRecord | None:
        """The stage named `baseline`, else the first one."""
        named = [stage for stage in self.stages if stage.stage == "baseline"]
        return named[0] if named else (self.stages[0] if self.stages else None)


def _of_schema_1(stage: StageRecord) -> StageRecord:
    layers = (
        layer
        if (old := layer.relative_output_error) is None
        else replace(layer, relative_output_error=None, metrics={**layer.metrics, OF_SCHEMA_1: old})
        for layer in stage.layers
    )
    return replace(stage, layers=tuple(layers))


def dumps(record: RunRecord) -> str:
    """The JSON text of a run, ending in a newline."""
    return json.dumps(record.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def perplexity_ratio(perplexity: float | None, baseline: float | None) -> float | None:
    if not _positive(perplexity, baseline):
        return None
    assert perplexity is not None and baseline is not None
    return perplexity / baseline


def gap_closed(perplexity: float | None, previous: float | None, baseline: float | None) -> float | None:
    """1 − ln(perplexity / baseline) / ln(previous / baseline): 1 is back at the baseline, negative is further away.

    None where a number is missing or the previous stage is not above the baseline.
    """
    if not _positive(perplexity, previous, baseline):
        return None
    assert perplexity is not None and previous is not None and baseline is not None
    if previous <= baseline:
        return None
    return 1.0 - math.log(perplexity / baseline) / math.log(previous / baseline)


def paired_difference(nll: Sequence[float], reference: Sequence[float]) -> tuple[float, float | None]:
    """Mean of nll − reference over windows, and its paired standard error (None below two windows).

    Both sequences hold the mean negative log-likelihood of the same windows in the same order.
    """
    if len(nll) != len(reference) or not nll:
        raise ValueError(f"paired difference needs the same windows on both sides, got {len(nll)} and {len(reference)}")
    differences = [a - b for a, b in zip(nll, reference, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    if count < 2:
        return mean, None
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (count - 1)
    return mean, math.sqrt(variance / count)


def derive(stages: Sequence[StageRecord]) -> tuple[StageRecord, ...]:
    """The same stages with perplexity_ratio and gap_closed computed from their perplexities (first stage: the baseline)."""
    done: list[StageRecord] = []
    for stage in stages:
        baseline = done[0].perplexity if done else stage.perplexity
        previous = done[-1].perplexity if done else None
        ratio, closed = perplexity_ratio(stage.perplexity, baseline), gap_closed(stage.perplexity, previous, baseline)
        texts = {name: _derived(text, name, done) for name, text in stage.texts.items()}
        done.append(replace(stage, perplexity_ratio=ratio, gap_closed=closed, texts=texts))
    return tuple(done)


def _derived(text: TextRecord, name: str, before: Sequence[StageRecord]) -> TextRecord:
    baseline, previous = (before[place].texts[name].perplexity if before and name in before[place].texts else None for place in (0, -1))
    ratio = perplexity_ratio(text.perplexity, baseline if before else text.perplexity)
    return replace(text, perplexity_ratio=ratio, gap_closed=gap_closed(text.perplexity, previous, baseline))


def place_of(name: str) -> tuple[int | None, str]:
    """Block index and role of a module name: `model.layers.3.mlp.down_proj` → (3, "down_proj").

    The first number is the block; experts of a mixture keep the word: `….mlp.experts.5.w1` → "experts.w1".
    """
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if first is None:
        return None, parts[-1]
    inside = [part for part in parts[first + 1 :] if not part.isdigit()]
    if not inside:
        return int(parts[first]), parts[-1]
    role = inside[-1]
    expert = next((part for part in inside[:-1] if "expert" in part), None)
    return int(parts[first]), f"{expert}.{role}" if expert else role


def _positive(*values: float | None) -> bool:
    return all(value is not None and math.isfinite(value) and value > 0 for value in values)


def _plain(record: "Protocol | StageRecord", lost: list[str]) -> JsonObject:
    return {key: as_json(value, key, lost) for key, value in asdict(record).items()}


def _known(cls: type, data: Mapping[str, object], what: str) -> dict[str, Any]:
    names = {entry.name for entry in fields(cls)}
    unknown = sorted(set(data) - names)
    if unknown:
        raise ValueError(f"{what}: unknown field {unknown[0]!r}; known are {', '.join(sorted(names))}")
    return dict(data)
