"""The texts of a run, as token ids: loaded once, when first asked for. Knows the recipe and `data`; no stages."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..models.source import load_config, load_tokenizer, refuse_unknown_tokens, resolve_model
from ..recipes.recipe import Recipe
from ..recipes.stage_settings import StageSpec, methods
from ..text import data
from .baseline import fingerprint

HELD_OUT_TOKENS = 4096
_SOURCE = {"calibration": "calibration", "train": "train", "held_out": "train", "evaluation": "evaluation"}


@dataclass
class Inputs:
    """`model` is the local model directory, whose tokenizer cuts every text."""

    recipe: Recipe
    model: Path
    _kept: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.model)

    @cached_property
    def parts(self) -> dict[str, data.Documents]:
        """calibration, train, held_out and evaluation, with evaluation text kept out of the other three."""
        sources = self.recipe.data
        return data.load_parts(sources.calibration, sources.train, sources.evaluation, self.tokenizer)

    def evaluation(self) -> data.Windows:
        wanted = self.recipe.evaluation
        return self._windows("evaluation", wanted.seq_len, wanted.windows)

    def calibration(self) -> Tensor:
        """Token ids int64 [samples, seq_len]."""
        wanted = self.recipe.calibration
        return self._windows("calibration", wanted.seq_len, wanted.samples, self.recipe.seed).ids

    def training(self, seq_len: int, batch_size: int) -> Callable[[int], tuple[Tensor, Tensor | None]]:
        """index → (ids int64 [batch, seq_len], loss mask or None): a pure function of (seed, index)."""
        windows = self._teaching(self._windows("train", seq_len, None))
        if len(windows.ids) < batch_size:
            raise InputError(
                f"{self.recipe.data.train}: {len(windows.ids)} windows of {seq_len} tokens are less than one batch of {batch_size}; "
                "give more text (--train), or a smaller recover.batch_size or recover.seq_len"
            )
        return lambda index: data.batch(windows, index, self.recipe.seed, batch_size)

    def held_out(self, seq_len: int, batch_size: int) -> list[tuple[Tensor, Tensor | None]]:
        """The batches on which recovery chooses its best step: about HELD_OUT_TOKENS tokens."""
        found = self._teaching(self._windows("held_out", seq_len, max(1, HELD_OUT_TOKENS // seq_len), self.recipe.seed))
        pieces = [slice(start, start + batch_size) for start in range(0, len(found.ids), batch_size)]
        return [(found.ids[piece], None if found.loss is None else found.loss[piece]) for piece in pieces]

    def check(self, specs: Iterable[StageSpec]) -> None:
        """InputError for texts that these stages cannot work on: missing, too short, of another tokenizer."""
        self.evaluation()
        for spec in specs:
            if spec.name == "recover":
                self.training(spec.config.seq_len, spec.config.batch_size)
                self.held_out(spec.config.seq_len, spec.config.batch_size)
            if _needs(spec, methods(spec.name)[spec.method]):
                self.calibration()

    def _teaching(self, windows: data.Windows) -> data.Windows:
        """Without the windows that hold no token of a completion. InputError when none is left."""
        if windows.loss is None:
            return windows
        kept = windows.loss[:, 1:].any(1)
        if not bool(kept.any()):
            raise InputError(
                f"{self.recipe.data.train}: none of {len(kept)} windows of {windows.ids.shape[1]} tokens holds a token of a completion; "
                "give longer completions, or a larger recover.seq_len"
            )
        return data.Windows(windows.ids[kept], windows.loss[kept], windows.protocol)

    def _windows(self, part: str, seq_len: int, count: int | None, seed: int | None = None) -> data.Windows:
        key = f"{part}:{seq_len}:{count}:{seed}"
        if key not in self._kept:
            self._kept[key] = data.tokenize(self.parts[part], self.tokenizer, seq_len, count, seed=seed)
            refuse_unknown_tokens(load_config(self.model), self._kept[key].ids, getattr(self.recipe.data, _SOURCE[part]))
        return self._kept[key]

    def fingerprint(self, spec: StageSpec, row: Any) -> list[Any]:
        """Whatever of the data decides a stage's result: nothing for a method that reads no text."""
        if spec.name == "recover":
            parts = [self.parts[part].protocol for part in ("train", "held_out")]
            return [*parts, self.calibration_fingerprint() if _needs(spec, row) else None, self.teacher_fingerprint()]
        return [self.calibration_fingerprint() if _needs(spec, row) else None]

    def teacher_fingerprint(self) -> str | None:
        """Names the weights of the model given with --teacher."""
        if self.recipe.teacher is None:
            return None
        return fingerprint(resolve_model(self.recipe.teacher))

    def calibration_fingerprint(self) -> str:
        """Hash of the very tokens."""
        if "calibration ids" not in self._kept:
            ids = self.calibration()
            self._kept["calibration ids"] = hashlib.sha256(
                json.dumps([list(ids.shape)]).encode() + ids.to(torch.int64).numpy().tobytes()
            ).hexdigest()
        return self._kept["calibration ids"]


def _needs(spec: StageSpec, row: Any) -> bool:
    needs = getattr(row, "needs", None)
    if needs is None:
        return False
    found = needs(spec.config) if callable(needs) else needs
    return bool(found) or getattr(row, "scope", "matrix") == "block"
