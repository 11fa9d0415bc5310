"""Virtual tokens through peft: prefix tuning, prompt tuning, p-tuning, and MAM's prefix with a parallel adapter.

They change what the model sees, so step 0 cannot equal the compressed model: the start is the model without its tokens, and
if training could not beat that, the tokens stay off. Legend: B batch, T tokens, P virtual tokens, D model, L layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..compress.ranges import Factor, SquareWidth, Width
from .bottlenecks import ParallelAdapter, parallel_adapter
from .extra_modules import TOKENS, ExtraModules, Tokens, cache_argument
from .site import AttachSite, joined
from .student import Student, student_of
from .trainable import Attached, Trainable
from .training_run import TrainConfig


@dataclass(frozen=True)
class PrefixTuning(TrainConfig):
    """Trained keys and values in front of every attention (arXiv:2101.00190), started from the model's own on `tokens` tokens of text."""

    tokens: Width = 16


@dataclass(frozen=True)
class PromptTuning(TrainConfig):
    """Trained input embeddings in front of the text (arXiv:2104.08691), started from tokens of the vocabulary."""

    tokens: Width = 16


@dataclass(frozen=True)
class PTuning(TrainConfig):
    """Input embeddings that a small network makes (arXiv:2103.10385)."""

    tokens: Width = 16
    hidden: SquareWidth = 128


@dataclass(frozen=True)
class MamAdapter(TrainConfig):
    """Mix-and-match (arXiv:2110.04366): a prefix on the attention, a scaled parallel adapter on the MLP."""

    tokens: Width = 16
    bottleneck: Width = 32
    scaling: Factor = 4.0


class Switch:
    """Runs a model with or without its virtual tokens. `make(batch)` gives them: embeddings [B, P, D], or a fresh cache that holds the
    prefix."""

    def __init__(self, model: nn.Module, make: Callable[[int], Any], kind: Literal["prefix", "prompt"], count: int) -> None:
        self.make, self.kind, self.count, self.on = make, kind, count, True
        self.plain = student_of(model)
        whole: Any = model
        self.body, self.embed = whole.base_model, whole.get_input_embeddings()
        self.cache_argument = cache_argument(self.body)

    def hidden(self, ids_BT: Tensor) -> Tensor:
        if not self.on:
            return self.plain.hidden(ids_BT)
        batch, length = ids_BT.shape
        if self.kind == "prefix":
            seen = torch.ones(batch, self.count + length, dtype=torch.long, device=ids_BT.device)
            return self.body(input_ids=ids_BT, attention_mask=seen, use_cache=True, **{self.cache_argument: self.make(batch)})[0]
        embedded = self.embed(ids_BT)
        joined_BTD = torch.cat((self.make(batch).to(embedded.dtype), embedded), dim=1)
        return self.body(inputs_embeds=joined_BTD, use_cache=False)[0][:, self.count :]

    def without(self, off: bool) -> None:
        self.on = not off

    def student(self) -> Student:
        return Student(self.hidden, self.plain.logits, self.plain.head_parameters)


def peft_settings(tokens: Tokens) -> Any:
    """peft's config for trained tokens: what the network of p-tuning made is a plain prompt."""
    from peft import PrefixTuningConfig, PromptTuningConfig

    shared: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": tokens.count, "inference_mode": True}
    if tokens.kind == "prompt":
        return PromptTuningConfig(**shared, token_dim=tokens.values.shape[1], num_transformer_submodules=1)
    _, layers, _, heads, width = tokens.values.shape
    return PrefixTuningConfig(**shared, num_layers=layers, num_attention_heads=heads, token_dim=heads * width, num_transformer_submodules=1)


def prefix_tuning(site: AttachSite, config: PrefixTuning) -> Attached:
    from peft import PrefixTuningConfig

    values = _own_keys_and_values(site, config.tokens)
    wrapped = _wrap(site, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=config.tokens))
    weight = wrapped.prompt_encoder["default"].embedding.weight
    if weight.shape != values.shape:
        raise ValueError(f"peft's prefix holds {tuple(weight.shape)} numbers, this model's keys and values are {tuple(values.shape)}")
    weight.data.copy_(values)
    return _attached("prefix_tuning", site, wrapped, "prefix", config.tokens)


