"""Tiny random models, every kind of compressed record, and text to train on."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from bitmend.compress import grids, normal_float
from bitmend.compress.ggml_grids import round_ggml
from bitmend.compress.ggml_types import GGML_TYPES
from bitmend.compress.packing import pack_codes
from bitmend.compress.weights import ActivationGrid, DenseWeight, LowRank, NormalFloatWeight, SparseDelta, StoredWeight
from bitmend.recover.compressed_model import install
from bitmend.recover.scales import double_quantize
from bitmend.recover.selection import decoder_blocks
from bitmend.recover.student import Batch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

VOCABULARY = 101


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def llama(seed: int = 0, tied: bool = True) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def gpt2(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


MODELS: dict[str, Any] = {"llama": llama, "gpt2": gpt2}


def mask_of(weight_OI: torch.Tensor, pattern: str) -> torch.Tensor:
    if pattern == "2:4":
        groups = weight_OI.abs().view(weight_OI.shape[0], -1, 4)
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(2, -1).indices, True).view(weight_OI.shape)
    return weight_OI.abs() > weight_OI.abs().median()


def on_grid(weight_OI: torch.Tensor, bits: int, symmetric: bool = False, group_size: int = 16):
    grid = grids.UniformGrid(bits, group_size, symmetric)
    blocks = weight_OI.view(weight_OI.shape[0], -1, group_size)
    scale, zero = grids.min_max(blocks, grid)
    codes = grids.round_to_grid(blocks, scale, zero, grid).view(weight_OI.shape)
    return grids.to_record(codes, scale.squeeze(-1), zero.squeeze(-1), grid)


def normal_floats(weight_OI: torch.Tensor, nested: bool = False) -> NormalFloatWeight:
    blocks = weight_OI.view(weight_OI.shape[0], -1, 16)
    absmax = blocks.abs().amax(-1)
    book = normal_float.code_book(4)
    codes = torch.bucketize(blocks / absmax.unsqueeze(-1), (book[1:] + book[:-1]) / 2).view(weight_OI.shape)
    packed = pack_codes(codes, 4)
    if nested:
        return NormalFloatWeight(packed, 4, 16, weight_OI.shape[1], None, *double_quantize(absmax))
    return NormalFloatWeight(packed, 4, 16, weight_OI.shape[1], absmax)


def low_rank_of(error_OI: torch.Tensor, rank: int = 4) -> LowRank:
    u, s, v = torch.linalg.svd(error_OI)
    return LowRank((u[:, :rank] * s[:rank]).half(), v[:rank].half())


def compress(weight_OI: torch.Tensor, kind: str) -> Any:
    """A StoredWeight of the named kind that approximates the matrix."""
    weight = weight_OI.float()
    if kind == "dense":
        return StoredWeight(DenseWeight(weight))
    if kind in ("pruned", "2:4"):
        mask = mask_of(weight, kind)
        return StoredWeight(DenseWeight(weight * mask)).with_mask(mask)
    if kind in GGML_TYPES:
        return StoredWeight(round_ggml(weight, kind))
    if kind == "3-bit":
        return StoredWeight(on_grid(weight, 3))
    if kind in ("nf4", "nf4-nested"):
        return StoredWeight(normal_floats(weight, kind == "nf4-nested"))
    if kind == "2:4+4-bit":
        return StoredWeight(on_grid(weight, 4, symmetric=True)).with_mask(mask_of(weight, "2:4"))
    if kind == "act-order":
        index = torch.arange(weight.shape[1]).roll(5) // 16
        plain = on_grid(weight, 4)
        return StoredWeight(replace(plain, group_index=index.to(torch.int32)))
    if kind == "lq":
        base = StoredWeight(on_grid(weight, 3))
        return replace(base, low_rank=low_rank_of(weight - base.dense()))
    if kind == "lq-4-bit":
        term = compress(weight, "lq").low_rank
        on_grids = (on_grid(factor.float(), 4, symmetric=True, group_size=size) for factor, size in ((term.up, 4), (term.down, 16)))
        return replace(compress(weight, "3-bit"), low_rank=LowRank(*on_grids))
    if kind == "2:4+4-bit+lq":
        base = compress(weight, "2:4+4-bit")
        return replace(base, low_rank=low_rank_of(weight - base.dense()))
    if kind == "everything":
        smooth = torch.linspace(0.5, 2, weight.shape[1])
        base = replace(compress(weight * smooth, "3-bit"), smooth=smooth, activations=ActivationGrid(8, 16))
        delta = SparseDelta(torch.tensor([3, 40], dtype=torch.int32), torch.tensor([0.3, -0.2]))
        return replace(base, low_rank=low_rank_of(weight - base.dense()), delta=delta)
    raise ValueError(kind)


KINDS = ("dense", "pruned", "2:4", "3-bit", "nf4", "nf4-nested", "q4_1", "2:4+4-bit", "act-order", "lq", "lq-4-bit", "2:4+4-bit+lq", "everything")


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    prefix, _ = decoder_blocks(model)
    return {n: m for n, m in model.named_modules() if n.startswith(prefix) and isinstance(m, nn.Linear | Conv1D)}


def is_transposed(model: nn.Module, parameter: str) -> bool:
    """Whether fused experts lie as [E, I, O]."""
    return bool(getattr(model.get_submodule(parameter.rpartition(".")[0]), "is_transposed", False))


def expert_matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    """[O, I] of every fused expert by name."""
    fused = {name: p.detach() for name, p in model.named_parameters() if p.ndim == 3}
    return {f"{name}.{e}": (m.T if is_transposed(model, name) else m).contiguous() for name, p in fused.items() for e, m in enumerate(p)}


def records(model: nn.Module, kind: str) -> dict[str, StoredWeight]:
    out = {name: compress(matrix, kind) for name, matrix in expert_matrices(model).items()}
    for name, module in block_linears(model).items():
        assert isinstance(module.weight, torch.Tensor)
        weight = module.weight.detach()
        out[name] = compress(weight.T if isinstance(module, Conv1D) else weight, kind)
    return out


def compressed(kind: str, family: str = "llama", seed: int = 0) -> Any:
    """A tiny model whose block linears are CompressedLinears of the kind."""
    model: Any = MODELS[family](seed)
    install(model, records(model, kind))
    return model


def batch(i: int, size: int = 2, length: int = 24, seed: int = 0) -> Batch:
    """Text with structure: noisy arithmetic progressions, so that training has something to learn."""
    g = torch.Generator().manual_seed(seed * 100_000 + i)
    start, stride = torch.randint(0, VOCABULARY, (size, 1), generator=g), torch.randint(1, 4, (size, 1), generator=g)
    return Batch((start + stride * torch.arange(length)) % VOCABULARY)


def held_out(count: int = 2) -> list[Batch]:
    return [batch(i, seed=7) for i in range(count)]
