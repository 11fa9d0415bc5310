"""Ranks of torch.distributed as torchrun or srun started them: which part of the work is this process's, and its collectives.

Work units (slots of calibration batches, evaluation batches, micro-batches) do not know how many ranks there are; a unit belongs to the rank
`unit % size`, and whatever is summed is summed in the order of the units: the same bits on any number of ranks. One process calls no
collective and imports nothing of torch.distributed. Knows processes and tensors; no models, no stages. How a process comes among the ranks: `joining`.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import PipelineError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

SLOTS = 8
"""Calibration batch b goes to slot b % SLOTS, slot s belongs to rank s % size: as many ranks as slots can be at work."""
PIECE = 1 << 26
"""Elements of a sum that travel at once: bounds what a sum takes in addition to its total."""

T = TypeVar("T")


class LostRank(PipelineError):
    """A collective failed because another process is gone, or the network is; the watchdog finds which."""


@dataclass(frozen=True)
class Ranks:
    """This process among `size`: `local` is its number on its machine. `Ranks()` is one process alone."""

    rank: int = 0
    size: int = 1
    local: int = 0
    control: Any = field(default=None, repr=False, compare=False)
    """The gloo group of objects, flags and barriers; tensors take the default group."""

    @property
    def leads(self) -> bool:
        """Whether this rank writes artifacts, prints and draws."""
        return self.rank == 0

    def owns(self, unit: int) -> bool:
        return unit % self.size == self.rank

    def agree(self, flag: bool) -> bool:
        """Whether any rank's flag is set."""
        return flag if self.size == 1 else any(self.gathered(flag))

    def barrier(self) -> None:
        if self.size > 1:
            import torch.distributed as dist

            with collective():
                dist.barrier(self.control)

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """`value` of the rank `source` (the others' is not read), which can be pickled."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value if self.rank == source else None]
        with collective():
            dist.broadcast_object_list(box, source, self.control)
        return box[0]

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, which can be pickled, in the order of the ranks."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with collective():
            dist.all_gather_object(values, value, self.control)
        return values

    def in_order(self, mine: Mapping[int, T]) -> dict[int, T]:
        """The ranks' values by unit, sorted by unit."""
        return dict(sorted((unit, value) for part in self.gathered(dict(mine)) for unit, value in part.items()))

    @contextmanager
    def first(self) -> Iterator[None]:
        """Rank 0 runs the body first, then the others, which read what it left: caches, downloads."""
        if not self.leads:
            self.barrier()
        try:
            yield
        finally:
            if self.leads:
                self.barrier()

    def streamed(self, mine: Iterable[T], units: int) -> Iterator[T]:
        """On rank 0 what the ranks have of `units` units, each its own in their order, one at a time; the others send theirs. Tensors arrive on
        the CPU."""
        if self.size == 1:
            yield from mine
            return
        import torch.distributed as dist

        own = iter(mine)
        for unit in range(units):
            owner = unit % self.size
            if self.leads and self.rank == owner:
                yield next(own)
            elif self.leads:
                box: list[Any] = [None]
                with collective():
                    dist.recv_object_list(box, owner, self.control)
                yield box[0]
            elif self.rank == owner:
                value: Any = next(own)
                with collective():
                    dist.send_object_list([value.cpu() if hasattr(value, "cpu") else value], 0, self.control)

    def mesh(self, kind: str) -> Any:
        """All ranks, as torch's parallel modules on this kind of device know them."""
        from torch.distributed.device_mesh import init_device_mesh

        with collective():
            return init_device_mesh(kind, (self.size,))

    def alike(self, values: Mapping[str, Any]) -> None:
        """UsageError that names the first rank for which one of these differs from rank 0's."""
        everyone = self.gathered(dict(values))
        for rank, others in enumerate(everyone):
            for name, value in everyone[0].items():
                if others[name] != value:
                    raise UsageError(f"rank {rank}: its {name} is another than rank 0's ({others[name]}, {value}); start all ranks alike")


ONE = Ranks()


class OrderedSum:
    """Σ of tensors of one shape and dtype in the order of their units, whoever owns them: the same bits on any number of ranks.

    Several ranks: each is handed its part of every rank's tensor (all-to-all) and adds them in the order of the units.
    """

    def __init__(self, ranks: Ranks, like: "Tensor"):
        self.ranks, self.like = ranks, like
        self.parts: dict[int, Tensor] = {}
        """Totals so far: the whole tensor, or of each piece this rank's part."""

    def add(self, tensor: "Tensor | None") -> None:
        """One call a round on every rank: round k is of the units k·size … k·size + size − 1. None: this rank has no unit in this round."""
        if self.ranks.size == 1:
            if tensor is not None:
                self._take(0, tensor)
            return
        import torch.distributed as dist

        flat = None if tensor is None else tensor.detach().reshape(-1)
        for number, (start, stop, width) in enumerate(self._pieces()):
            # one element more, in front of every part, says whether there is anything
            sent = self.like.new_zeros(self.ranks.size, width + 1)
            if flat is not None:
                sent[:, 0] = 1
                for part, some in zip(sent, flat[start:stop].split(width), strict=False):
                    part[1 : 1 + len(some)] = some
            received = sent.new_empty(sent.shape)
            with collective():
                dist.all_to_all_single(_bytes(received), _bytes(sent))
            del sent
            for part in received:
                if bool(part[0]):
                    self._take(number, part[1:])

    def total(self) -> "Tensor":
        """On every rank; zeros where nothing was added."""
        if self.ranks.size == 1:
            return self.parts[0] if self.parts else self.like.new_zeros(self.like.shape)
        import torch.distributed as dist

        whole = self.like.new_empty(self.like.numel())
        for number, (start, stop, width) in enumerate(self._pieces()):
            mine = self.parts.get(number)
            gathered = self.like.new_empty(self.ranks.size, width)
            with collective():
                dist.all_gather(list(_bytes(gathered)), _bytes(self.like.new_zeros(width) if mine is None else mine))
            whole[start:stop] = gathered.reshape(-1)[: stop - start]
        return whole.reshape(self.like.shape)

    def _take(self, number: int, tensor: "Tensor") -> None:
        if number in self.parts:
            self.parts[number] += tensor
        else:
            self.parts[number] = tensor.detach().clone()

    def _pieces(self) -> list[tuple[int, int, int]]:
        """Start, end, and width of a rank's part, of what travels at once."""
        count = self.like.numel()
        ends = [(start, min(start + PIECE, count)) for start in range(0, count, PIECE)]
        return [(start, stop, -(-(stop - start) // self.ranks.size)) for start, stop in ends]


def _bytes(tensor: "Tensor") -> "Tensor":
    """Travelling needs no dtype; gloo lacks some."""
    import torch

    return tensor.view(torch.uint8)


@contextmanager
def collective() -> Iterator[None]:
    """Around a collective: what fails in it is a process that is gone."""
    try:
        yield
    except RuntimeError as error:
        raise LostRank(f"the ranks lost one another ({str(error).strip().splitlines()[0]})") from error
