"""A loaded block that runs several times over the same batches while its matrices change group by group: what no later change reaches is computed
once.

Attention, whose matrices are all solved, gives what it gave before; where the last of its matrices has just been solved, that one alone runs, on
the input that was seen. What is kept lies on the device and takes half of the room that hidden states leave there; what there is no room for is
computed again, which takes a card less time than to fetch it.
Knows a block's modules and the order of their matrices; not what changes them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...recover.student import forward_of
from .blocks import StreamedModel
from .hidden import Room
from .structure import Site

REPLAY_SHARE = 0.5
"""Of the room that hidden states leave on the device; the next block and its statistics come out of the other half and of what is no room of theirs."""


@dataclass(frozen=True)
class _Kept:
    """A tensor, and as which version it was seen: a block that writes into it afterwards makes it worthless."""

    tensor: Tensor
    version: int

    def get(self) -> Tensor | None:
        return self.tensor if self.tensor._version == self.version else None


@dataclass
class _Part:
    """A module of the block and its matrices, the last of which are of group `last`. `exit`: the only one of those, which gives the module's
    output: so it was seen to be when `exits` is true. Kept by place: what enters the exit, and what leaves the module."""

    module: nn.Module
    last: int
    exit: nn.Module | None
    run: Callable[..., Any]
    calls: int = 0
    learned: bool = False
    exits: bool = False
    size: int = 0
    given: Tensor | None = None
    entering: dict[int, _Kept] = field(default_factory=dict)
    leaving: dict[int, _Kept] = field(default_factory=dict)

    def returned(self, out_NTD: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        return (out_NTD, *[None] * (self.size - 1)) if self.size else out_NTD


@dataclass
class Replay:
    """`groups` are the block's sites in the order of their calls, those that read one tensor together; `solved` counts those that are final. `left` are
    the bytes that may still be kept, `held` those that are. Bits are those of plain runs."""

    groups: Sequence[list[Site]]
    room: Room
    left: float
    held: int = 0
    solved: int = 0
    parts: list[_Part] = field(default_factory=list)
    place: int | None = None
    last: bool = False

    @classmethod
    @contextmanager
    def of(cls, model: StreamedModel, index: int, groups: Sequence[list[Site]], room: Room) -> Iterator["Replay"]:
        """While open, runs of block `index` within `at` are replayed."""
        replay = cls(groups, room, REPLAY_SHARE * room.device_bytes)
        number = {site.name: at for at, group in enumerate(groups) for site in group}
        sites = [site for group in groups for site in group]
        for module in model.layers[index].children():
            below = {id(child) for child in module.modules()}
            own = [site for site in sites if id(model.model.get_submodule(site.module)) in below]
            if not own:
                continue
            last = max(number[site.name] for site in own)
            ends = [site for site in own if number[site.name] == last]
            exits = model.model.get_submodule(ends[0].module) if len(ends) == 1 and ends[0].expert is None else None
            replay.parts.append(_Part(module, last, None if exits is module else exits, module.forward))
        with ExitStack() as stack:
            for part in replay.parts:
                stack.enter_context(forward_of(part.module, partial(replay._forward, part)))
                if part.exit is not None:
                    stack.enter_context(part.exit.register_forward_pre_hook(partial(replay._entering, part), prepend=True))
                    stack.enter_context(part.exit.register_forward_hook(partial(replay._given, part)))
            try:
                yield replay
            finally:
                replay._count(-replay.held)

    @contextmanager
    def at(self, place: int, last: bool = False) -> Iterator[None]:
        """Within, the block runs on the batch of this place, for the `last` time maybe."""
        self.place, self.last = place, last
        for part in self.parts:
            part.calls, part.given = 0, None
        try:
            yield
        finally:
            for part in self.parts:
                part.given = None
                if last:
                    self._drop(part.entering, place)
                    self._drop(part.leaving, place)
            self.place = None

    def _forward(self, part: _Part, *args: Any, **kwargs: Any) -> Any:
        place = self.place
        if place is None:
            return part.run(*args, **kwargs)
        part.calls += 1
        if self.solved <= part.last or not part.learned:
            out = part.run(*args, **kwargs)
            self._learn(part, out)
            return out
        left, entered = (kept[place].get() if place in kept else None for kept in (part.leaving, part.entering))
        if left is not None:
            return part.returned(left)
        out = part.returned(part.exit(entered)) if entered is not None and part.exit is not None else part.run(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        if not self.last and first is not None:
            self._drop(part.entering, place)
            self._keep(part.leaving, place, first)
            if place not in part.leaving and entered is not None:
                self._keep(part.entering, place, entered)
        return out

    def _learn(self, part: _Part, out: Any) -> None:
        """From its first whole run: whether the module is called once and gives a tensor alone, and whether that is its exit's."""
        first, others = (out[0], out[1:]) if isinstance(out, tuple) else (out, ())
        simple = isinstance(first, Tensor) and all(other is None for other in others)
        part.size = len(out) if isinstance(out, tuple) else 0
        part.learned = part.calls == 1 and simple
        part.exits = part.learned and first is part.given

    def _entering(self, part: _Part, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.place is not None and part.exits and self.solved == part.last and len(args) == 1:
            self._keep(part.entering, self.place, args[0])

    def _given(self, part: _Part, module: nn.Module, args: object, out: Any) -> None:
        part.given = out if self.place is not None and isinstance(out, Tensor) else None

    def _keep(self, kept: dict[int, _Kept], place: int, tensor: Tensor) -> None:
        if tensor.is_contiguous() and tensor.nbytes <= self.left:
            self._count(tensor.nbytes)
            kept[place] = _Kept(tensor.detach(), tensor._version)

    def _drop(self, kept: dict[int, _Kept], place: int) -> None:
        if place in kept:
            self._count(-kept.pop(place).tensor.nbytes)

    def _count(self, size: int) -> None:
        self.held, self.left = self.held + size, self.left - size
        self.room.take("device", size)
