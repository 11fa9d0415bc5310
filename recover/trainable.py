"""What a method hands to the training loop: parameters with their rates and their stored precision.

Knows parameters; not models, losses or files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .extra_modules import ExtraModules

# Default learning rates by kind of parameter; scales, zeros and codes are in relative or grid units, norms in units of their gain; beside
# what trains the weights norms go more slowly, since alone they have more to make up for.
RATES: dict[str, float] = {
    "scales": 4e-3,
    "zeros": 4e-3,
    "norms": 1.6e-2,
    "norms_with_others": 4e-3,
    "biases": 2e-3,
    "factors": 1e-3,
    "magnitudes": 2e-3,
    "adapters": 1e-3,
    "dense": 1e-4,
    "sparse": 1e-3,
    "gates": 1e-1,
    "codes": 2e-2,
    "spectrum": 5e-3,
    "tokens": 1e-2,
    "embeddings": 3e-5,
    "ternary": 1.0,
}


def _same(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Limits:
    """What a value must keep to be stored. `extremes(value)` is a small float tensor that lies where the value does, so that those of all
    parameters, and of many steps, are read at once; `problem(extremes)` names what is wrong with them, or None. `count`: how many numbers."""

    count: int
    extremes: Callable[[Tensor], Tensor]
    problem: Callable[[Sequence[float]], str | None]


@dataclass
class Trainable:
    """One parameter being trained. `stored(value)` is the value as it will read back from disk (float32): held-out loss is
    measured on it. `rule` is how it is updated. `unit` is the size of what is trained, where that differs from model to model: rates are
    in it."""

    parameter: nn.Parameter
    kind: str
    stored: Callable[[Tensor], Tensor] = _same
    rule: Literal["adamw", "ternary"] = "adamw"
    limits: Limits | None = None
    unit: float = 1.0

    @property
    def rate(self) -> float:
        return RATES[self.kind] * self.unit


def through(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The rounding of a value that is stored in `dtype`."""
    return _same if dtype == torch.float32 else lambda value: value.to(dtype).float()


def master(parameter: nn.Parameter, kind: str, unit: float = 1.0) -> Trainable:
    """Make a plain model parameter trainable: float32 while it trains, its own dtype when stored."""
    dtype = parameter.dtype
    parameter.data = parameter.data.float()
    parameter.requires_grad_(True)
    return Trainable(parameter, kind, through(dtype), unit=unit)


@dataclass
class Attached:
    """A method attached to a model.

    trainables: name → Trainable, names are stable and unique. plain: model parameter name → storage dtype of what is no part
    of a compressed linear (norms, embeddings, head). adapter: names of trainables that no record holds; `extra_modules()` is what is
    stored of them. `before_step(step)` may change gates, noise or index sets, and names the entries (bool masks) whose moments start
    anew; `buffers()` are tensors that a resumed run needs in addition to the parameters; `penalty()` is added to the loss. `run` is the Student
    to use (virtual tokens), `starts_without(True)` switches them off; `remove()` takes hooks off the model again; `stored_form(True)`
    makes it run as it will be stored where that is more than rounding each value. `prune(True)`, after training, drops what the config
    asks for and says what is left, `prune(False)` puts it back. `unrounded`: the `MaskedDense` of the linears that are to be rounded behind
    training (`round_by`), before anything is stored.
    """

    trainables: dict[str, Trainable]
    plain: dict[str, torch.dtype] = field(default_factory=dict)
    adapter: frozenset[str] = frozenset()
    before_step: Callable[[int], dict[str, Tensor] | None] | None = None
    buffers: Callable[[], dict[str, Tensor]] | None = None
    penalty: Callable[[], Tensor] | None = None
    run: Any = None
    extra_modules: Callable[[], ExtraModules] | None = None
    starts_without: Callable[[bool], None] | None = None
    remove: Callable[[], None] | None = None
    stored_form: Callable[[bool], None] | None = None
    prune: Callable[[bool], dict[str, int]] | None = None
    unrounded: Mapping[str, Any] = field(default_factory=dict)

    def count(self) -> int:
        return sum(t.parameter.numel() for t in self.trainables.values())
