"""Whether a method fits a model, from names, shapes and settings alone: what a plan can say before any weight is read.

Knows module names and shapes; not records, data or files.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import nn

from ..compress.ranges import Layers, Targets
from . import attach, bottlenecks, increments, prompts
from .experts import is_expert
from .selection import Where, chosen_linears, norms, where

Shapes = Mapping[str, tuple[int, int]]


class Chosen(Protocol):
    """Which part of a model trains: TrainConfig, or a config of its own."""

    @property
    def targets(self) -> Targets: ...

    @property
    def layers(self) -> Layers: ...


VIRTUAL = (prompts.PrefixTuning, prompts.PromptTuning, prompts.PTuning, prompts.MamAdapter)


def virtual_tokens(config: object) -> int:
    """How many positions a method's virtual tokens take."""
    return config.tokens if isinstance(config, VIRTUAL) else 0


def misfit(config: Chosen, model: nn.Module, shapes: Shapes, low_rank: frozenset[str] = frozenset()) -> str | None:
    """Why the settings cannot be on this model (a skeleton will do), None when they can. `shapes` are [out, in] of the decoder's linears,
    `low_rank` those that have factors already."""
    try:
        place = where(model, config.targets, config.layers)
        chosen = chosen_linears(place, list(shapes), config.targets, config.layers)
    except ValueError as error:
        return str(error)
    if isinstance(config, VIRTUAL):
        return _virtual(config, model) or _bottleneck(config, model, place, shapes, chosen)
    return _nothing(config, model, place, chosen) or _rank(config, shapes, chosen, low_rank) or _bottleneck(config, model, place, shapes, chosen)


def left_alone(config: Chosen, model: nn.Module, names: Iterable[str]) -> list[str]:
    """What of the chosen linears a method cannot reach, one line a reason: the fused experts of a mixture have no place for biases, nor a
    module of their own that a bottleneck could run in parallel to."""
    place = where(model, config.targets, config.layers)
    experts = [name for name in names if place.linear(name) and is_expert(model, name)]
    if not experts:
        return []
    which = f"{experts[0]} and {len(experts) - 1} more expert matrices" if len(experts) > 1 else experts[0]
    result = []
    if _trains_biases(config):
        result.append(f"left alone: the biases of {which} (fused experts have no place for them)")
    if getattr(config, "bottleneck", None) is not None and getattr(config, "at", "mlp") != "attention":
        result.append(f"left alone: {which} (no bottleneck can run in parallel to fused experts)")
    return result


def _trains_biases(config: object) -> bool:
    return isinstance(config, attach.BitFit) or getattr(config, "train", None) == "biases" or getattr(config, "biases", False)


def _virtual(config: Any, model: nn.Module) -> str | None:
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if limit is not None and config.tokens + config.seq_len > limit:
        return (
            f"{config.tokens} virtual tokens and a seq_len of {config.seq_len} do not fit a model of {limit} positions; choose fewer of either"
        )
    if isinstance(config, prompts.PrefixTuning | prompts.MamAdapter) and config.gradient_checkpointing is True:
        return "a prefix grows a cache in forward, which recomputing would grow twice: set gradient_checkpointing=false"
    if (config.targets, config.layers) != ("all", "all"):
        return "virtual tokens stand in front of the whole model: leave targets and layers at 'all'"
    return None


def _bottleneck(config: object, model: nn.Module, place: Where, shapes: Shapes, chosen: list[str]) -> str | None:
    width: int | None = getattr(config, "bottleneck", None)
    at: bottlenecks.At = getattr(config, "at", "mlp")
    if width is None:
        return None
    own_modules = [name for name in shapes if not is_expert(model, name)]
    result = list(bottlenecks.sublayers(own_modules, set(chosen), place.blocks_name, at))
    if not result:
        experts = " (fused experts have no such linears)" if len(own_modules) < len(shapes) else ""
        return f"targets, layers and at leave no attention or MLP sublayer whose first and last linear are known by name{experts}"
    serial = isinstance(config, bottlenecks.SerialAdapter)
    limit = min(min(shapes[part.exit][0], shapes[part.exit][0] if serial else shapes[part.entry][1]) for part in result)
    return None if 0 < width <= limit else f"bottleneck {width} does not fit a width of {limit}; choose 1…{limit}"


def _rank(config: Any, shapes: Shapes, chosen: list[str], low_rank: frozenset[str]) -> str | None:
    fixed = isinstance(config, attach.Dora | attach.Lora | increments.Lota | increments.LrQat)
    pairs = (isinstance(config, attach.Perp) and config.lora != "none") or getattr(config, "train", None) in ("auto", "mask_lora", "lora")
    if not fixed and not pairs:
        return None
    for name in chosen:
        trains_old = isinstance(config, attach.Dora | attach.Lora) or getattr(config, "train", None) == "lora"
        if name not in low_rank or not trains_old:
            rows, columns = shapes[name]
            if not 0 < config.rank <= min(rows, columns):
                return f"rank {config.rank} does not fit {name}, a layer of {rows} × {columns}; choose 1…{min(rows, columns)}"
    return None


def _nothing(config: object, model: nn.Module, place: Where, chosen: list[str]) -> str | None:
    """Settings that switch everything off, or biases that are not there."""
    reason = "leaves no trainable parameter"
    if isinstance(config, attach.Perp) and not (config.norms or config.biases or config.head or config.embeddings or config.lora != "none"):
        return f"norms, biases, head and embeddings off and lora none {reason}"
    if isinstance(config, attach.Scales) and not (config.scales or config.norms or config.biases or config.zeros or config.low_rank):
        return f"scales, norms, biases, zeros and low_rank off {reason}"
    plain = [name for name in chosen if not is_expert(model, name)]
    if not isinstance(config, attach.BitFit) or config.head:
        return None
    if not config.create and all(getattr(model.get_submodule(n), "bias", None) is None for n in (*plain, *norms(model, place))):
        return f"create=false {reason}: this model has no biases; set create=true"
    if config.create and chosen and not plain:
        return f"a choice of fused experts alone {reason}: they have no place for biases"
    return None
