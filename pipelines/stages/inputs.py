"""The texts of a run, as token ids: loaded once, on first use. Knows the recipe and `data`; no stages."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...recover.student import Batch
from ..errors import InputError
from ..evaluation.tasks import load_tasks
from ..models.source import load_config, load_tokenizer, refuse_unknown_tokens, resolve_model
from ..recipes.mixture import SELF, parse_mixture
from ..recipes.recipe import Recipe
from ..recipes.sections import text_name
from ..recipes.stage_settings import StageSpec, methods
from ..text import data
from ..text.sources import Body
from .baseline import fingerprint
from .self_text import is_written, self_text

HELD_OUT_TOKENS = 4096
HELD_OUT_BATCH = 1024
"""Tokens of a held-out batch where the training's are smaller: what is rebuilt for a batch is rebuilt as often."""


@dataclass
class Inputs:
    """`model` is the local model directory, whose tokenizer cuts every text; `device` is where it writes text itself."""

    recipe: Recipe
    model: Path
    device: str = "cpu"
    _kept: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.model)

    @cached_property
    def parts(self) -> data.Parts:
        """calibration, train, held_out and evaluation, with evaluation text kept out of the other three."""
        sources, also = self.recipe.data, self.recipe.evaluation.also
        calibration, train = ([share.source for share in parse_mixture(text)] for text in (sources.calibration, sources.train))
        return data.Parts(calibration, train, sources.evaluation, also, self.tokenizer, self._written)

    def evaluation(self) -> data.Windows:
        return self._evaluated(self.recipe.data.evaluation)

    def also(self) -> dict[str, data.Windows]:
        """The further evaluation texts, by the name that reports give them."""
        return {text_name(source): self._evaluated(source) for source in self.recipe.evaluation.also}

    @cached_property
    def tasks(self) -> dict[str, Any]:
        """What lm-eval scores, by name."""
        return load_tasks(self.recipe.evaluation.tasks)

    def calibration(self) -> Tensor:
        """Token ids int64 [samples, seq_len]: every source's share of them."""
        wanted, mixed = self.recipe.calibration, parse_mixture(self.recipe.data.calibration)
        if "calibration ids" not in self._kept:
            at = data.schedule([share.weight for share in mixed])
            counts = Counter(at(index)[0] for index in range(wanted.samples))
            result = [
                self._windows("calibration", mixed[i].source, wanted.seq_len, counts[i], self.recipe.seed).ids for i in sorted(counts)
            ]
            self._kept["calibration ids"] = torch.cat(result)
        return self._kept["calibration ids"]

    def training(self, seq_len: int, batch_size: int) -> Callable[[int], Batch]:
        """index → micro-batch: a pure function of (seed, index). Each is of one source, which takes its turn by its weight."""
        mixed = parse_mixture(self.recipe.data.train)
        windows = [self._teaching(self._windows("train", share.source, seq_len, None), share.source) for share in mixed]
        for share, result in zip(mixed, windows, strict=True):
            if len(result.ids) < batch_size:
                raise InputError(
                    f"{share.source}: {len(result.ids)} windows of {seq_len} tokens are less than one batch of {batch_size}; "
                    "give more text (--train), or a smaller recover.batch_size or recover.seq_len"
                )
        at = data.schedule([share.weight for share in mixed])

        def draw(index: int) -> Batch:
            which, turn = at(index)
            return self._batch(mixed[which].source, *data.batch(windows[which], turn, self.recipe.seed, batch_size))

        return draw

    def held_out(self, seq_len: int, batch_size: int) -> list[Batch]:
        """The batches on which recovery chooses its best step: about HELD_OUT_TOKENS tokens, as many of every source."""
        mixed = parse_mixture(self.recipe.data.train)
        count = max(1, HELD_OUT_TOKENS // seq_len // len(mixed))
        batches = []
        for source in (share.source for share in mixed):
            windows = self._teaching(self._windows("held_out", source, seq_len, count, self.recipe.seed), source)
            size = held_out_size(seq_len, batch_size)
            pieces = [slice(start, start + size) for start in range(0, len(windows.ids), size)]
            batches += [self._batch(source, windows.ids[p], None if windows.loss is None else windows.loss[p]) for p in pieces]
        return batches

    def check(self, specs: Iterable[StageSpec], writes: bool = True) -> None:
        """InputError for texts that these stages cannot work on: missing, too short, of another tokenizer; and for tasks. Unless it `writes`, mixtures with text
        that the model has yet to write are left to the run."""
        self.evaluation()
        self.also()
        _ = self.tasks
        written = {use: self._is_mixed_in(use) for use in ("calibration", "train")}
        for spec in specs:
            if spec.name == "recover" and (writes or not written["train"]):
                self.training(spec.config.seq_len, spec.config.batch_size)
                self.held_out(spec.config.seq_len, spec.config.batch_size)
            if _needs(spec, methods(spec.name)[spec.method]) and (writes or not written["calibration"]):
                self.calibration()

    def to_write(self, specs: Iterable[StageSpec]) -> bool:
        """Whether a run of these stages begins with text that the model has yet to write."""
        reads = {
            "train" if spec.name == "recover" else "calibration"
            for spec in specs
            if spec.name == "recover" or _needs(spec, methods(spec.name)[spec.method])
        }
        return any(map(self._is_mixed_in, reads)) and not is_written(self._writer(), self.tokenizer, self.recipe.seed)

    def _is_mixed_in(self, use: str) -> bool:
        return any(share.source == SELF for share in parse_mixture(getattr(self.recipe.data, use)))

    def _batch(self, source: str, ids_BT: Tensor, loss_BT: Tensor | None) -> Batch:
        return Batch(ids_BT, loss_BT, source, generated=source == SELF)

    def _teaching(self, windows: data.Windows, source: str) -> data.Windows:
        """Without the windows that hold no token of a completion. InputError when none is left."""
        if windows.loss is None:
            return windows
        kept = windows.loss[:, 1:].any(1)
        if not bool(kept.any()):
            raise InputError(
                f"{source}: none of {len(kept)} windows of {windows.ids.shape[1]} tokens holds a token of a completion; "
                "give longer completions, or a larger recover.seq_len"
            )
        return data.Windows(windows.ids[kept], windows.loss[kept], windows.protocol)

    def _evaluated(self, source: str) -> data.Windows:
        wanted = self.recipe.evaluation
        return self._windows("evaluation", source, wanted.seq_len, wanted.windows)

    def _windows(self, part: str, source: str, seq_len: int, count: int | None, seed: int | None = None) -> data.Windows:
        key = f"{part}:{source}:{seq_len}:{count}:{seed}"
        if key not in self._kept:
            self._kept[key] = data.tokenize(self.parts[part][source], self.tokenizer, seq_len, count, seed=seed)
            refuse_unknown_tokens(load_config(self.model), self._kept[key].ids, source)
        return self._kept[key]

    def _written(self) -> Body:
        """What the teacher, else the model itself, writes."""
        return self_text(self._writer(), self.tokenizer, self.recipe.seed, torch.device(self.device))

    def _writer(self) -> Path:
        chosen = self.recipe
        return resolve_model(chosen.teacher) if chosen.teacher else resolve_model(chosen.model, chosen.revision)

    def fingerprint(self, spec: StageSpec, row: object) -> list[Any]:
        """Whatever of the data decides a stage's result: nothing for a method that reads no text."""
        if spec.name == "recover":
            mixed = parse_mixture(self.recipe.data.train)
            parts = [self.parts[part][share.source].protocol for part in ("train", "held_out") for share in mixed]
            parts += [] if len(mixed) == 1 else [[share.weight for share in mixed]]
            return [*parts, self.calibration_fingerprint() if _needs(spec, row) else None, self.teacher_fingerprint()]
        return [self.calibration_fingerprint() if _needs(spec, row) else None]

    def reads_calibration(self, spec: StageSpec, row: object) -> bool:
        """Whether a stage's result depends on the calibration text."""
        return _needs(spec, row)

    def teacher_fingerprint(self) -> str | None:
        """Names the weights of the model given with --teacher."""
        if self.recipe.teacher is None:
            return None
        return fingerprint(resolve_model(self.recipe.teacher))

    def calibration_fingerprint(self) -> str:
        """Hash of the very tokens."""
        ids = self.calibration()
        return hashlib.sha256(json.dumps([list(ids.shape)]).encode() + ids.to(torch.int64).numpy().tobytes()).hexdigest()


def held_out_size(seq_len: int, batch_size: int) -> int:
    """Windows of a held-out batch."""
    return max(batch_size, HELD_OUT_BATCH // seq_len)


def _needs(spec: StageSpec, row: object) -> bool:
    needs = getattr(row, "needs", None)
    if needs is None:
        return False
    result = needs(spec.config) if callable(needs) else needs
    return bool(result) or getattr(row, "scope", "matrix") == "block"
