"""Modules that a method adds to a model and no weight record can hold, as data: bottlenecks around sublayers, virtual tokens in front. And how it is put on a model.

A bottleneck hangs on two modules by hooks, whatever these modules are: plain, compressed or bound to a kernel. Virtual tokens are the
arguments of a forward pass. Knows modules by name; not how anything was trained, nor files.
Legend: B batch, T tokens, P virtual tokens, D model width, H bottleneck, L layers, K key-value heads, W head width.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig
    from transformers.utils import ModelOutput

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu}
PARTS = ("down", "down_bias", "up", "up_bias")
TOKENS = "tokens"


@dataclass(frozen=True)
class Place:
    """Module names. The bottleneck reads the input of `entry` (parallel), or, without one, the output of `exit` (serial); what it
    makes is added to the output of `exit`."""

    exit: str
    entry: str | None = None
    activation: str = "relu"
    scaling: float = 1.0


@dataclass(frozen=True)
class Tokens:
    """prompt: input embeddings [P, D] in front of the text. prefix: keys and values [P, L, 2, K, W] in front of every attention."""

    kind: Literal["prefix", "prompt"]
    values: Tensor

    @property
    def count(self) -> int:
        return self.values.shape[0]

    def to(self, device: torch.device, dtype: torch.dtype) -> "Tokens":
        return Tokens(self.kind, self.values.to(device, dtype))

    def embeddings(self, batch: int) -> Tensor:
        """[B, P, D]."""
        return self.values.expand(batch, *self.values.shape)

    def cache(self, config: "PreTrainedConfig", batch: int) -> "Cache":
        """A fresh transformers cache that holds the prefix; attention grows it, so every forward pass wants its own."""
        from transformers import DynamicCache

        return self.fill_(DynamicCache(config=config), batch)

    def fill_(self, cache: "Cache", batch: int) -> "Cache":
        for layer, pair in enumerate(self.values.permute(1, 2, 3, 0, 4)):
            keys, values = pair.unsqueeze(1).expand(2, batch, *pair.shape[1:])
            cache.update(keys, values, layer)
        return cache

    def stand_before(self, model: nn.Module) -> list[RemovableHandle]:
        """Put the tokens in front of whatever the model is called with, generation with a cache included; its logits are those of the
        text alone. Returns the hooks' handles."""
        whole: Any = model
        body: nn.Module = whole.get_decoder()
        front = _Front(self, whole.get_input_embeddings(), whole.config, cache_argument(body))
        return [body.register_forward_pre_hook(front.before, with_kwargs=True), body.register_forward_hook(front.behind, with_kwargs=True)]