def prompt_tuning(site: AttachSite, config: PromptTuning) -> Attached:
    from peft import PromptTuningConfig

    model: Any = site.model
    table = model.get_input_embeddings().weight.detach()
    wrapped = _wrap(site, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=config.tokens, token_dim=table.shape[1]))
    rows = table[_some_text(site, config.tokens)]
    wrapped.prompt_encoder["default"].embedding.weight.data.copy_(rows)
    return _attached("prompt_tuning", site, wrapped, "prompt", config.tokens)


def p_tuning(site: AttachSite, config: PTuning) -> Attached:
    from peft import PromptEncoderConfig

    model: Any = site.model
    sizes = {
        "num_virtual_tokens": config.tokens,
        "encoder_hidden_size": config.hidden,
        "token_dim": model.get_input_embeddings().weight.shape[1],
    }
    settings = PromptEncoderConfig(task_type="CAUSAL_LM", **sizes)
    return _attached("p_tuning", site, _wrap(site, settings), "prompt", config.tokens)


def mam_adapter(site: AttachSite, config: MamAdapter) -> Attached:
    prefix = prefix_tuning(site, PrefixTuning(config.tokens))
    adapter = parallel_adapter(site, ParallelAdapter(config.bottleneck, "mlp", "relu", config.scaling))

    def extra_modules() -> ExtraModules:
        assert prefix.extra_modules is not None and adapter.extra_modules is not None
        tokens, around = prefix.extra_modules(), adapter.extra_modules()
        return replace(around, method="mam_adapter", tokens=tokens.tokens, tensors={**around.tensors, **tokens.tensors})

    out = joined(prefix, adapter)
    out.extra_modules = extra_modules
    return out


def _wrap(site: AttachSite, settings: object) -> Any:
    """peft's wrapper around the model, its random start decided by the seed."""
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(site.seed)
        wrapped: object = get_peft_model(site.model, settings)  # type: ignore[arg-type]
    return wrapped


def _attached(method: str, site: AttachSite, wrapped: Any, kind: Literal["prefix", "prompt"], count: int) -> Attached:
    switch = Switch(site.model, lambda batch: wrapped.get_prompt(batch_size=batch), kind, count)
    parameters = dict(wrapped.prompt_encoder["default"].named_parameters())
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    out = {f"prompt.{name}": Trainable(p, "tokens") for name, p in parameters.items()}

    def extra_modules() -> ExtraModules:
        values = wrapped.get_prompt_embedding_to_save("default").float()
        if kind == "prefix":
            settings = wrapped.peft_config["default"]
            values = values.view(count, settings.num_layers, 2, settings.num_attention_heads, -1)
        return ExtraModules(method, {}, kind, {TOKENS: values.clone()})

    return Attached(out, adapter=frozenset(out), run=switch.student(), starts_without=switch.without, extra_modules=extra_modules)


def _some_text(site: AttachSite, count: int) -> Tensor:
    """Token ids to start from: the first training text where there is one, else drawn from the vocabulary."""
    model: Any = site.model
    embeddings = model.get_input_embeddings().weight
    if site.gradients is not None:
        ids = site.gradients.batch(0).ids.reshape(-1)
        if len(ids) >= count:
            return ids[:count].to(embeddings.device)
    return torch.randint(embeddings.shape[0], (count,), generator=site.generator("prompt")).to(embeddings.device)


@torch.no_grad()
def _own_keys_and_values(site: AttachSite, count: int) -> Tensor:
    """What the model's attention makes of a text: [P, L·2·heads·width], peft's layout."""
    model: Any = site.model
    cache = model.base_model(input_ids=_some_text(site, count).unsqueeze(0), use_cache=True).past_key_values
    pairs = [torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers]
    return torch.stack(pairs).permute(3, 0, 1, 2, 4).reshape(count, -1).float()
