"""Bottleneck adapters: serial ones behind a sublayer, parallel ones beside it. They live beside the records and cannot be merged.

A sublayer is found by its linears: attention enters at q (k, v) and leaves at o, the MLP enters at gate or up and leaves at down.
Legend: T tokens, D model width, H bottleneck.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .linear import CompressedLinear, compressed_linears
from .selection import block_index, roles
from .site import Site
from .trainable import Attached, Trainable

At = Literal["attention", "mlp", "both"]
ENTRIES = {"attention": ({"q", "k", "v"}, "o"), "mlp": ({"gate", "up"}, "down")}
ACTIVATIONS = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu}


@dataclass(frozen=True)
class SerialAdapter:
    """Houlsby's adapter (arXiv:1902.00751): y + σ(y·W_down)·W_up behind each sublayer."""

    bottleneck: int = 32
    at: At = "both"
    activation: Literal["relu", "gelu", "silu"] = "relu"


@dataclass(frozen=True)
class ParallelAdapter:
    """He et al.'s scaled parallel adapter (arXiv:2110.04366): sublayer(x) + s·σ(x·W_down)·W_up."""

    bottleneck: int = 32
    at: At = "mlp"
    activation: Literal["relu", "gelu", "silu"] = "relu"
    scaling: float = 4.0


class Bottleneck(nn.Module):
    """s·σ(x·W_down + b)·W_up + b', 0 at the start. down [H, D_in], up [D_out, H]."""

    def __init__(self, width_in: int, width_out: int, bottleneck: int, activation: str, scaling: float, generator: torch.Generator) -> None:
        super().__init__()
        if not 0 < bottleneck <= min(width_in, width_out):
            raise ValueError(
                f"bottleneck {bottleneck} does not fit a width of {min(width_in, width_out)}; choose 1…{min(width_in, width_out)}"
            )
        down = (torch.rand(bottleneck, width_in, generator=generator) * 2 - 1) / math.sqrt(width_in)
        self.down, self.up = nn.Parameter(down), nn.Parameter(torch.zeros(width_out, bottleneck))
        self.down_bias, self.up_bias = nn.Parameter(torch.zeros(bottleneck)), nn.Parameter(torch.zeros(width_out))
        self.activation, self.scaling = ACTIVATIONS[activation], scaling

    def forward(self, x: Tensor) -> Tensor:
        weights = [p.to(x.dtype) for p in (self.down, self.down_bias, self.up, self.up_bias)]
        inner = self.activation(nn.functional.linear(x, weights[0], weights[1]))
        return nn.functional.linear(inner, weights[2], weights[3]) * self.scaling


@dataclass(frozen=True)
class Sublayer:
    name: str
    entry: CompressedLinear
    exit: CompressedLinear


def sublayers(site: Site, at: At) -> Iterator[Sublayer]:
    """Attention and MLP sublayers at the chosen depth whose entry and exit are both compressed linears (whatever `targets` says)."""
    blocks: dict[int, dict[str, CompressedLinear]] = {}
    for name, linear in compressed_linears(site.model).items():
        index = block_index(name, site.place.blocks_name)
        if index is not None and index in site.place.blocks:
            blocks.setdefault(index, {})[name] = linear
    for index in sorted(blocks):
        for kind, (entry_roles, exit_role) in ENTRIES.items():
            if at in (kind, "both"):
                entries = [m for n, m in blocks[index].items() if entry_roles & set(roles(n))]
                exits = [m for n, m in blocks[index].items() if exit_role in roles(n)]
                if entries and len(exits) == 1:
                    yield Sublayer(f"{site.place.blocks_name}.{index}.{kind}", entries[0], exits[0])


def serial_adapter(site: Site, config: SerialAdapter) -> Attached:
    found: dict[str, Bottleneck] = {}
    handles: list[Any] = []
    for part in sublayers(site, config.at):
        width = part.exit.out_features
        found[part.name] = _made(site, part, width, width, config.bottleneck, config.activation, 1.0)
        handles.append(part.exit.register_forward_hook(_behind(found[part.name])))
    return _attached(found, handles)


def parallel_adapter(site: Site, config: ParallelAdapter) -> Attached:
    found: dict[str, Bottleneck] = {}
    handles: list[Any] = []
    for part in sublayers(site, config.at):
        adapter = _made(site, part, part.entry.in_features, part.exit.out_features, config.bottleneck, config.activation, config.scaling)
        found[part.name] = adapter
        keep, add = _beside(adapter)
        handles += [part.entry.register_forward_pre_hook(keep), part.exit.register_forward_hook(add)]
    return _attached(found, handles)


def _behind(adapter: Bottleneck) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return y + adapter(y)

    return hook


def _beside(adapter: Bottleneck) -> tuple[Callable[..., None], Callable[..., Tensor]]:
    """Hooks that remember the sublayer's input and add to its output."""
    waiting: list[Tensor] = []

    def keep(module: nn.Module, args: Any) -> None:
        waiting[:] = [args[0]]

    def add(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return y + adapter(waiting.pop()).view(y.shape)

    return keep, add


def _made(site: Site, part: Sublayer, width_in: int, width_out: int, bottleneck: int, activation: str, scaling: float) -> Bottleneck:
    adapter = Bottleneck(width_in, width_out, bottleneck, activation, scaling, site.generator(part.name))
    return adapter.to(part.exit.base().device)


def _attached(found: dict[str, Bottleneck], handles: list[Any]) -> Attached:
    if not found:
        raise ValueError(
            "no attention or MLP sublayer with a known entry and exit linear at this depth; see recover/selection.py for the names"
        )
    out = {f"{name}.{key}": Trainable(p, "adapters") for name, adapter in found.items() for key, p in adapter.named_parameters()}

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return Attached(out, adapter=frozenset(out), remove=remove)


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
