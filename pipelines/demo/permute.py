"""Renumber the channels of a Llama-type model without changing its function.

A hidden channel has no identity: every matrix that reads or writes it may hold it at another index. Used on weights that were
quantized before (blocks of consecutive inputs share a scale), so that the block structure of their past does not help the methods
measured on them. Does not know files.

Shapes: O out, I in, D residual, M intermediate, H query heads, K key/value heads, C channels of a head.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def permute_llama_(model: "PreTrainedModel", seed: int) -> None:
    """Permute in place: residual channels; each MLP's intermediate channels; key/value groups, query heads in their group, value channels.

    Query and key channels keep their place inside a head, since rotary embedding ties a pair of them to one frequency. `model` is a transformers `LlamaForCausalLM`, or has its module names and no norms inside the attention.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder, config = model.model, model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    channels = getattr(config, "head_dim", None) or config.hidden_size // heads
    residual_D = torch.randperm(config.hidden_size, generator=generator)
    _reorder_(decoder.embed_tokens.weight, 1, residual_D)
    if not config.tie_word_embeddings:
        _reorder_(model.lm_head.weight, 1, residual_D)
    _reorder_(decoder.norm.weight, 0, residual_D)
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            _reorder_(norm.weight, 0, residual_D)
        intermediate_M = torch.randperm(config.intermediate_size, generator=generator)
        query, key, value, output = _attention_orders(heads, groups, channels, generator)
        for linear, rows_O, columns_I in (
            (attention.q_proj, query, residual_D),
            (attention.k_proj, key, residual_D),
            (attention.v_proj, value, residual_D),
            (attention.o_proj, residual_D, output),
            (mlp.gate_proj, intermediate_M, residual_D),
            (mlp.up_proj, intermediate_M, residual_D),
            (mlp.down_proj, residual_D, intermediate_M),
        ):
            _reorder_(linear.weight, 0, rows_O)
            _reorder_(linear.weight, 1, columns_I)
            if linear.bias is not None:
                _reorder_(linear.bias, 0, rows_O)


def _attention_orders(heads: int, groups: int, channels: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row orders of q, k, v and the column order of o, as old indices in new positions."""
    per_group = heads // groups
    query, key, value, output = [], [], [], []
    for group in torch.randperm(groups, generator=generator).tolist():
        own_C = torch.randperm(channels, generator=generator)
        key.append(group * channels + torch.arange(channels))
        value.append(group * channels + own_C)
        for member in torch.randperm(per_group, generator=generator).tolist():
            start = (group * per_group + member) * channels
            query.append(start + torch.arange(channels))
            output.append(start + own_C)
    return torch.cat(query), torch.cat(key), torch.cat(value), torch.cat(output)


@torch.no_grad()
def _reorder_(parameter: Tensor, dimension: int, order: Tensor) -> None:
    parameter.copy_(parameter.index_select(dimension, order.to(parameter.device)))
