"""Why a method cannot serve what a model's linears are made of, or None where it can: one function a reason.

Kinds are those of `site.kinds`. Knows kinds and settings; not models, records or which method asks.
"""

from collections.abc import Callable
from typing import Any

from . import attach as methods

Refusal = Callable[[frozenset[str], Any], str | None]


def nothing(kinds: frozenset[str], config: object) -> str | None:
    return None


def quantized(kinds: frozenset[str]) -> bool:
    return bool(kinds & {"uniform", "normal_float", "ggml"})


def needs_grid(kinds: frozenset[str], config: object) -> str | None:
    return (
        None
        if "dense" not in kinds
        else "it trains a grid, and some of the chosen linears are dense: quantize first, or choose lora, perp or full"
    )


def scales(kinds: frozenset[str], config: methods.Scales) -> str | None:
    if config.zeros and "normal_float" in kinds:
        return "a NormalFloat weight has no zero points: set zeros=false"
    if config.zeros and "ggml" in kinds:
        return "the types of GGUF have no zero points, and their minima train with the scales: set zeros=false"
    return None if config.scales == "auto" and quantized(kinds) else needs_grid(kinds, config)


def full(kinds: frozenset[str], config: object) -> str | None:
    return "the weights are quantized: choose qat (grid held) or dequantize_train_requantize" if quantized(kinds) else None


def perp(kinds: frozenset[str], config: methods.Perp) -> str | None:
    if config.lora != "none" and quantized(kinds):
        return f"{config.lora} merges into dense weights; on a quantized base use lora, or perp with lora=none"
    return None


def qa_lora(kinds: frozenset[str], config: object) -> str | None:
    if "masked" in kinds:
        return "float zero points move masked weights off 0: choose scales or lora for a pruned model"
    return "it merges into the zero points of a uniform grid" if kinds & {"dense", "normal_float", "ggml"} else None


def needs_uniform(kinds: frozenset[str], config: object) -> str | None:
    return (
        "its increments are whole steps of a uniform grid, which NormalFloat and the types of GGUF have not"
        if kinds & {"normal_float", "ggml"}
        else needs_grid(kinds, config)
    )


def diff_pruning(kinds: frozenset[str], config: object) -> str | None:
    return "its delta sees the raw input, and this base rounds its own: choose pafi or fish_mask" if "activations" in kinds else None


def lora(kinds: frozenset[str], config: methods.Lora) -> str | None:
    if config.scales is True and "dense" in kinds:
        return "scales=true trains a grid, and some of the chosen linears are dense: set scales=auto"
    return None


def qlora(kinds: frozenset[str], config: methods.Lora) -> str | None:
    return lora(kinds, config) if quantized(kinds) else "it is LoRA on a quantized base, and nothing is quantized: choose lora"


def from_decomposition(kinds: frozenset[str], config: methods.Lora) -> str | None:
    if "low_rank" in kinds:
        return lora(kinds, config)
    return "it trains the factors of a decomposition, and there are none: put a decompose stage before it, or choose qlora"


def svft(kinds: frozenset[str], config: object) -> str | None:
    if "quantized_factors" not in kinds:
        return None
    return (
        "its term is stacked onto factors that are (or may come to be) on a grid: choose lora or scales, or decompose with factor_bits=16"
    )
