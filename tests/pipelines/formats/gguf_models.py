"""Tiny random models of every family that GGUF files are written for, their linears on a grid and with the small model's tokenizer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = dict(
    vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=128,
)  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
GGUF_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 32}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3 rope": ("llama", {"rope_parameters": _LLAMA3}),
    "llama linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 7}),
    "phi3": ("phi3", {"pad_token_id": 0}),
}
"""Name → (model_type, changes of COMMON)."""


def made(name: str, case: Callable[..., Any], on_grid: Callable[..., Any], tokenizer: Path, **changes: Any) -> Any:
    """A case of tests/pipelines/formats/conftest.py."""
    kind, own = GGUF_MODELS[name]
    actual = case(kind, lambda weight: on_grid(weight, group_size=32, symmetric=True), **{**COMMON, **own, **changes})
    return replace(actual, checkpoint=replace(actual.checkpoint, files=tokenizer))
