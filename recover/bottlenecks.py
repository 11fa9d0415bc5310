"""Bottleneck adapters: serial ones behind a sublayer, parallel ones next to it. They are stored apart from the records and cannot be merged.

A sublayer is found by its linears: attention enters at q (k, v) and leaves at o, the MLP enters at gate or up and leaves at down.
Legend: T tokens, D model width, H bottleneck.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..compress.ranges import Factor, Share, Width
from .compressed_model import compressed_linears
from .experts import is_expert
from .extra_modules import PARTS, Bottleneck, ExtraModules, Place, hang, start_tensors
from .selection import block_index, roles
from .site import AttachSite
from .trainable import Attached, Trainable
from .training_run import TrainConfig

At = Literal["attention", "mlp", "both"]
ENTRIES = {"attention": ({"q", "k", "v"}, "o"), "mlp": ({"gate", "up"}, "down")}


@dataclass(frozen=True)
class SerialAdapter(TrainConfig):
    """Houlsby's adapter (arXiv:1902.00751): y + σ(y·W_down)·W_up behind each sublayer. `targets` chooses sublayers by their linears;
    `prune_units`: the share of all hidden units dropped after training, those that do least."""

    bottleneck: Width = 32
    at: At = "both"
    activation: Literal["relu", "gelu", "silu"] = "relu"
    prune_units: Share = 0.0


@dataclass(frozen=True)
class ParallelAdapter(TrainConfig):
    """He et al.'s scaled parallel adapter (arXiv:2110.04366): sublayer(x) + s·σ(x·W_down)·W_up."""

    bottleneck: Width = 32
    at: At = "mlp"
    activation: Literal["relu", "gelu", "silu"] = "relu"
    scaling: Factor = 4.0
    prune_units: Share = 0.0


@dataclass(frozen=True)
class Sublayer:
    """Names of the sublayer and of its first and last linear."""

    name: str
    entry: str
    exit: str


def sublayers(names: list[str], chosen: set[str], blocks_name: str, at: At) -> Iterator[Sublayer]:
    """Attention and MLP sublayers among the linears `names` that have a known entry and exit, and of whose linears some are chosen."""
    blocks: dict[int, list[str]] = {}
    for name in names:
        index = block_index(name, blocks_name)
        if index is not None:
            blocks.setdefault(index, []).append(name)
    for index in sorted(blocks):
        for kind, (entry_roles, exit_role) in ENTRIES.items():
            if at in (kind, "both"):
                entries = [n for n in blocks[index] if entry_roles & set(roles(n))]
                exits = [n for n in blocks[index] if exit_role in roles(n)]
                if entries and len(exits) == 1 and chosen & {*entries, *exits}:
                    yield Sublayer(f"{blocks_name}.{index}.{kind}", entries[0], exits[0])


def serial_adapter(site: AttachSite, config: SerialAdapter) -> Attached:
    return _attached("serial_adapter", site, config, lambda part: Place(part.exit, None, config.activation))


def parallel_adapter(site: AttachSite, config: ParallelAdapter) -> Attached:
    return _attached("parallel_adapter", site, config, lambda part: Place(part.exit, part.entry, config.activation, config.scaling))


def _attached(method: str, site: AttachSite, config: SerialAdapter | ParallelAdapter, place_of: Any) -> Attached:
    linears = {name: linear for name, linear in compressed_linears(site.model).items() if not is_expert(site.model, name)}
    places: dict[str, Place] = {}
    adapters: dict[str, Bottleneck] = {}
    handles: list[RemovableHandle] = []
    for part in sublayers(list(linears), set(site.linears), site.place.blocks_name, config.at):
        place, width = place_of(part), linears[part.exit].out_features
        width_in = width if place.entry is None else linears[part.entry].in_features
        tensors = start_tensors(width_in, width, config.bottleneck, site.generator(part.name))
        adapters[part.name] = Bottleneck(tensors, place.activation, place.scaling).to(linears[part.exit].device)
        places[part.name] = place
        handles += hang(site.model, place, adapters[part.name].requires_grad_(True))
    if not adapters:
        raise ValueError(
            "no attention or MLP sublayer with a known entry and exit linear is left by targets, layers and at; "
            "see recover/selection.py for the names"
        )
    out = {f"{name}.{key}": Trainable(p, "adapters") for name, adapter in adapters.items() for key, p in adapter.named_parameters()}

    def remove() -> None:
        for handle in handles:
            handle.remove()

    def extra_modules() -> ExtraModules:
        tensors = {f"{name}.{part}": getattr(a, part).detach().clone() for name, a in adapters.items() for part in PARTS}
        return ExtraModules(method, places, None, tensors)

    whole = {name: [getattr(a, part) for part in PARTS[:3]] for name, a in adapters.items()}

    def prune(on: bool) -> dict[str, int]:
        for name, parameters in whole.items():
            for part, parameter in zip(PARTS, parameters, strict=False):
                setattr(adapters[name], part, parameter)
        total = sum(a.down.shape[0] for a in adapters.values())
        return prune_units(adapters, total - round(config.prune_units * total)) if on else {}

    return Attached(out, adapter=frozenset(out), remove=remove, extra_modules=extra_modules, prune=prune if config.prune_units else None)


def prune_units(adapters: dict[str, Bottleneck], keep: int) -> dict[str, int]:
    """Keep the `keep` hidden units over all adapters with the largest ‖down_h‖·‖up_h‖; returns how many each keeps."""
    scores = {name: a.down.detach().norm(dim=1) * a.up.detach().norm(dim=0) for name, a in adapters.items()}
    flat = torch.cat(list(scores.values())).sort(descending=True).values
    threshold = flat[keep] if keep < len(flat) else -torch.inf
    for name, adapter in adapters.items():
        kept = scores[name] > threshold
        adapter.down, adapter.up = nn.Parameter(adapter.down.detach()[kept]), nn.Parameter(adapter.up.detach()[:, kept])
        adapter.down_bias = nn.Parameter(adapter.down_bias.detach()[kept])
    return {name: adapter.down.shape[0] for name, adapter in adapters.items()}
