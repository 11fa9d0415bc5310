"""The teacher of recovery: its last hidden states, streamed block by block a few batches ahead. Knows artifacts; not the student."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...recover.student import Batch, Teacher
from ..blocks import StreamedModel
from .context import Context

TEACHER_TOKENS = 16384


@dataclass
class StreamedTeacher:
    """The teacher's last hidden states, computed block by block for a run of micro-batches at a time, each micro-batch by itself, so
    that what a batch gets does not depend on where a run began."""

    model: StreamedModel
    batches: Callable[[int], Batch]
    last: int
    position: int = 0
    kept: dict[bytes, Tensor] = field(default_factory=dict)

    def hidden(self, ids_BT: Tensor) -> Tensor:
        key = ids_BT.cpu().numpy().tobytes()
        if key not in self.kept:
            self._look_ahead(ids_BT)
        return self.kept[key]

    def _look_ahead(self, ids_BT: Tensor) -> None:
        self.kept.clear()
        wanted = [ids_BT.cpu()]
        index = next((i for i in range(self.position, self.last) if torch.equal(self.batches(i).ids, wanted[0])), None)
        if index is not None:
            count = max(1, TEACHER_TOKENS // ids_BT.numel())
            wanted = [self.batches(i).ids for i in range(index, min(index + count, self.last))]
            self.position = index
        with torch.no_grad():
            hidden = [self.model.embed(ids) for ids in wanted]
            for block in range(self.model.structure.blocks):
                self.model.load_block(block)
                hidden = [self.model.run_block(block, h) for h in hidden]
                self.model.unload_block(block)
        self.kept = {ids.numpy().tobytes(): h for ids, h in zip(wanted, hidden, strict=True)}

    def logits(self, hidden_ND: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model.logits(hidden_ND.unsqueeze(0))[0]


def streamed_teacher(context: Context, batches: Callable[[int], Batch], count: int) -> Teacher:
    """The context's teacher for the first `count` micro-batches."""
    assert context.teacher is not None
    streamed = StreamedTeacher(StreamedModel(context.teacher, context.device, context.dtype), batches, count)
    return Teacher(streamed.hidden, streamed.logits)
