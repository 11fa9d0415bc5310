"""Hidden states that need not fit into memory: batches [N, T, D] on the device while there is room, then in pinned host memory, then in files.

Bits do not depend on the place. While one batch is computed on the next one is fetched: from pinned memory on a stream of its own, from a
file in a thread. A file loses its name as soon as it is mapped, so nothing of it outlives the process. Knows tensors; no model, no stage.
Legend: N windows of a batch, M windows of all batches, T tokens, D model width.
"""

import json
import math
import os
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal, Self

import safetensors
import torch
from torch import Tensor

from ..devices.compute import free_bytes
from ..errors import InputError
from ..store.files import disk_errors
from ..store.kept import NAMES, data_of, keep_pieces
from .reading import in_background

SHARE = 0.5
"""Of what is free when a walk begins, how much its hidden states may take; a block, its statistics and a solver take the remainder."""
WINDOWS = "windows"

Place = Literal["device", "host", "file"]


@dataclass
class Room:
    """What the hidden states of a walk may take of the device and (where that is a GPU) of the host, in bytes; files lie in `scratch`."""

    device: torch.device
    device_bytes: float = math.inf
    host_bytes: float = math.inf
    scratch: Path | None = None

    @classmethod
    def measured(cls, device: torch.device, scratch: Path, processes: int = 1) -> Self:
        """A share of what is free now; the host's is divided among the processes."""
        host = SHARE * free_bytes(torch.device("cpu")) / processes
        return cls(device, SHARE * free_bytes(device), host, scratch) if device.type == "cuda" else cls(device, host, 0, scratch)

    @property
    def memory_bytes(self) -> float:
        """What is left before files are needed."""
        return self.device_bytes + (self.host_bytes if self.device.type == "cuda" else 0)

    def place(self, size: int) -> Place:
        if size <= self.device_bytes:
            return "device"
        return "host" if self.device.type == "cuda" and _pinned_bytes(size) <= self.host_bytes else "file"

    def take(self, place: Place, size: int) -> None:
        """Of the budget; what is given back is negative."""
        if place == "device":
            self.device_bytes -= size
        elif place == "host":
            self.host_bytes -= math.copysign(_pinned_bytes(abs(size)), size)

    def file(self, size: int) -> Tensor:
        """uint8 [size] that lies in a file without a name. InputError where no directory was given, OutOfMemoryError where the disk is full."""
        if self.scratch is None:
            raise InputError(f"{size} bytes of hidden states do not fit into memory, and no directory was given for them")
        self.scratch.mkdir(parents=True, exist_ok=True)
        with disk_errors(self.scratch), tempfile.NamedTemporaryFile(prefix="hidden-", dir=self.scratch) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk says so here, not by a signal when the page is written
            return torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8)  # stays mapped when its name goes


def _pinned_bytes(size: int) -> int:
    """torch rounds pinned memory up to a power of two."""
    return 1 << max(0, size - 1).bit_length()


@dataclass
class _Slot:
    """Where one batch lies; its room is free again when it is gone."""

    room: Room
    place: Place
    tensor: Tensor
    size: int

    def __del__(self) -> None:
        self.room.take(self.place, -self.size)

    def write(self, batch_NTD: Tensor) -> None:
        if self.place == "device":
            self.tensor = batch_NTD
        else:
            self.tensor.copy_(batch_NTD, non_blocking=self.place == "host")

    def begin(self) -> Callable[[], Tensor]:
        """Start fetching; what is returned waits for it and gives the batch on the device."""
        if self.place == "device":
            return lambda: self.tensor
        if self.place == "host":
            return _copied(self.tensor, self.room.device)
        to_card = self.room.device.type == "cuda"
        read: Future[Tensor] = in_background(lambda: self.tensor.pin_memory() if to_card else self.tensor.clone())
        return lambda: _copied(read.result(), self.room.device)()

    def window(self, number: int) -> Tensor:
        """[T, D] on the device."""
        return self.tensor[number] if self.place == "device" else _copied(self.tensor[number], self.room.device)()


def _slot(room: Room, batch_NTD: Tensor) -> _Slot:
    size = batch_NTD.numel() * batch_NTD.element_size()
    place = room.place(size)
    if place == "device":
        tensor = batch_NTD
    elif place == "host":
        tensor = pinned(batch_NTD.shape, dtype=batch_NTD.dtype)
    else:
        tensor = room.file(size).view(batch_NTD.dtype).view(batch_NTD.shape)
    room.take(place, size)
    slot = _Slot(room, place, tensor, size)
    slot.write(batch_NTD)
    return slot


