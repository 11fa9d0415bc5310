"""The model families that a GGUF file can hold here: llama.cpp's names of their tensors, its order of rows, and the config fields it needs.

Facts of llama.cpp, build 10605: what its converter writes (conversion/*.py) and its models read (src/models/*.cpp); names are the `gguf` package's.
Knows configs and names; no weights, no tokenizer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType, TensorNameMap, get_tensor_name_map
from torch import Tensor

from ..errors import UsageError
from .naming import Names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """interleaved: llama.cpp rotates neighbouring channels of q and k, where transformers rotates the two halves of a head. norm_offset:
    added to norms, whose weights the model counts from 1. biases: linears whose bias it adds; it would drop any other. window_period: one layer of
    so many attends to everything, the others to a window. square: it takes the heads to be as wide as the model."""

    arch: MODEL_ARCH
    activation: str = "silu"
    interleaved: bool = False
    norm_offset: float = 0.0
    biases: tuple[str, ...] = ()
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    window_period: int | None = None
    square: bool = False


FAMILIES: Mapping[str, Family] = {
    "llama": Family(MODEL_ARCH.LLAMA, interleaved=True, biases=_ATTENTION + _MLP, ropes=("default", "linear", "yarn", "llama3")),
    "mistral": Family(MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": Family(MODEL_ARCH.QWEN2, biases=_ATTENTION[:3], square=True),
    "qwen3": Family(MODEL_ARCH.QWEN3),
    "gemma2": Family(MODEL_ARCH.GEMMA2, "gelu_pytorch_tanh", norm_offset=1.0, ropes=("default",), window_period=2),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, "gelu_pytorch_tanh", norm_offset=1.0, ropes=("default", "linear"), window_period=6),
    "phi3": Family(MODEL_ARCH.PHI3, ropes=("default", "longrope"), square=True),
}
"""transformers' model_type → family. SmolLM is a Llama."""


@dataclass(frozen=True)
class GgufModel:
    """One model as llama.cpp sees it."""

    family: Family
    config: "PreTrainedConfig"  # a PretrainedConfig, its defaults filled in
    names: TensorNameMap

    @staticmethod
    def of(config: Mapping[str, object]) -> "GgufModel":
        """UsageError for a family that is not here, and for what llama.cpp would compute otherwise in one that is."""
        kind = str(config.get("model_type"))
        if kind not in FAMILIES:
            raise UsageError(f"model_type {kind!r}: GGUF files are written for {', '.join(FAMILIES)}; --format dense carries every family")
        filled = Names.of(config).model.config
        reason = _refusal(FAMILIES[kind], filled)
        if reason is not None:
            raise UsageError(f"model_type {kind!r}: {reason}; --format dense carries it")
        return GgufModel(FAMILIES[kind], filled, get_tensor_name_map(FAMILIES[kind].arch, filled.num_hidden_layers))

    def name(self, name: str) -> str:
        """A tensor of the state dict → its name in the file. UsageError where llama.cpp has no place for it."""
        result = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        module, _, leaf = name.rpartition(".")
        if result is None or (leaf == "bias" and module.rpartition(".")[2] not in self.family.biases):
            raise UsageError(
                f"{name}: llama.cpp has no place for it in a model of type {self.config.model_type!r}; --format dense carries it"
            )
        return result

    def rows(self, name: str) -> Tensor | None:
        """int64 [O]: row i in the file is row rows[i] of this module's weight or bias; None where the order is the same."""
        leaf = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        if not self.family.interleaved or leaf not in ("q_proj", "k_proj"):
            return None
        heads = self.config.num_attention_heads if leaf == "q_proj" else self.config.num_key_value_heads
        return torch.arange(heads * _head_dim(self.config)).view(heads, 2, -1).transpose(1, 2).reshape(-1)

    def offset(self, name: str) -> float:
        """What the file's tensor has on top of the model's."""
        return self.family.norm_offset if name.endswith("norm.weight") else 0.0

    def extra_tensors(self) -> dict[str, Tensor]:
        """What stands in a config and llama.cpp reads as tensors, float32: factors that divide the rotary frequencies."""
        rope = _rope(self.config)
        if rope["rope_type"] == "llama3":
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
            dim = _head_dim(self.config)
            plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
            return {"rope_freqs.weight": plain / scaled}
        if rope["rope_type"] == "longrope":
            return {f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32) for kind in ("long", "short")}
        return {}

    def notes(self) -> list[str]:
        """Where llama.cpp computes something else than transformers although it has the model."""
        window, config = getattr(self.config, "sliding_window", None), self.config
        if (
            self.family.window_period
            or not window
            or window >= config.max_position_embeddings
            or not getattr(config, "use_sliding_window", True)
        ):
            return []
        return [f"llama.cpp attends to all tokens in this family: texts longer than the window of {window} tokens come out otherwise"]

    def write(self, writer: GGUFWriter) -> None:
        """The hyperparameters, under the keys of the architecture."""
        config, head_dim = self.config, _head_dim(self.config)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        if self.family.window_period:
            writer.add_sliding_window(config.sliding_window)
            writer.add_sliding_window_pattern(self.family.window_period)
        elif config.model_type == "phi3":
            writer.add_sliding_window(config.sliding_window or 0)
        for cap, add in (
            ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
            ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ):
            if getattr(config, cap, None):
                add(getattr(config, cap))
        self._write_rope(writer)

    def _write_rope(self, writer: GGUFWriter) -> None:
        rope, config = _rope(self.config), self.config
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * _head_dim(config)))
        local = config.rope_parameters.get("sliding_attention")
        if local is not None:
            writer.add_rope_freq_base_swa(local["rope_theta"])
        if rope["rope_type"] in ("linear", "yarn"):
            writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
            writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            for key, add in (
                ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
                ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
                ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
            ):
                if rope.get(key) is not None:
                    add(rope[key])
        if rope["rope_type"] == "longrope":
            trained = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
            scale = config.max_position_embeddings / trained
            writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
            writer.add_rope_scaling_orig_ctx_len(trained)
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(trained)) if scale > 1 else 1.0)


