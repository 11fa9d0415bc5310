"""The texts of a run, as token ids: loaded once, when first asked for. Knows the recipe and `data`; no stages."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import data
from .artifact import Artifact
from .models import load_tokenizer
from .recipe import Recipe
from .stage_settings import StageSpec

HELD_OUT_TOKENS = 4096


@dataclass
class Inputs:
    """`model` is the local model directory, whose tokenizer cuts every text."""

    recipe: Recipe
    model: Path
    _kept: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.model)

    def documents(self, part: str) -> data.Documents:
        """Part `calibration`, `train`, `held_out` or `evaluation`, with evaluation text kept out of the other three."""
        if part not in self._kept:
            sources = self.recipe.data
            source = {"calibration": sources.calibration, "evaluation": sources.evaluation}.get(part, sources.train)
            exclude = None if part == "evaluation" else self.documents("evaluation")
            self._kept[part] = data.load_text(source, part, tokenizer=self.tokenizer, exclude=exclude)
        return self._kept[part]

    def evaluation(self) -> data.Windows:
        wanted = self.recipe.evaluation
        return data.tokenize(self.documents("evaluation"), self.tokenizer, wanted.seq_len, wanted.windows)

    def calibration(self) -> Tensor:
        """Token ids int64 [samples, seq_len]."""
        wanted = self.recipe.calibration
        return data.calibration_sample(self.documents("calibration"), self.tokenizer, wanted.seq_len, wanted.samples, self.recipe.seed)

    def training(self, seq_len: int, batch_size: int) -> Callable[[int], tuple[Tensor, Tensor | None]]:
        """index → (ids int64 [batch, seq_len], loss mask or None): a pure function of (seed, index)."""
        return data.training_batches(self.documents("train"), self.tokenizer, seq_len, batch_size, self.recipe.seed)

    def held_out(self, seq_len: int, batch_size: int) -> list[tuple[Tensor, Tensor | None]]:
        """The batches on which recovery chooses its best step: about HELD_OUT_TOKENS tokens."""
        windows = max(1, HELD_OUT_TOKENS // seq_len)
        return data.held_out_batches(self.documents("held_out"), self.tokenizer, seq_len, batch_size, windows)

    def teacher(self, baseline: Artifact) -> Artifact:
        """Whose predictions recovery imitates: the baseline, or the model given with --teacher."""
        if self.recipe.teacher is None:
            return baseline
        raise NotImplementedError

    def fingerprint(self, spec: StageSpec, row: Any) -> list[Any]:
        """Whatever of the data decides a stage's result: nothing for a method that reads no text."""
        if spec.name == "recover":
            parts = [self.documents("train").fingerprint, self.documents("held_out").fingerprint]
            return [*parts, self.calibration_fingerprint() if _needs(spec, row) else None, self.recipe.teacher]
        return [self.calibration_fingerprint() if _needs(spec, row) else None]

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
