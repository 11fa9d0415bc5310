"""Trained values as they read back from disk, and whether they can be stored at all.

Knows trainables; not steps or losses.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .sharded import is_part, local
from .trainable import Attached, Trainable


@contextmanager
def as_stored(attached: Attached) -> Iterator[None]:
    """Within, every trainable holds the value that would read back from disk."""
    trainables, switch = attached.trainables, attached.stored_form or (lambda on: None)
    kept = {name: t.parameter.data.clone() if is_part(t.parameter) else t.parameter.data for name, t in trainables.items()}
    try:
        switch(True)
        with torch.no_grad():
            for t in trainables.values():
                _put(t.parameter, t.stored(local(t.parameter.data)))
        yield
    finally:
        switch(False)
        for name, t in trainables.items():
            _put(t.parameter, local(kept[name]))


def _put(parameter: nn.Parameter, value: Tensor) -> None:
    """A part keeps its memory, which is where its block is put together from."""
    if is_part(parameter):
        local(parameter.data).copy_(value)
    else:
        parameter.data = value


def extremes(trainables: Mapping[str, Trainable]) -> list[Tensor]:
    """Of every value that has limits, where it lies: nothing waits for it."""
    return [t.limits.extremes(t.parameter.detach()) for t in trainables.values() if t.limits is not None]


def beyond_limits(trainables: Mapping[str, Trainable], values: Sequence[float]) -> str | None:
    """The first value that cannot be stored, with what is wrong with it; `found` are the numbers of `extremes`, one behind the other."""
    left = list(values)
    for name, t in trainables.items():
        if t.limits is not None:
            count = t.limits.count
            wrong, left = t.limits.problem(left[:count]), left[count:]
            if wrong:
                return f"{name}: {wrong}"
    return None