def pinned(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Host memory that a card reads by itself."""
    return torch.empty(shape, dtype=dtype).pin_memory()


def _copied(host_NTD: Tensor, device: torch.device) -> Callable[[], Tensor]:
    """From host memory to the device; from pinned memory on a side stream, concurrently with what the device computes, after what is queued so far."""
    if not host_NTD.is_pinned():
        return lambda: host_NTD.to(device)
    main, side = torch.cuda.current_stream(device), _stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        copy_NTD = host_NTD.to(device, non_blocking=True)

    def wait() -> Tensor:
        now = torch.cuda.current_stream(device)
        now.wait_stream(side)
        copy_NTD.record_stream(now)
        return copy_NTD

    return wait


_STREAMS: dict[torch.device, "torch.cuda.Stream"] = {}


def _stream(device: torch.device) -> "torch.cuda.Stream":
    """The one that copies."""
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]


@dataclass
class HiddenStates:
    """Batches in order. To iterate gives each on the device, the next one being fetched meanwhile; `rows` reads them window by window."""

    room: Room
    slots: list[_Slot] = field(init=False, default_factory=list)

    @classmethod
    def of(cls, batches: Iterable[Tensor], room: Room) -> Self:
        states = cls(room)
        for batch_NTD in batches:
            states.append(batch_NTD)
        return states

    def append(self, batch_NTD: Tensor) -> None:
        self.slots.append(_slot(self.room, batch_NTD))

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.slots)

    def __getitem__(self, number: int) -> Tensor:
        return self.slots[number].begin()()

    def __iter__(self) -> Iterator[Tensor]:
        return self.at(range(len(self.slots)))

    def at(self, numbers: Sequence[int]) -> Iterator[Tensor]:
        """The batches of these numbers, in this order."""
        waiting = self.slots[numbers[0]].begin() if numbers else None
        for following in (*numbers[1:], None)[: len(numbers)]:
            assert waiting is not None
            batch_NTD = waiting()
            waiting = None if following is None else self.slots[following].begin()
            yield batch_NTD

    def through(self, run: Callable[[Tensor], Tensor]) -> None:
        """Put run(batch) in the place of every batch."""
        for number, batch_NTD in enumerate(self):
            self.put(number, run(batch_NTD))

    def put(self, number: int, batch_NTD: Tensor) -> None:
        old = self.slots[number].tensor
        if old.shape == batch_NTD.shape and old.dtype == batch_NTD.dtype:
            self.slots[number].write(batch_NTD)
        else:
            self.slots[number] = _slot(self.room, batch_NTD)

    def paired(self, run: Callable[[Tensor], Tensor], numbers: Sequence[int]) -> "Paired":
        """Each batch with run(batch), under these numbers."""
        return Paired(self, HiddenStates.of(map(run, self), self.room), {number: at for at, number in enumerate(numbers)})

    @property
    def places(self) -> list[Place]:
        return [slot.place for slot in self.slots]

    @property
    def counts(self) -> list[int]:
        """Windows of every batch."""
        return [slot.tensor.shape[0] for slot in self.slots]

    @property
    def tokens(self) -> int:
        return sum(slot.tensor.shape[0] * slot.tensor.shape[1] for slot in self.slots)

    @property
    def windows(self) -> int:
        return sum(slot.tensor.shape[0] for slot in self.slots)

    def window(self, number: int) -> Tensor:
        """[T, D] on the device, alone."""
        starts = list(accumulate((slot.tensor.shape[0] for slot in self.slots), initial=0))
        at = bisect_right(starts, number) - 1
        return self.slots[at].window(number - starts[at])

    def whole(self) -> Tensor:
        """[M, T, D] on the device."""
        return torch.cat(list(self))

    def save(self, path: Path, batches: Iterable[Tensor] | None = None, counts: Sequence[int] | None = None) -> None:
        """[M, T, D] as the tensor `hidden` of a safetensors file, written batch by batch; how many windows each has (`counts`) is in its header.
        `batches`: instead of these alone, all, of which these are some."""
        (_, length, width), dtype = self.slots[0].tensor.shape, self.slots[0].tensor.dtype
        counts = self.counts if counts is None else list(counts)
        size = sum(counts) * length * width * dtype.itemsize
        entry = {"dtype": NAMES[str(dtype)], "shape": [sum(counts), length, width], "data_offsets": [0, size]}
        keep_pieces(path, {"hidden": entry}, map(data_of, self if batches is None else batches), {WINDOWS: json.dumps(counts)})

    @classmethod
    def load(cls, path: Path, room: Room, mine: Callable[[int], bool] = lambda number: True) -> Self:
        """The same batches, or those whose number is `mine`, read one by one from a file that `save` wrote and nobody has touched since."""
        with safetensors.safe_open(path, framework="pt") as file:
            hidden, ends = file.get_slice("hidden"), list(accumulate(json.loads(file.metadata()[WINDOWS]), initial=0))
            wanted = (ends for number, ends in enumerate(pairwise(ends)) if mine(number))
            return cls.of((hidden[start:end].to(room.device) for start, end in wanted), room)

    def rows(self, numbers: Sequence[int] | None = None) -> "StateRows":
        """The windows as rows; `numbers` under which they are known, where these are some of a text's."""
        return StateRows(self, {number: at for at, number in enumerate(range(self.windows) if numbers is None else numbers)})


@dataclass(frozen=True)
class Paired:
    """Two states of the same text, batch by batch; `places` says where the batch of a number is."""

    first: HiddenStates
    second: HiddenStates
    places: Mapping[int, int]

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        place = self.places[number]
        return self.first[place], self.second[place]

    def items(self) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        return zip(self.places, zip(self.first, self.second, strict=True), strict=True)


@dataclass(frozen=True)
class StateRows:
    """All batches as one [M, T, D], of which only the indexed rows are fetched: by numbers in a tensor, or by a slice. `places` says where among
    the windows at hand a number's is."""

    states: HiddenStates
    places: Mapping[int, int]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, wanted: Tensor | slice) -> Tensor:
        numbers = wanted.tolist() if isinstance(wanted, Tensor) else list(self.places)[wanted]
        return torch.stack([self.states.window(self.places[number]) for number in numbers])
