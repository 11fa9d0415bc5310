"""Llama models of any shape with random weights, a tokenizer made on the spot and text for it: for measuring time and memory, not quality.

Tensors are drawn one by one and written in shards, so that a model larger than memory can be written. Knows nothing of stages.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formats.shards import write_shards

if TYPE_CHECKING:
    from transformers import LlamaConfig


@dataclass(frozen=True)
class Shape:
    """Of a Llama with an output head of its own, which knows so many `positions`."""

    blocks: int
    width: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int = 2048


SHAPES = {
    "135m": Shape(30, 576, 1536, 9, 3, 49_152),
    "1b": Shape(22, 2048, 5632, 32, 4, 32_000),
    "8b": Shape(32, 4096, 14336, 32, 8, 128_256, 8192),
    "70b": Shape(80, 8192, 28672, 64, 8, 128_256, 8192),
    "405b": Shape(126, 16384, 53248, 128, 8, 128_256, 131_072),
}
"""The shapes of SmolLM2-135M (162,826,560 parameters, its head not tied), TinyLlama (1,100,048,384 parameters), Llama 3 8B (8,030,261,248), Llama 3 70B
(70,553,706,496) and Llama 3.1 405B (405,853,388,800)."""
SHARD_BYTES = 500_000_000


def config_of(shape: Shape) -> "LlamaConfig":
    """The model's configuration as transformers has it, in bfloat16."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.intermediate, num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, max_position_embeddings=shape.positions, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], dtype=torch.bfloat16, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def write_model(directory: Path, shape: Shape, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> int:
    """Write the model in bfloat16 as a Hugging Face directory; its number of parameters."""
    from ..models.structure import skeleton

    config = config_of(shape)
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    _write_tokenizer(directory, shape.vocabulary)
    sizes = {name: tensor.shape for name, tensor in skeleton(config).state_dict().items()}
    write_shards(directory, _drawn(sizes, seed), shard_bytes)
    return sum(size.numel() for size in sizes.values())


def _drawn(sizes: dict[str, torch.Size], seed: int) -> Iterator[tuple[str, Tensor]]:
    """Matrices keep the scale of what passes through them; norms are 1."""
    draw = torch.Generator().manual_seed(seed)
    for name, size in sizes.items():
        if len(size) == 1:
            yield name, torch.ones(size, dtype=torch.bfloat16)
        else:
            yield name, torch.empty(size, dtype=torch.bfloat16).normal_(std=size[1] ** -0.5, generator=draw)


def _write_tokenizer(directory: Path, vocabulary: int) -> None:
    """One token for each of the words w0, w1, …"""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    made.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", eos_token="w0").save_pretrained(directory)


def write_text(file: Path, vocabulary: int, tokens: int, seed: int = 0, document: int = 512) -> None:
    """A jsonl file of documents for that tokenizer; frequencies fall as one over the rank, as those of words do."""
    weights = 1 / torch.arange(1, vocabulary + 1)
    ids = torch.multinomial(weights, tokens, replacement=True, generator=torch.Generator().manual_seed(seed))
    rows = [{"text": " ".join(f"w{i}" for i in part.tolist())} for part in ids.split(document)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
