"""Generation speed and resident weight bytes of a loaded model, measured the same way for every model.

Knows transformers' generate; not where a model came from.
Legend: N prompts, T tokens.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels.linear import resident_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Speed", "measure", "resident_bytes", "tokens_per_second"]


@dataclass(frozen=True)
class Speed:
    """Medians over the repeats: tokens a second once the prompt has been read, seconds to read it, seconds of both in total; `samples`
    are all the tokens a second."""

    tokens_per_second: float
    prompt_seconds: float
    whole_seconds: float
    samples: tuple[float, ...]


def measure(models: Mapping[str, Any], prompt_1T: Tensor, new_tokens: int, repeats: int) -> dict[str, Speed]:
    """Every model in turn, `repeats` times after one warm-up, so that what else happens on the machine hits all of them alike."""
    for model in models.values():
        _seconds(model, prompt_1T, 2)
    seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            first, whole = _seconds(model, prompt_1T, 1), _seconds(model, prompt_1T, new_tokens)
            seen[name].append((first, whole, (new_tokens - 1) / max(whole - first, 1e-9)))
    return {name: _speed(rows) for name, rows in seen.items()}


def tokens_per_second(model: "PreTrainedModel", prompt_1T: Tensor, new_tokens: int = 16) -> float:
    """One quick measurement: greedy tokens after a prompt, the time to read it left out."""
    return measure({"": model}, prompt_1T, new_tokens, 1)[""].tokens_per_second


def _speed(rows: Sequence[tuple[float, float, float]]) -> Speed:
    prompts, wholes, rates = zip(*rows, strict=True)
    return Speed(statistics.median(rates), statistics.median(prompts), statistics.median(wholes), rates)


def _seconds(model: Any, prompt_1T: Tensor, new_tokens: int) -> float:
    """Greedy generation of exactly so many tokens with a key-value cache."""
    device = next(model.parameters()).device
    prompt = prompt_1T.to(device)
    settings: dict[str, object] = {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "use_cache": True,
        "pad_token_id": 0,
    }
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=new_tokens, max_new_tokens=new_tokens, **settings
        )
    wait()
    return time.perf_counter() - begun
