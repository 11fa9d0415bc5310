"""Checkpoints of a stage's hidden states, written once a minute, so that a killed stage does not run finished blocks again.

What is torn, or was left by a kill between two files, is not there: the walk begins at an older one, or at the embeddings. Knows hidden states
and files; not what a stage does with a block.
"""

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..evaluation.perplexity import batches
from ..models.blocks import StreamedModel
from ..models.hidden import HiddenStates, Room
from ..models.sharding import BatchShare
from ..ranks.exchange import Ranks
from ..store.kept import is_whole

SECONDS = 60.0
"""Between two checkpoints: a resumed stage runs again what took at most so long."""
DISK_SHARE = 0.25
"""Of what is free, how much one may take."""


def share_of(ids_NT: Tensor, ranks: Ranks) -> BatchShare:
    """This rank's of the batches of a text."""
    return BatchShare(len([*batches(*ids_NT.shape)]), ranks)


def entering(model: StreamedModel, ids_NT: Tensor, room: Room, share: BatchShare) -> HiddenStates:
    """What enters the first block, of the batches that are here. Every rank learns what the blocks are called with, though it have none."""
    parts = [*batches(*ids_NT.shape)]
    if not share.numbers:
        model.embed(ids_NT[parts[0]])
    return HiddenStates.of((model.embed(ids_NT[parts[number]]) for number in share.numbers), room)


@dataclass(frozen=True)
class States:
    """What enters the block whose turn it is, of the batches that are here: of the model that is compressed; of the dense one, where one runs
    along."""

    hidden: HiddenStates
    dense: HiddenStates | None = None

    def named(self) -> dict[str, HiddenStates]:
        return {"hidden": self.hidden} | ({} if self.dense is None else {"dense": self.dense})


@dataclass
class Checkpoints:
    """In `scratch`, of States with or without those of the dense model, each under the number of blocks that they have passed. Rank 0 writes
    them, and says what there is; each rank reads its own batches."""

    scratch: Path
    dense: bool
    share: BatchShare
    written: float = field(default_factory=time.perf_counter)

    @property
    def names(self) -> tuple[str, ...]:
        return ("hidden", "dense") if self.dense else ("hidden",)

    def latest(self, blocks: int) -> int:
        """How many of the first `blocks` blocks need not be run again."""
        return self.share.ranks.broadcast(self._latest(blocks) if self.share.ranks.leads else None)

    def _latest(self, blocks: int) -> int:
        result = sorted({int(path.name.split("-")[1]) for path in self.scratch.glob("walked-*.safetensors")}, reverse=True)
        return next((index for index in result if index <= blocks and all(is_whole(self._path(index, name)) for name in self.names)), 0)

    def load(self, index: int, room: Room) -> States:
        """What enters block `index`."""
        return States(*(HiddenStates.load(self._path(index, name), room, self.share.has) for name in self.names))

    def keep(self, index: int, states: States) -> None:
        """Write what enters block `index`, if the last time is long enough ago and the disk has room; older ones go."""
        ranks, size = self.share.ranks, sum(slot.size for of_model in states.named().values() for slot in of_model.slots)
        if not ranks.broadcast(ranks.leads and time.perf_counter() - self.written >= SECONDS):
            return
        sizes = ranks.gathered(size)
        if not ranks.broadcast(ranks.leads and sum(sizes) <= DISK_SHARE * shutil.disk_usage(self.scratch).free):
            return
        for name, of_model in states.named().items():
            counts = ranks.in_order(dict(zip(self.share.numbers, of_model.counts, strict=True)))
            everyones = self.share.all_batches(of_model)
            if ranks.leads:
                of_model.save(self._path(index, name), everyones, [*counts.values()])
            else:
                for _ in everyones:
                    pass
        if ranks.leads:
            for path in self.scratch.glob("walked-*.safetensors"):
                if not path.name.startswith(f"walked-{index:05d}-"):
                    path.unlink()
        self.written = time.perf_counter()

    def _path(self, index: int, name: str) -> Path:
        return self.scratch / f"walked-{index:05d}-{name}.safetensors"
