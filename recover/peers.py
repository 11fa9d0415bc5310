"""Other processes that train the same values, each on micro-batches of its own: gradients added up in the order of the micro-batches, so that
every process takes the step that one alone would take, bit for bit.

Knows parameters and numbers; how processes speak to one another is handed in.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class ReplicasDiffer(RuntimeError):
    """Two processes hold other values after the same steps."""


class Sum(Protocol):
    """Σ in the order of the units: one `add` a round on every process, None from one without a unit; the total is the same on all."""

    def add(self, tensor: Tensor | None) -> None: ...

    def total(self) -> Tensor: ...


def _nobody(like: Tensor) -> Sum:
    raise ValueError("one process has nobody to add up with; give ordered_sum together with a size above 1")


@dataclass(frozen=True)
class Peers:
    """This process is number `rank` of `size`; unit u (a micro-batch of an update, a held-out batch) is of process u % size. `gathered` gives every
    process's value on all; `ordered_sum` makes a sum of tensors like the given one. `even`: a pass through the model needs all processes, so that one
    without a unit in a round goes through the model, too, for nothing."""

    rank: int = 0
    size: int = 1
    gathered: Callable[[Any], list[Any]] = lambda value: [value]
    ordered_sum: Callable[[Tensor], Sum] = _nobody
    even: bool = False

    def rounds(self, units: int) -> Iterator[int | None]:
        """This process's unit of every round of `size` units; None where it has none."""
        for first in range(0, units, self.size):
            unit = first + self.rank
            yield unit if unit < units else None

    def agree(self, flag: bool) -> bool:
        """Whether anybody's flag is set."""
        return flag if self.size == 1 else any(self.gathered(flag))

    def in_order(self, mine: Mapping[int, T]) -> list[T]:
        """Everybody's values in the order of their units."""
        return [value for _, value in sorted((unit, value) for part in self.gathered(dict(mine)) for unit, value in part.items())]

    def check(self, values: Mapping[str, Tensor]) -> None:
        """ReplicasDiffer unless all hold the same values."""
        if self.size == 1:
            return
        digest = hashlib.sha256()
        for name, tensor in sorted(values.items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        hashes = self.gathered(digest.hexdigest())
        other = next((rank for rank, hashed in enumerate(hashes) if hashed != hashes[0]), None)
        if other is not None:
            raise ReplicasDiffer(
                f"rank {other} has trained other values than rank 0 from the same start; its processor, libraries or threads compute otherwise: "
                "start ranks on machines that are alike"
            )


ALONE = Peers()


class SharedGradients:
    """The gradients and the loss of an update whose micro-batches several processes have."""

    def __init__(self, peers: Peers, parameters: Sequence[Tensor], device: torch.device) -> None:
        self.peers, self.parameters = peers, parameters
        kinds = dict.fromkeys((p.dtype, p.device) for p in parameters)
        self.groups = [[i for i, p in enumerate(parameters) if (p.dtype, p.device) == kind] for kind in kinds]
        counts = [sum(parameters[i].numel() for i in group) for group in self.groups]
        self.sums = [peers.ordered_sum(torch.empty(n, dtype=kind[0], device=kind[1])) for n, kind in zip(counts, kinds, strict=True)]
        self.loss = peers.ordered_sum(torch.zeros(1, dtype=torch.float64, device=device))
        self.moved: set[int] = set()

    def add(self, loss: Tensor | None) -> None:
        """A round: take the gradients of this process's micro-batch, if it had one, from the parameters."""
        self.loss.add(None if loss is None else loss.double().view(1))
        for group, total in zip(self.groups, self.sums, strict=True):
            total.add(None if loss is None else torch.cat([self._taken(i) for i in group]))

    def _taken(self, index: int) -> Tensor:
        parameter = self.parameters[index]
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return torch.full((parameter.numel(),), -0.0, dtype=parameter.dtype, device=parameter.device)  # x + −0 is x, were it −0 itself
        self.moved.add(index)
        return gradient.reshape(-1)

    def settle(self, tokens: int) -> tuple[Tensor, int]:
        """(loss, tokens) of all micro-batches; every parameter that had a gradient anywhere has their sum."""
        everyone = self.peers.gathered((tokens, self.moved))
        moved = set[int]().union(*(theirs for _, theirs in everyone))
        for group, total in zip(self.groups, self.sums, strict=True):
            pieces = total.total().split([self.parameters[i].numel() for i in group])
            for index, piece in zip(group, pieces, strict=True):
                if index in moved:
                    self.parameters[index].grad = piece.view(self.parameters[index].shape).clone()
        return self.loss.total()[0], sum(count for count, _ in everyone)
