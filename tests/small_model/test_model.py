"""The small model is what its README says: small, trained, hurt by rounding, and tested on text it has not seen."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.pipelines.text.data import load_text, tokenize
from bitmend.pipelines.text.splits import PARTS
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def windows(small_model: Path, small_text: Path) -> Tensor:
    documents = load_text(str(small_text), "evaluation", roles=PARTS)
    return tokenize(documents, AutoTokenizer.from_pretrained(small_model), 128, 48).ids


@pytest.fixture(scope="module")
def model(small_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(small_model)


@torch.inference_mode()
def perplexity(model: Any, windows_NT: Tensor) -> float:
    return math.exp(functional.cross_entropy(model(windows_NT).logits[:, :-1].flatten(0, 1), windows_NT[:, 1:].flatten()).item())


def linears(model: Any) -> list[nn.Linear]:
    return [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]


def test_it_is_small_and_divisible(small_model: Path, small_text: Path, model: Any):
    assert (small_model / "model.safetensors").stat().st_size <= 3_000_000
    assert small_text.stat().st_size <= 400_000
    assert sum(parameter.numel() for parameter in model.parameters()) == 722_048
    assert all(linear.in_features % 64 == 0 for linear in linears(model))


def test_every_excerpt_names_its_article(small_text: Path):
    rows = [json.loads(line) for line in small_text.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 38 and all(row["url"].startswith("https://en.wikipedia.org/wiki/") and row["title"] for row in rows)


def test_it_has_learned(model: Any, windows: Tensor):
    assert 25 < perplexity(model, windows) < 40


def test_rounding_hurts_by_bits(model: Any, windows: Tensor):
    actual = [perplexity(model, windows)]
    for bits in (4, 3, 2):
        rounded = copy.deepcopy(model)
        for linear in linears(rounded):
            groups = linear.weight.data.reshape(-1, 64)
            low = groups.amin(1, keepdim=True)
            step = (groups.amax(1, keepdim=True) - low) / (2**bits - 1)
            linear.weight.data = (((groups - low) / step).round() * step + low).view_as(linear.weight)
        actual.append(perplexity(rounded, windows))
    assert actual[0] < actual[1] < actual[2] < actual[3] and actual[3] > 1.25 * actual[0]
