"""The scores of one artifact under one evaluation protocol, in memory and as the file that keeps them. Knows no model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..store.files import read_json, write_json


@dataclass(frozen=True)
class Scores:
    """Per window: mean NLL in nats over its predicted tokens and, against a teacher, mean KL(teacher ‖ model) and top-1 agreement.
    Where only some tokens count, a window's sum is over those, divided by how many of them a window has on average, so that the mean over
    windows is the mean over counted tokens."""

    nll: tuple[float, ...]
    kl: tuple[float, ...] | None
    top1: tuple[float, ...] | None

    @property
    def perplexity(self) -> float:
        mean = math.fsum(self.nll) / len(self.nll)
        return math.exp(mean) if mean < 700 else math.inf


def save_scores(path: Path, scores: Scores, protocol: Mapping[str, object], extra: Mapping[str, object]) -> None:
    """One JSON file for one artifact under one protocol."""
    record = {"protocol": protocol, "nll": scores.nll, "kl": scores.kl, "top1": scores.top1, **extra}
    write_json(path, record)


def load_scores(path: Path) -> tuple[Scores, dict[str, object]] | None:
    """None when not measured yet."""
    if not path.is_file():
        return None
    try:
        record = read_json(path, "delete it and run again")
        kl, top1 = record["kl"], record["top1"]
        return Scores(tuple(record["nll"]), kl and tuple(kl), top1 and tuple(top1)), record
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not a measurement of this program ({error}); delete it and run again") from error
