"""Which part of the work is this process's, and how it speaks to the others: ranks of torch.distributed as torchrun or srun started them.

Work units (slots of calibration batches, evaluation batches, micro-batches) do not know how many ranks there are; a unit belongs to the rank
`unit % size`, and whatever is summed is summed in the order of the units: the same bits on any number of ranks. One process calls no
collective and imports nothing of torch.distributed. Knows processes and tensors; no models, no stages. Who is missing: `watchdog`.
"""

import json
import logging
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import PipelineError, UsageError
from .watchdog import Watchdog, neighbours_of, process_identity

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("bitmend")
SLOTS = 8
"""Calibration batch b goes to slot b % SLOTS, slot s belongs to rank s % size: as many ranks as slots can be at work."""
PATIENCE = timedelta(days=30)
"""Of a collective: who is gone is found by the watchdog, not by those who wait."""
JOINING = timedelta(seconds=120)
"""How long the ranks wait for one another at the start."""
MISSED = timedelta(seconds=30)
"""After how long rank 0 says whom it waits for."""
PIECE = 1 << 26
"""Elements of a sum that travel at once: bounds what a sum takes beside its total."""
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

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

            with together():
                dist.barrier(self.control)

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """`value` of the rank `source` (the others' is not read), which can be pickled."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value if self.rank == source else None]
        with together():
            dist.broadcast_object_list(box, source, self.control)
        return box[0]

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, which can be pickled, in the order of the ranks."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with together():
            dist.all_gather_object(found, value, self.control)
        return found

    def in_order(self, mine: Mapping[int, T]) -> dict[int, T]:
        """The ranks' values by unit, sorted by unit."""
        return dict(sorted((unit, value) for part in self.gathered(dict(mine)) for unit, value in part.items()))

    @contextmanager
    def first(self) -> Iterator[None]:
        """Rank 0 goes through the body, then the others do, who find what it left: caches, downloads."""
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
                with together():
                    dist.recv_object_list(box, owner, self.control)
                yield box[0]
            elif self.rank == owner:
                value: Any = next(own)
                with together():
                    dist.send_object_list([value.cpu() if hasattr(value, "cpu") else value], 0, self.control)

    def alike(self, found: Mapping[str, Any]) -> None:
        """UsageError that names the first rank for which one of these differs from rank 0's."""
        everyone = self.gathered(dict(found))
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
            with together():
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
            with together():
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
def together() -> Iterator[None]:
    """Around a collective: what fails in it is a process that is gone."""
    try:
        yield
    except RuntimeError as error:
        raise LostRank(f"the ranks lost one another ({str(error).strip().splitlines()[0]})") from error


# -- joining -----------------------------------------------------------------------------------------------------------------------


def world() -> tuple[int, int, int] | None:
    """(rank, size, local rank) where a launcher started several processes. UsageError for variables that do not fit together."""
    found = {name: os.environ.get(name, "") for name in VARIABLES}
    if found["WORLD_SIZE"] in ("", "1"):
        return None
    size, rank, local, port = (_number(name, found[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"))
    if not found["MASTER_ADDR"]:
        raise UsageError(f"WORLD_SIZE is {size} and MASTER_ADDR is not set; start with torchrun, or set what it sets: {', '.join(VARIABLES)}")
    if not 0 <= rank < size or not 0 < port < 1 << 16:
        raise UsageError(f"RANK {rank}, WORLD_SIZE {size}, MASTER_PORT {port}: ranks are 0 to {max(size - 1, 0)}, ports 1 to 65535")
    return rank, size, local


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        what = f"is {text!r}, which is no number" if text else "is not set"
        raise UsageError(f"WORLD_SIZE is set and {name} {what}; start with torchrun, or set what it sets: {', '.join(VARIABLES)}")
    return int(text)


def join() -> Ranks:
    """This process among the ranks that a launcher started, from now on `joined()`; one process alone where none did. Collectives of tensors on
    a card go through NCCL where this torch has it, all else through gloo. UsageError names the port that is taken, or the ranks that did not
    come."""
    found = world()
    if found is None:
        return joined()
    import torch
    import torch.distributed as dist

    rank, size, local = found
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = _store(rank, host, port)
    watchdog = Watchdog(rank, size, store.clone(), f"{host}:{port}")
    watchdog.here()
    watchdog.begin(neighbours_of(rank, _processes(store, rank, size)))
    _present.append((Ranks(rank, size, local), watchdog))  # a rank that is lost on the way into the groups is found, too
    _prefer_interface(host, port)
    cards = torch.cuda.is_available() and dist.is_nccl_available()
    options: dict[str, Any] = {"store": dist.PrefixStore("groups", store), "rank": rank, "world_size": size, "timeout": PATIENCE}
    with together():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cards else "gloo", **options)
        control = dist.new_group(backend="gloo", timeout=PATIENCE) if cards else dist.group.WORLD
    _present[-1] = Ranks(rank, size, local, control), watchdog
    return joined()


_present: list[tuple[Ranks, Watchdog]] = []
"""This process among its ranks, from `join` to `leave`."""


def joined() -> Ranks:
    return _present[-1][0] if _present else ONE


def watching() -> Watchdog | None:
    """Whom a rank tells how it ends; None for one process."""
    return _present[-1][1] if _present else None


def leave() -> None:
    """The orderly end: every rank comes here, or none."""
    if not _present:
        return
    import torch.distributed as dist

    ranks, watchdog = _present[-1]
    watchdog.depart()
    ranks.barrier()
    dist.destroy_process_group()
    _present.clear()


def _store(rank: int, host: str, port: int) -> Any:
    """Where torchrun keeps one, that; else rank 0's."""
    import torch.distributed as dist

    launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        plain = dist.TCPStore(host, port, None, rank == 0 and not launched, JOINING, wait_for_workers=False)
        return dist.PrefixStore(f"bitmend-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", plain)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        taken = "EADDRINUSE" in reason or "in use" in reason
        way = "it is in use; choose another MASTER_PORT (torchrun: --master-port)" if taken else f"not reached ({reason})"
        raise UsageError(f"rank {rank}: MASTER_ADDR {host}, MASTER_PORT {port}: {way}") from error


def _processes(store: Any, rank: int, size: int) -> list[list[str] | None]:
    """What names every rank's process, once all have come."""
    names = [f"process-{other}" for other in range(size)]
    try:
        store.set(names[rank], json.dumps(process_identity()))
        try:
            store.wait(names, MISSED)
        except RuntimeError:
            if rank == 0:
                log.warning("waiting for rank %s of %d, until %d s", _missing(store, names), size, JOINING.seconds)
            store.wait(names, JOINING - MISSED)
        return [json.loads(text) for text in store.multi_get(names)]
    except RuntimeError as error:
        raise UsageError(
            f"rank {_missing(store, names)} of {size} did not come within {JOINING.seconds} s; start all of WORLD_SIZE, with one MASTER_ADDR"
        ) from error


def _missing(store: Any, names: list[str]) -> str:
    """Who has not come; without the store, whoever kept it has left."""
    try:
        return ", ".join(str(rank) for rank, name in enumerate(names) if not store.check([name]))
    except RuntimeError:
        return "0 (or whoever keeps the store)"


def _prefer_interface(host: str, port: int) -> None:
    """Have gloo use the network interface that leads to rank 0; by itself it takes that of the machine's name, which may be none that others
    reach."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, port))  # sends nothing
        except OSError:
            return
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
            except OSError:
                continue
            if socket.inet_ntoa(found[20:24]) == address or (name == "lo" and address.startswith("127.")):
                os.environ["GLOO_SOCKET_IFNAME"] = name
                return
