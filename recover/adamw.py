"""The state of a training run as a flat dict of tensors and a JSON-able dict: what a resumed run needs to be bit-identical.

Knows parameters and AdamW's moments; not files: the caller writes both parts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .sharded import local
from .trainable import Trainable


@dataclass(frozen=True)
class TrainState:
    """tensors: `value.NAME`, `first.NAME`, `second.NAME` (AdamW's moments), `best.NAME`, `good.NAME`, `buffer.NAME`.
    meta: step, history, best and start losses, rate factor, rollbacks, and the fingerprint of what was being trained."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


class AdamW:
    """AdamW without weight decay (arXiv:1711.05101; ε 1e-8), one learning rate per parameter, and the sign rule of ternary
    adapters. Moments are float32 and addressable by name."""

    def __init__(self, trainables: Mapping[str, Trainable], betas: tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-8) -> None:
        self.trainables, self.betas, self.epsilon, self.steps = trainables, betas, epsilon, 0
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}
        self.reset()

    def reset(self) -> None:
        self.steps = 0
        adam = {name: t.parameter for name, t in self.trainables.items() if t.rule == "adamw"}
        self.first = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in adam.items()}
        self.second = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in adam.items()}

    def stand_still(self) -> None:
        """Forget where the values were going, not how large their gradients are."""
        for moment in self.first.values():
            moment.zero_()

    def forget(self, fresh: Mapping[str, Tensor]) -> None:
        """Start the moments of some entries anew."""
        for name, mask in fresh.items():
            self.first[name].masked_fill_(mask, 0)
            self.second[name].masked_fill_(mask, 0)

    @torch.no_grad()
    def step(self, rates: Mapping[str, float], progress: float) -> None:
        """One update; `rates` by name; `progress` in [0, 1] steers the ternary rule's share of flips."""
        self.steps += 1
        names = [name for name in self.first if self.trainables[name].parameter.grad is not None]
        if names:
            self._adam(names, rates)
        for name, trainable in self.trainables.items():
            if trainable.rule == "ternary" and trainable.parameter.grad is not None:
                ternary_step_(trainable.parameter.data, trainable.parameter.grad, rates[name], progress)

    def _adam(self, names: list[str], rates: Mapping[str, float]) -> None:
        values = [local(self.trainables[name].parameter.data) for name in names]
        gradients = [local(g).float() for name in names if (g := self.trainables[name].parameter.grad) is not None]
        first, second = [local(self.first[name]) for name in names], [local(self.second[name]) for name in names]
        beta1, beta2 = self.betas
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        denominators = torch._foreach_sqrt(second)
        torch._foreach_div_(denominators, (1 - beta2**self.steps) ** 0.5)
        torch._foreach_add_(denominators, self.epsilon)
        sizes = [-rates[name] / (1 - beta1**self.steps) for name in names]
        torch._foreach_addcdiv_(values, first, denominators, sizes)


def ternary_step_(value: Tensor, gradient: Tensor, rate: float, progress: float) -> None:
    """t-SignSGD on values in {−1, 0, 1} (LoTA-QAF, arXiv:2505.18724, sec. 3.3): the entries with the largest |gradient| move one step
    against its sign. Their share falls linearly from 5 % (times `rate`) to 0.1 % over the first 80 % of training."""
    share = min(1.0, rate * max(0.001, 0.05 * (1 - progress / 0.8)))
    size = gradient.abs().view(-1)
    count = max(1, round(share * size.numel()))
    threshold = size.topk(count).values[-1]
    moves = gradient.sign() * ((gradient.abs() >= threshold) & (gradient != 0))
    value.sub_(moves).clamp_(-1, 1)
