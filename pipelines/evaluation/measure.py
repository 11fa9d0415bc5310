"""Measures an artifact for the runner, reloaded from disk: perplexity and KL, bytes, bits per weight, sparsity, seconds, memory.

Numbers are stored next to the artifact, one file per protocol; another protocol measures again and recompresses nothing.
"""

import contextlib
import ctypes
import gc
import math
import resource
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...reports.record import OF_SCHEMA_1, LayerRecord, StageRecord, TextRecord, paired_difference
from ..logs import bar
from ..models.blocks import Binder, StreamedModel
from ..models.hidden import Room
from ..models.state_checkpoints import Checkpoints
from ..ranks.exchange import ONE, Ranks
from ..store.artifact import Artifact
from ..store.files import read_json
from ..store.kept import is_whole
from ..text.data import Windows
from . import perplexity
from .scores import Scores, load_scores, save_scores


@dataclass
class Peak:
    """Seconds in between, the peak of resident memory of this process (`host_bytes`), and that of the device's memory (`bytes`): on a GPU
    the allocator's, on a CPU the same."""

    device: torch.device
    seconds: float = 0.0
    bytes: int = 0
    host_bytes: int = 0
    _began: float = field(default=0.0, init=False)
    _done: threading.Event = field(default_factory=threading.Event, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    def __enter__(self) -> "Peak":
        release_memory()
        self._began = time.monotonic()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        assert self._thread is not None
        self._thread.join()
        self.seconds = time.monotonic() - self._began
        self.bytes = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else self.host_bytes

    def _sample(self) -> None:
        while True:
            self.host_bytes = max(self.host_bytes, resident_bytes())
            if self._done.wait(0.05):
                return


def release_memory() -> None:
    """Hand freed memory back to the system (glibc keeps it otherwise), so that a stage does not pay for the one before it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident_bytes() -> int:
    """Anonymous and shared resident memory now; file pages that the kernel may drop at any time are not counted."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        return (int(fields["RssAnon"].split()[0]) + int(fields["RssShmem"].split()[0])) * 1024
    except (OSError, KeyError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class ForwardPass:
    """Where and how exactly a model runs, and what its linears are bound to."""

    device: torch.device
    dtype: torch.dtype
    bind: Binder | None = None


@dataclass(frozen=True)
class Baseline:
    """What stages are compared with: the artifact, and where its own scores and hidden states are kept."""

    artifact: Artifact
    metrics: Path

    def outputs(self, keys: Iterable[str], forward: ForwardPass) -> dict[str, perplexity.BaselineOutputs]:
        """As a teacher under each protocol, where its states were kept."""
        paths = {key: _hidden_path(self.metrics, key) for key in keys}
        kept = {key: perplexity.hidden_reader(path) for key, path in paths.items() if is_whole(path)}
        logits = StreamedModel(self.artifact, forward.device, forward.dtype).logits if kept else None
        return {} if logits is None else {key: perplexity.BaselineOutputs(hidden_TD, logits) for key, hidden_TD in kept.items()}


def _hidden_path(metrics: Path, key: str) -> Path:
    return metrics / f"{key}.hidden.safetensors"


def scores_of(
    artifact: Artifact,
    metrics: Path,
    texts: Mapping[str, Windows],
    baseline: Baseline | None,
    forward: ForwardPass,
    label: str = "perplexity, blocks",
    ranks: Ranks = ONE,
) -> dict[str, tuple[Scores, dict[str, object]]]:
    """Scores on each text: read if they were measured, else measured, all in one pass through the blocks, and kept. Without a baseline (this is
    it) the last hidden states are kept as well, for the stages that follow. Several ranks share the windows; rank 0 reads and keeps."""
    keys = {name: perplexity.protocol_key(windows) for name, windows in texts.items()}
    by_key = {keys[name]: windows for name, windows in texts.items()}
    result = ranks.broadcast(_kept(metrics, by_key, baseline is None) if ranks.leads else None)
    missing = {key: windows for key, windows in by_key.items() if key not in result}
    if missing:
        result |= _measured(artifact, metrics, missing, baseline, forward, label, ranks)
    if ranks.leads:  # also what a kill left behind the last text that was kept
        Checkpoints(metrics, {}).forget()
    return {name: result[key] for name, key in keys.items()}


def _kept(metrics: Path, keys: Iterable[str], with_states: bool) -> dict[str, tuple[Scores, dict[str, object]]]:
    """What was measured before."""
    wanted = [key for key in keys if not with_states or is_whole(_hidden_path(metrics, key))]
    return {key: scores for key in wanted if (scores := load_scores(metrics / f"{key}.json")) is not None}


def _measured(
    artifact: Artifact,
    metrics: Path,
    texts: Mapping[str, Windows],
    baseline: Baseline | None,
    forward: ForwardPass,
    label: str,
    ranks: Ranks,
) -> dict[str, tuple[Scores, dict[str, object]]]:
    """Scores that are not there yet, by the key of their protocol; a killed pass goes on where it was. A text's seconds are its share of the pass,
    by tokens."""
    began = time.monotonic()
    model = StreamedModel(artifact, forward.device, forward.dtype, forward.bind)
    teachers = {} if baseline is None else baseline.outputs(texts, forward)
    room = Room.measured(forward.device, metrics)
    with bar(label, model.structure.blocks) as shown:
        pairs = {key: (windows, teachers.get(key)) for key, windows in texts.items()}
        scored = perplexity.score_texts(model, pairs, lambda done, total: shown.advance(), room, ranks, metrics)
    a_token = (time.monotonic() - began) / sum(windows.ids.numel() for windows in texts.values())
    result: dict[str, tuple[Scores, dict[str, object]]] = {}
    for key, (scores, hidden) in scored.items():
        windows = texts[key]
        extra: dict[str, object] = {"bits_per_byte": perplexity.bits_per_byte(scores, windows)}
        extra |= {"evaluation_seconds": windows.ids.numel() * a_token, "evaluation_tokens": windows.ids.numel()}
        whole = perplexity.whole_states(hidden, windows, ranks, room) if baseline is None else None
        if ranks.leads:
            metrics.mkdir(parents=True, exist_ok=True)
            if whole is not None:
                whole.save(_hidden_path(metrics, key))
            save_scores(metrics / f"{key}.json", scores, windows.protocol, extra)
        result[key] = scores, extra
    ranks.barrier()
    return result


def size_of(artifact: Artifact) -> dict[str, Any]:
    """bits_per_weight and sparsity over the compressed linears (None without any), total_bytes, and both by layer."""
    bits = weights = removed = 0.0
    per_layer = {}
    for name in artifact.linears:
        stored = artifact.stored(name)
        count = stored.shape[0] * stored.shape[1]
        sparsity = stored.sparsity()
        per_layer[name] = {
            "bits_per_weight": stored.bits_per_weight(),
            "sparsity": sparsity,
            "rank": stored.low_rank.rank if stored.low_rank is not None else None,
        }
        bits, weights, removed = bits + stored.stored_bits(), weights + count, removed + sparsity * count
    return {
        "bits_per_weight": bits / weights if weights else None,
        "sparsity": removed / weights if weights else None,
        "total_bytes": artifact.total_bytes(),
        "layers": per_layer,
    }


def text_record(scores: perplexity.Scores, extra: Mapping[str, Any], baseline: perplexity.Scores | None) -> TextRecord:
    """Of a further evaluation text; `baseline` None: it is the baseline's own."""
    difference, error = (None, None) if baseline is None else paired_difference(scores.nll, baseline.nll)
    return TextRecord(
        perplexity=scores.perplexity,
        bits_per_byte=extra.get("bits_per_byte"),
        nll_difference=difference,
        nll_difference_stderr=error,
        kl_to_baseline=_mean(scores.kl),
        top1_agreement=_mean(scores.top1),
    )


def _mean(values: Sequence[float] | None) -> float | None:
    return math.fsum(values) / len(values) if values else None


@dataclass(frozen=True)
class Measured:
    """A stage's scores and what was measured with them, the baseline's scores, and those of the stage before (None: it is the baseline)."""

    scores: Scores
    extra: Mapping[str, Any]
    baseline: Scores
    previous: Scores | None


def stage_record(
    address: str, method: str | None, settings: Mapping[str, object], metrics: Path, size: Mapping[str, Any], measured: Measured
) -> StageRecord:
    """A stage's record from the files of its metrics."""
    scores, extra, baseline, previous = measured.scores, measured.extra, measured.baseline, measured.previous
    path = metrics / "stage.json"
    stage = read_json(path, "delete it and its stage, and run again") if path.is_file() else {}
    difference, error = paired_difference(scores.nll, baseline.nll)
    before, before_error = paired_difference(scores.nll, previous.nll) if previous is not None else (None, None)
    errors = {layer["name"]: layer for layer in stage.get("layers", [])}
    layers = tuple(
        LayerRecord(
            name,
            relative_output_error=errors.get(name, {}).get("output_error"),
            bits_per_weight=values["bits_per_weight"],
            rank=values["rank"],
            sparsity=values["sparsity"],
            metrics=_metrics_of(errors.get(name, {})),
        )
        for name, values in size["layers"].items()
    )
    return StageRecord(
        stage=address,
        method=method,
        perplexity=scores.perplexity,
        bits_per_byte=extra.get("bits_per_byte"),
        nll_difference=difference if previous is not None else None,
        nll_difference_stderr=error if previous is not None else None,
        nll_difference_previous=before,
        nll_difference_previous_stderr=before_error,
        kl_to_baseline=_mean(scores.kl),
        top1_agreement=_mean(scores.top1),
        total_bytes=size["total_bytes"],
        bits_per_weight=size["bits_per_weight"],
        sparsity=size["sparsity"],
        seconds=stage.get("seconds"),
        peak_bytes=stage.get("peak_bytes"),
        trainable_parameters=stage.get("trainable_parameters"),
        tokens_per_second=stage.get("tokens_per_second"),
        notes=tuple(stage.get("notes", [])),
        settings=settings,
        metrics=stage.get("metrics", {}),
        layers=layers,
    )


def _metrics_of(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A method's own metrics of one matrix. A stage measured before schema 2 of the report left a root under its own statistics."""
    old = {OF_SCHEMA_1: layer["relative_output_error"]} if layer.get("relative_output_error") is not None else {}
    return old | dict(layer.get("metrics", {}))
