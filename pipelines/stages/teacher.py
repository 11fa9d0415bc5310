"""The teacher of recovery: its last hidden states, streamed block by block a few batches ahead, and kept for the run's other stages.

Knows artifacts; not the student.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...recover.student import Batch, Teacher
from ..models.blocks import StreamedModel
from ..store.kept import keep, kept
from .context import Context

TEACHER_TOKENS = 16384
STATE_BYTES = 10**9
"""Most that the states of all micro-batches may take on disk (a quarter of what is free, if that is less)."""


@dataclass
class StateFiles:
    """Last hidden states by the tokens they are of, a file each, exactly as they were computed: a combination of a sweep, a second recover
    stage or a resumed one reads what an earlier one computed. A torn or missing file is computed again."""

    directory: Path
    left: int = 0

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        taken = sum(path.stat().st_size for path in self.directory.parent.glob("*/*.safetensors"))
        self.left = min(STATE_BYTES - taken, shutil.disk_usage(self.directory).free // 4)

    def read(self, ids_BT: Tensor) -> Tensor | None:
        found = kept(self._path(ids_BT))
        return None if found is None else found[0]["hidden"].to(ids_BT.device)

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
    that what a batch gets does not depend on where a run began."""

    model: StreamedModel
    batches: Callable[[int], Batch]
    last: int
    files: StateFiles
    position: int = 0
    kept: dict[bytes, Tensor] = field(default_factory=dict)

    def hidden(self, ids_BT: Tensor) -> Tensor:
        key = ids_BT.cpu().numpy().tobytes()
        if key not in self.kept:
            self._look_ahead(ids_BT)
        return self.kept[key]

    def _look_ahead(self, ids_BT: Tensor) -> None:
        self.kept.clear()
        found = self.files.read(ids_BT)
        if found is not None:
            self.kept = {ids_BT.cpu().numpy().tobytes(): found}
            return
        wanted = [ids_BT.cpu()]
        index = next((i for i in range(self.position, self.last) if torch.equal(self.batches(i).ids, ids_BT)), None)
        if index is not None:
            count = max(1, TEACHER_TOKENS // ids_BT.numel())
            ahead = [self.batches(i).ids.cpu() for i in range(index + 1, min(index + count, self.last))]
            wanted += [ids for ids in ahead if not self.files.has(ids)]
            self.position = index
        with torch.no_grad():
            hidden = [self.model.embed(ids) for ids in wanted]
            for block in self.model.walk():
                hidden = [self.model.run_block(block, h) for h in hidden]
        for ids, h in zip(wanted, hidden, strict=True):
            self.files.write(ids, h)
        self.kept = {ids.numpy().tobytes(): h for ids, h in zip(wanted, hidden, strict=True)}

    def logits(self, hidden_ND: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model.logits(hidden_ND.unsqueeze(0))[0]


def streamed_teacher(context: Context, batches: Callable[[int], Batch], count: int) -> Teacher:
    """The context's teacher for the first `count` micro-batches."""
    assert context.teacher is not None
    kind = f"{context.teacher.key[:16]}-{context.device.type}-{str(context.dtype).removeprefix('torch.')}"
    files = StateFiles(context.teacher_states / kind)
    streamed = StreamedTeacher(StreamedModel(context.teacher, context.device, context.dtype), batches, count, files)
    return Teacher(streamed.hidden, streamed.logits)