@dataclass
class _Front:
    """Changes the arguments of a model's body: the first call of a text gets the tokens, later ones (whose cache holds them) the places
    behind them. peft's own `generate` does not know the name under which transformers hands on its cache."""

    tokens: Tokens
    embeddings: nn.Module
    config: "PreTrainedConfig"
    cache_name: str
    first: bool = False
    lent: bool = False

    def before(self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> tuple[tuple[()], dict[str, Any]]:
        given: dict[str, Any] = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        name = next((n for n in ("cache", "past_key_values") if given.get(n) is not None), self.cache_name)
        cache, count = given.get(name), self.tokens.count
        text = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        self.first = cache is None or not cache.get_seq_length()
        self.lent = cache is None and not given.get("use_cache")
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                raise ValueError("virtual tokens need a mask of the text's tokens [B, T]; generate with a dynamic cache")
            given["attention_mask"] = torch.cat((mask.new_ones(len(mask), count), mask), 1)
        if positions is not None:
            given["position_ids"] = positions = positions + count
        if self.first and self.tokens.kind == "prefix":
            filled = self.tokens.cache(self.config, len(text)) if cache is None else self.tokens.fill_(cache, len(text))
            given |= {name: filled, "use_cache": True}
        elif self.first:
            embedded = self.embeddings(text) if given.get("input_ids") is not None else text
            given |= {"input_ids": None, "inputs_embeds": torch.cat((self.tokens.embeddings(len(text)).to(embedded), embedded), 1)}
            if positions is not None:
                front = torch.arange(count, device=positions.device).expand(*positions.shape[:-1], count)
                given["position_ids"] = torch.cat((front, positions), -1)
        return (), given

    def behind(self, module: nn.Module, args: object, kwargs: object, out: "ModelOutput") -> "ModelOutput":
        if self.first and self.tokens.kind == "prompt":
            out["last_hidden_state"] = out[0][:, self.tokens.count :]
        if self.lent:  # nobody asked for the cache that brought the prefix
            for name in ("cache", "past_key_values"):
                if out.get(name) is not None:
                    out[name] = None
        return out


def cache_argument(module: nn.Module) -> str:
    """What a model calls its cache: transformers renames the argument."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


@dataclass(frozen=True)
class ExtraModules:
    """`bottlenecks`: sublayer → where it hangs; its tensors (down [H, D], down_bias [H], up [D, H], up_bias [D]) are
    `SUBLAYER.down`, …. `tensors` holds those and the virtual tokens' values under "tokens"."""

    method: str
    bottlenecks: Mapping[str, Place] = field(default_factory=dict)
    tokens: Literal["prefix", "prompt"] | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def virtual(self) -> Tokens | None:
        return None if self.tokens is None else Tokens(self.tokens, self.tensors[TOKENS])

    def describe(self) -> dict[str, object]:
        """JSON without the tensors; `extra_modules_of` needs both."""
        places = {name: asdict(place) for name, place in self.bottlenecks.items()}
        return {
            "method": self.method,
            "bottlenecks": places,
            "tokens": self.tokens,
            "shapes": {n: list(t.shape) for n, t in self.tensors.items()},
        }

    def hang(
        self, model: nn.Module, prefix: str = "", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> list[RemovableHandle]:
        """Put the bottlenecks whose sublayer lies under `prefix` on the model; returns the hooks' handles."""
        handles: list[RemovableHandle] = []
        for name, place in self.bottlenecks.items():
            if place.exit.startswith(prefix):
                tensors = {part: self.tensors[f"{name}.{part}"].to(device, dtype) for part in PARTS}
                handles += hang(model, place, Bottleneck(tensors, place.activation, place.scaling))
        return handles


def extra_modules_of(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExtraModules:
    """The inverse of `describe`. ValueError names a tensor that is missing or of another shape."""
    for name, shape in description["shapes"].items():
        if name not in tensors or list(tensors[name].shape) != shape:
            raise ValueError(f"tensor {name!r} of the adapter {description['method']} is missing or not {shape}")
    places = {name: Place(**place) for name, place in description["bottlenecks"].items()}
    return ExtraModules(description["method"], places, description["tokens"], tensors)


class Bottleneck(nn.Module):
    """s·σ(x·downᵀ + b)·upᵀ + s·b', 0 while up and b' are."""

    def __init__(self, tensors: Mapping[str, Tensor], activation: str, scaling: float) -> None:
        super().__init__()
        self.down, self.down_bias = nn.Parameter(tensors["down"]), nn.Parameter(tensors["down_bias"])
        self.up, self.up_bias = nn.Parameter(tensors["up"]), nn.Parameter(tensors["up_bias"])
        self.activation, self.scaling = ACTIVATIONS[activation], scaling
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        down, down_bias, up, up_bias = (p.to(x.dtype) for p in (self.down, self.down_bias, self.up, self.up_bias))
        inner = self.activation(nn.functional.linear(x, down, down_bias))
        return nn.functional.linear(inner, up, up_bias) * self.scaling


def start_tensors(width_in: int, width_out: int, bottleneck: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A bottleneck that does nothing yet. ValueError beyond the width."""
    limit = min(width_in, width_out)
    if not 0 < bottleneck <= limit:
        raise ValueError(f"bottleneck {bottleneck} does not fit a width of {limit}; choose 1…{limit}")
    down = (torch.rand(bottleneck, width_in, generator=generator) * 2 - 1) / math.sqrt(width_in)
    return {"down": down, "down_bias": torch.zeros(bottleneck), "up": torch.zeros(width_out, bottleneck), "up_bias": torch.zeros(width_out)}


def hang(model: nn.Module, place: Place, bottleneck: nn.Module) -> list[RemovableHandle]:
    """The hooks' handles. Serial ones read what `exit` puts out; parallel ones what `entry` took in."""
    exit_ = model.get_submodule(place.exit)
    if place.entry is None:
        return [exit_.register_forward_hook(lambda module, args, y: y + bottleneck(y))]
    waiting: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        waiting[:] = [args[0]]

    def add(module: nn.Module, args: object, y: Tensor) -> Tensor:
        return y + bottleneck(waiting.pop()).view(y.shape)

    return [model.get_submodule(place.entry).register_forward_pre_hook(keep), exit_.register_forward_hook(add)]
