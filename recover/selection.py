"""Where to attach: roles of linears by name, depth in the decoder, norms. Which weights inside a matrix is `criteria`' business.

Knows module names and classes only.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
# The one alias table: last component of a module's name → the roles that it plays.
ALIASES: dict[str, tuple[str, ...]] = {
    **{name: ("q",) for name in ("q_proj", "query", "q_lin", "wq", "query_proj")},
    **{name: ("k",) for name in ("k_proj", "key", "k_lin", "wk", "key_proj")},
    **{name: ("v",) for name in ("v_proj", "value", "v_lin", "wv", "value_proj")},
    **{name: ("q", "k", "v") for name in ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "qkv", "W_pack", "wqkv")},
    **{name: ("o",) for name in ("o_proj", "out_proj", "out_lin", "wo", "attn_out")},
    **{name: ("gate",) for name in ("gate_proj", "w1", "linear_gate")},
    **{name: ("up",) for name in ("up_proj", "w3", "fc1", "c_fc", "dense_h_to_4h", "fc_in", "lin1", "linear_v")},
    **{name: ("down",) for name in ("down_proj", "w2", "fc2", "dense_4h_to_h", "fc_out", "lin2", "linear_1")},
    "gate_up_proj": ("gate", "up"),
}
# The same name serves attention and MLP in some families: its parent decides.
BY_PARENT: dict[str, tuple[str, str]] = {"c_proj": ("o", "down"), "dense": ("o", "down")}
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def roles(name: str) -> tuple[str, ...]:
    """The roles of a linear by its dotted name; () when the name is unknown (it is then selected by "all" or a regex only)."""
    parent, _, last = name.rpartition(".")
    if last.isdigit():  # one expert of a fused parameter
        return roles(parent)
    if last in BY_PARENT:
        attention, mlp = BY_PARENT[last]
        return (attention,) if ATTENTION.search(parent.rpartition(".")[2]) else (mlp,)
    return ALIASES.get(last, ())


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, list) of the longest ModuleList whose members are all of one class and that lies in no other one (the experts of a block do).
    ValueError when there is none."""
    result: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in result)
        if isinstance(module, nn.ModuleList) and not inside and len({type(block) for block in module}) == 1:
            result.append((name, module))
    if not result:
        raise ValueError(f"{type(model).__name__} has no list of decoder blocks")
    return max(result, key=lambda pair: len(pair[1]))


def block_index(name: str, blocks_name: str) -> int | None:
    """Which decoder block a dotted name lies in; None outside the decoder."""
    match = re.match(re.escape(blocks_name) + r"\.(\d+)(\.|$)", name)
    return int(match.group(1)) if match else None


@dataclass(frozen=True)
class Where:
    """A resolved choice of place: which roles (or regex) and which blocks. `everywhere` also takes what lies outside the blocks."""

    targets: frozenset[str] | re.Pattern[str] | None
    blocks: frozenset[int]
    blocks_name: str
    everywhere: bool

    def holds(self, name: str) -> bool:
        """Whether a module lies at a chosen depth."""
        index = block_index(name, self.blocks_name)
        return self.everywhere if index is None else index in self.blocks

    def linear(self, name: str) -> bool:
        if not self.holds(name):
            return False
        if self.targets is None:
            return True
        if isinstance(self.targets, re.Pattern):
            return self.targets.search(name) is not None
        return bool(self.targets & set(roles(name)))


def where(model: nn.Module, targets: str | Sequence[str] = "all", layers: str | Sequence[int] = "all") -> Where:
    """Resolve `targets` ("all", a role, roles separated by commas or in a list, or a regex over names) and `layers`
    ("all", "first:k", "middle:k", "last:k", or a list of block numbers). ValueError when the choice cannot be."""
    name, blocks = decoder_blocks(model)
    return Where(_targets(targets), frozenset(_depth(layers, len(blocks))), name, layers == "all")


def chosen_linears(place: Where, names: list[str], targets: object, layers: object) -> list[str]:
    """Those of the linears that `targets` and `layers` choose. ValueError when that is none of some."""
    chosen = [name for name in names if place.linear(name)]
    if names and not chosen:
        known = sorted({role for name in names for role in roles(name)}, key=ROLES.index)
        raise ValueError(f"targets {targets!r} and layers {layers!r} leave none of {len(names)} linears; this model's roles are {known}")
    return chosen


def _targets(targets: str | Sequence[str]) -> frozenset[str] | re.Pattern[str] | None:
    if targets == "all":
        return None
    wanted = [part.strip() for part in targets.split(",")] if isinstance(targets, str) else list(targets)
    if wanted and set(wanted) <= set(ROLES):
        return frozenset(wanted)
    pattern = targets if isinstance(targets, str) else "|".join(f"(?:{part})" for part in wanted)
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"targets {targets!r} is neither 'all', nor roles of {ROLES}, nor a regular expression: {error}") from error


def _depth(layers: str | Sequence[int], count: int) -> list[int]:
    if layers == "all":
        return list(range(count))
    if not isinstance(layers, str):
        return _within(list(layers), count, layers)
    match = re.fullmatch(r"(first|middle|last):(\d+)", layers)
    if match is None:
        if re.fullmatch(r"\d+(,\d+)*", layers):
            return _within([int(part) for part in layers.split(",")], count, layers)
        raise ValueError(f"layers {layers!r}: choose 'all', 'first:k', 'middle:k', 'last:k' or a list of block numbers")
    k = int(match.group(2))
    if not 0 < k <= count:
        raise ValueError(f"layers {layers!r}: the model has {count} decoder blocks")
    start = {"first": 0, "middle": (count - k) // 2, "last": count - k}[match.group(1)]
    return list(range(start, start + k))


def _within(wanted: list[int], count: int, given: object) -> list[int]:
    if not wanted or min(wanted) < 0 or max(wanted) >= count:
        raise ValueError(f"layers {given!r}: block numbers of this model run from 0 to {count - 1}")
    return wanted


def is_norm(module: nn.Module) -> bool:
    """A normalisation with a learned weight vector (LayerNorm, any RMSNorm)."""
    weight = getattr(module, "weight", None)
    named = "norm" in type(module).__name__.lower()
    return (named or isinstance(module, nn.LayerNorm)) and isinstance(weight, nn.Parameter) and weight.dim() == 1


def norms(model: nn.Module, place: Where) -> list[str]:
    return [name for name, module in model.named_modules() if is_norm(module) and place.holds(name)]
