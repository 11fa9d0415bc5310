"""Tiny randomly initialised models of every family that the walker promises."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

COMMON: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "mistral": {"sliding_window": 16},
    "phi3": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 32, "hidden_size": 64, "num_key_value_heads": 4},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "num_key_value_heads": 4},
    "gpt_neox": {"num_key_value_heads": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}

OTHERS: dict[str, dict[str, Any]] = {"mamba": {"state_size": 8, "time_step_rank": 16}}
"""Without attention, virtual tokens and calls of every linear."""


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """`changes` of the config, e.g. vocab_size."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**COMMON, **(FAMILIES | OTHERS)[family], **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def save_tiny(family: str, directory: Path) -> Any:
    """Save the model of a family as a Hugging Face directory and return it."""
    model = tiny_model(family)
    model.save_pretrained(directory)
    return model


def save_speaking(family: str, directory: Path, tokenizer: Path, **changes: Any) -> Any:
    """The same with the tokenizer of another model directory. Weights are large enough for compression to show."""
    size = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    model = tiny_model(family, vocab_size=size, init_std=0.12, initializer_range=0.12, **changes)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, directory / name)
    return model
