"""Tiny random models with their linears on a grid, and a plain model that holds the same effective weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from bitmend.compress.grids import UniformGrid, min_max, round_to_grid, to_record
from bitmend.compress.weights import Base, StoredWeight, UniformWeight
from bitmend.pipelines.formats.checkpoint import Checkpoint
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

SHAPES: dict[str, dict[str, Any]] = {
    "llama": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96,
                  rope_theta=500000.0, max_position_embeddings=64),
    "opt": dict(hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, max_position_embeddings=64,
                word_embed_proj_dim=64),
    "gpt2": dict(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64),
    "gpt_neox": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, max_position_embeddings=64),
    "qwen3_moe": dict(hidden_size=64, intermediate_size=128, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, num_hidden_layers=2,
                      num_attention_heads=4, num_key_value_heads=2, vocab_size=96, head_dim=16, max_position_embeddings=64),
    "mixtral": dict(hidden_size=64, intermediate_size=128, num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=96, max_position_embeddings=64),
}  # fmt: skip
UP = "model.layers.0.mlp.up_proj"
TOKENS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Case:
    checkpoint: Checkpoint
    model: Any  # the plain model with the records' effective weights

    def logits(self) -> Tensor:
        return logits(self.model)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(TOKENS).logits.float()


def uniform(weight_OI: Tensor, bits: int = 4, group_size: int = 32, symmetric: bool = False, act_order: bool = False) -> UniformWeight:
    """Round to nearest; `act_order` scatters the groups over the columns, as full activation order does."""
    grid = UniformGrid(bits, group_size, symmetric)
    rows, columns = weight_OI.shape
    size = grid.size(columns)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns)) if act_order else torch.arange(columns)
    grouped = weight_OI[:, order].reshape(-1, size)
    scale, zero = min_max(grouped, grid)
    codes = round_to_grid(grouped, scale, zero, grid).view(rows, columns)[:, order.argsort()]
    index = (torch.arange(columns) // size)[order.argsort()] if act_order else None
    return to_record(codes, scale.view(rows, -1), zero.view(rows, -1), grid, index)


def random_model(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    settings = {**SHAPES.get(kind, {}), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **changes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)
    for parameter in model.parameters():  # wide enough for the logits to tell one model from another
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
        elif parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def build(
    kind: str, base_of: Callable[[Tensor], Base], extra: Callable[[str, StoredWeight], StoredWeight] | None = None, **changes: Any
) -> Case:
    """Every linear of the blocks as `base_of(weight)`, then through `extra`; the model holds the result densely."""
    model = random_model(kind, **changes)
    linears: dict[str, StoredWeight] = {}
    transposed: set[str] = set()
    tensors = dict(model.state_dict())

    def record(name: str, weight_OI: Tensor) -> Tensor:
        made = StoredWeight(base_of(weight_OI.contiguous()))
        linears[name] = made if extra is None else extra(name, made)
        return linears[name].dense()

    output = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            transposed.add(name)
            module.weight.copy_(record(name, module.weight.t()).t())
            del tensors[f"{name}.weight"]
        elif isinstance(module, nn.Linear) and module is not output:
            module.weight.copy_(record(name, module.weight))
            del tensors[f"{name}.weight"]
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:
            for expert in range(parameter.shape[0]):
                parameter[expert] = record(f"{name}.{expert}", parameter[expert])
            del tensors[name]
    head = next(name for name, module in model.named_modules() if module is output)
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    tied = {}
    if model.config.tie_word_embeddings:
        tied = {f"{head}.weight": f"{embedding}.weight"}
        del tensors[f"{head}.weight"]
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    return Case(Checkpoint(config, linears, tensors, None, frozenset(transposed), tied, {"title": "tiny", "perplexity": 12.5}), model)


def one_linear(base: Base, **parts: Any) -> Checkpoint:
    """A Llama of one block, of which the checkpoint holds up_proj, sized to fit `base`."""
    rows, columns = base.shape
    config = {
        "model_type": "llama", "hidden_size": columns, "intermediate_size": rows, "num_hidden_layers": 1, "num_attention_heads": 1,
        "head_dim": 8, "vocab_size": 8,
    }  # fmt: skip
    return Checkpoint(config, {UP: StoredWeight(base, **parts)}, {"model.norm.weight": torch.ones(columns)})


@pytest.fixture(scope="session")
def single() -> Callable[..., Checkpoint]:
    return one_linear


@pytest.fixture(scope="session")
def case() -> Callable[..., Case]:
    return build


@pytest.fixture(scope="session")
def on_grid() -> Callable[..., UniformWeight]:
    return uniform


@pytest.fixture(scope="session")
def logits_of() -> Callable[[Any], Tensor]:
    return logits


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    return TOKENS
