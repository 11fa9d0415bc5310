"""The teacher of recovery: its last hidden states, streamed block by block a few batches ahead, and kept for the run's other stages.

Knows artifacts; not the student.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...recover.student import Batch, Teacher
from ..models.blocks import StreamedModel
from ..models.hidden import HiddenStates, Room
from ..store.kept import keep, kept
from .context import Context

TEACHER_TOKENS = 16384
"""How far the teacher runs ahead on a CPU, where its blocks are read from memory; and the states of how many tokens may lie on the device."""
AHEAD_BYTES = 4 * 10**9
"""On a card, where each pass reads the whole dense model once more: what the states of one pass may take of the host."""
STATE_BYTES = 4 * 10**9
"""Most that the states of all micro-batches may take on disk (a quarter of what is free, if that is less)."""


@dataclass
class StateFiles:
    """Last hidden states by the tokens they are of, a file each, exactly as they were computed: a combination of a sweep, a second recover
    stage or a resumed one reads what an earlier one computed, whichever of the processes that was. A torn or missing file is computed again."""

    directory: Path
    processes: int = 1
    left: int = 0

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        taken = sum(path.stat().st_size for path in self.directory.parent.glob("*/*.safetensors"))
        self.left = min(STATE_BYTES - taken, shutil.disk_usage(self.directory).free // 4) // self.processes

    def read(self, ids_BT: Tensor) -> Tensor | None:
        result = kept(self._path(ids_BT))
        return None if result is None else result[0]["hidden"]

    def write(self, ids_BT: Tensor, hidden_BTD: Tensor) -> None:
        size = hidden_BTD.numel() * hidden_BTD.element_size()
        if size <= self.left:
            keep(self._path(ids_BT), {"hidden": hidden_BTD})
            self.left -= size

    def has(self, ids_BT: Tensor) -> bool:
        return self._path(ids_BT).is_file()

    def _path(self, ids_BT: Tensor) -> Path:
        ids = ids_BT.cpu().contiguous()
        identity = f"{tuple(ids.shape)}".encode() + ids.numpy().tobytes()
        return self.directory / f"{hashlib.sha256(identity).hexdigest()[:32]}.safetensors"


@dataclass
class StreamedTeacher:
    """The teacher's last hidden states, computed block by block for a run of micro-batches at a time, each micro-batch by itself, so
    that what a batch gets does not depend on where a run began. `numbers` of the micro-batches that this process has, in the order in which they
    come; `position` among them."""

    model: StreamedModel
    batches: Callable[[int], Batch]
    numbers: Sequence[int]
    files: StateFiles
    room: Room
    position: int = 0
    states: HiddenStates = field(init=False)
    kept: dict[bytes, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.states = HiddenStates(self.room)

    def hidden(self, batch: Batch) -> Tensor:
        key = _key(batch.text)
        if key not in self.kept:
            self._look_ahead(batch)
        return self.states[self.kept[key]]

    def _look_ahead(self, batch: Batch) -> None:
        result = self.files.read(batch.text)
        if result is not None:
            self._keep([batch.text], [result.to(batch.ids.device)])
            return
        wanted = [batch.text]
        last, text = len(self.numbers), lambda i: self.batches(self.numbers[i]).text
        onward = (*range(self.position, last), *range(self.position))  # a search for a rate, and a step back, begin anew
        index = next((i for i in onward if torch.equal(text(i), batch.text)), None)
        if index is not None:
            count = max(1, tokens_ahead(self.model.device, self.token_bytes) // batch.text.numel())
            ahead = [text(i) for i in range(index + 1, min(index + count, last))]
            wanted += [ids for ids in ahead if not self.files.has(ids)]
            self.position = index
        with torch.no_grad():
            self._keep(wanted, map(self.model.embed, wanted))
            for block in self.model.walk():
                self.states.through(partial(self.model.run_block, block))
        for ids, hidden_BTD in zip(wanted, self.states, strict=True):
            self.files.write(ids, hidden_BTD)

    def _keep(self, wanted: list[Tensor], hidden: Iterable[Tensor]) -> None:
        """In the place of those that were kept."""
        self.states = HiddenStates(self.room)  # first, so that the others give their room back
        self.kept = {_key(ids): number for number, ids in enumerate(wanted)}
        for batch_BTD in hidden:
            self.states.append(batch_BTD)

    @property
    def token_bytes(self) -> int:
        return self.model.model.config.get_text_config().hidden_size * self.model.dtype.itemsize

    def logits(self, hidden_ND: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model.logits(hidden_ND.unsqueeze(0))[0]


def tokens_ahead(device: torch.device, token_bytes: int) -> int:
    """Tokens of one pass of the teacher: on a card all whose states of `token_bytes` the host may hold."""
    return TEACHER_TOKENS if device.type == "cpu" else max(TEACHER_TOKENS, AHEAD_BYTES // token_bytes)


def _key(ids_BT: Tensor) -> bytes:
    return ids_BT.cpu().numpy().tobytes()


def streamed_teacher(context: Context, batches: Callable[[int], Batch], numbers: Sequence[int]) -> Teacher:
    """The context's teacher for the micro-batches of these numbers."""
    assert context.teacher is not None
    kind = f"{context.teacher.key[:16]}-{context.device.type}-{str(context.dtype).removeprefix('torch.')}"
    processes = context.ranks.size
    files, room = StateFiles(context.teacher_states / kind, processes), Room.measured(context.device, context.scratch, processes)
    streamed = StreamedTeacher(StreamedModel(context.teacher, context.device, context.dtype), batches, numbers, files, room)
    if context.device.type != "cpu":
        room.device_bytes = min(room.device_bytes, TEACHER_TOKENS * streamed.token_bytes)
    return Teacher(streamed.hidden, streamed.logits)