def _head_dim(config: "PreTrainedConfig") -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope(config: "PreTrainedConfig") -> dict[str, Any]:
    """Of the layers that attend to everything."""
    rope = config.rope_parameters
    return {"rope_type": "default", **rope.get("full_attention", rope)}


def _refusal(family: Family, config: "PreTrainedConfig") -> str | None:
    """What llama.cpp would compute otherwise, in words."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    rope, local = _rope(config), config.rope_parameters.get("sliding_attention", {})
    heads, width = config.num_attention_heads, _head_dim(config)
    kinds = getattr(config, "layer_types", None) or []
    period = family.window_period
    scaled_by = getattr(config, "query_pre_attn_scalar", width)
    by_model = config.hidden_size // heads if config.num_hidden_layers == {2: 46, 6: 62}.get(period or 0) else width
    if activation != family.activation:
        return f"llama.cpp computes {family.activation} in it, this config says {activation}"
    if rope["rope_type"] not in family.ropes or local.get("rope_type", "default") != "default":
        return f"rope_type {rope['rope_type']!r} is not read in it; {', '.join(family.ropes)} are"
    if period and kinds != ["full_attention" if i % period == period - 1 else "sliding_attention" for i in range(len(kinds))]:
        return f"in llama.cpp every {period}. layer attends to everything, here others do ({', '.join(kinds)})"
    if scaled_by != by_model:
        return f"llama.cpp scales attention by {by_model} in it, query_pre_attn_scalar here is {scaled_by}"
    if family.square and heads * width != config.hidden_size:
        return f"llama.cpp takes its {heads} heads to be {config.hidden_size} wide in total, here they are {heads * width}"
    if family.arch == MODEL_ARCH.GEMMA2 and not (config.attn_logit_softcapping and config.final_logit_softcapping):
        return "llama.cpp caps its logits, this config does not"
    if family.arch == MODEL_ARCH.GEMMA2 and not config.tie_word_embeddings:
        return "in llama.cpp its head is the embeddings, here it is a matrix of its own"
    if getattr(config, "attn_logit_softcapping", None) and family.arch == MODEL_ARCH.GEMMA3:
        return "llama.cpp does not cap its attention logits, this config does"
    if getattr(config, "use_bidirectional_attention", False):
        return "it attends in both directions, which llama.cpp does not here"
    return None
