"""Whether a method fits a model, from names, shapes and settings alone: what a plan can say before any weight is read.

Knows module names and shapes; not records, data or files.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from . import attach, bottlenecks, increments, prompts
from .selection import Where, chosen_linears, norms, where

Shapes = Mapping[str, tuple[int, int]]
VIRTUAL = (prompts.PrefixTuning, prompts.PromptTuning, prompts.PTuning, prompts.MamAdapter)


def virtual_tokens(own: Any) -> int:
    """How many positions a method's virtual tokens take."""
    return own.tokens if isinstance(own, VIRTUAL) else 0


def misfit(own: Any, shared: Any, model: nn.Module, shapes: Shapes, low_rank: frozenset[str] = frozenset()) -> str | None:
    """Why the settings cannot be on this model (a skeleton will do), None when they can. `shapes` are [out, in] of the decoder's linears,
    `low_rank` those that have factors already."""
    try:
        place = where(model, shared.targets, shared.layers)
        chosen = chosen_linears(place, list(shapes), shared.targets, shared.layers)
    except ValueError as error:
        return str(error)
    if isinstance(own, VIRTUAL):
        return _virtual(own, shared, model) or _bottleneck(own, place, shapes, chosen)
    return (
        _nothing(own, model, place, chosen)
        or _share(own)
        or _rank(own, shapes, chosen, low_rank)
        or _bottleneck(own, place, shapes, chosen)
    )


def _virtual(own: Any, shared: Any, model: nn.Module) -> str | None:
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if own.tokens < 1 or (limit is not None and own.tokens + shared.seq_len > limit):
        return (
            f"{own.tokens} virtual tokens and a seq_len of {shared.seq_len} do not fit a model of {limit} positions; choose fewer of either"
        )
    if isinstance(own, prompts.PrefixTuning | prompts.MamAdapter) and shared.gradient_checkpointing is True:
        return "a prefix grows a cache in forward, which recomputing would grow twice: set gradient_checkpointing=false"
    if (shared.targets, shared.layers) != ("all", "all"):
        return "virtual tokens stand in front of the whole model: leave targets and layers at 'all'"
    return None


def _bottleneck(own: Any, place: Where, shapes: Shapes, chosen: list[str]) -> str | None:
    width: int | None = getattr(own, "bottleneck", None)
    at: Any = getattr(own, "at", "mlp")
    if width is None:
        return None
    found = list(bottlenecks.sublayers(list(shapes), set(chosen), place.blocks_name, at))
    if not found:
        return "targets, layers and at leave no attention or MLP sublayer whose first and last linear are known by name"
    serial = isinstance(own, bottlenecks.SerialAdapter)
    limit = min(min(shapes[part.exit][0], shapes[part.exit][0] if serial else shapes[part.entry][1]) for part in found)
    return None if 0 < width <= limit else f"bottleneck {width} does not fit a width of {limit}; choose 1…{limit}"


def _rank(own: Any, shapes: Shapes, chosen: list[str], low_rank: frozenset[str]) -> str | None:
    fixed = isinstance(own, attach.Dora | attach.Lora | increments.Lota | increments.LrQat)
    pairs = (isinstance(own, attach.Perp) and own.lora != "none") or getattr(own, "train", None) in ("auto", "mask_lora", "lora")
    if not fixed and not pairs:
        return None
    for name in chosen:
        trains_old = isinstance(own, attach.Dora | attach.Lora) or getattr(own, "train", None) == "lora"
        if name not in low_rank or not trains_old:
            rows, columns = shapes[name]
            if not 0 < own.rank <= min(rows, columns):
                return f"rank {own.rank} does not fit {name}, a layer of {rows} × {columns}; choose 1…{min(rows, columns)}"
    return None


def _share(own: Any) -> str | None:
    share = getattr(own, "share", 1.0)
    if not 0 < share <= 1:
        return f"share {share} of weights to train must lie in (0, 1]"
    for name in ("prune_ranks", "prune_units"):
        value = getattr(own, name, 0.0)
        if not 0 <= value < 1:
            return f"{name} {value} must lie in [0, 1): it is the share that is dropped"
    return None


def _nothing(own: Any, model: nn.Module, place: Where, chosen: list[str]) -> str | None:
    """Settings that switch everything off, or biases that are not there."""
    reason = "leaves no trainable parameter"
    if isinstance(own, attach.Perp) and not (own.norms or own.biases or own.head or own.embeddings or own.lora != "none"):
        return f"norms, biases, head and embeddings off and lora none {reason}"
    if isinstance(own, attach.Scales) and not (own.scales or own.norms or own.biases or own.zeros or own.low_rank):
        return f"scales, norms, biases, zeros and low_rank off {reason}"
    if isinstance(own, attach.BitFit) and not own.create and not own.head:
        names = [*chosen, *norms(model, place)]
        if all(getattr(model.get_submodule(name), "bias", None) is None for name in names):
            return f"create=false {reason}: this model has no biases; set create=true"
    return None
