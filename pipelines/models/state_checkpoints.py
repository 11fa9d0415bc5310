"""Checkpoints of hidden states on their way through the blocks, written once a minute, so that a killed walk does not run finished blocks again.

What is torn, or was left by a kill between two files, is not there: the walk begins at an older one, or at the embeddings. Knows hidden states
and files; not what is done in a block.
"""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..ranks.exchange import Ranks
from ..store.kept import is_whole
from .hidden import HiddenStates, Room
from .sharding import BatchShare

SECONDS = 60.0
"""Between two checkpoints: a resumed walk runs again what took at most so long."""
DISK_SHARE = 0.25
"""Of what is free, how much one may take."""


@dataclass
class Checkpoints:
    """In `scratch`, of hidden states by name, each under the number of blocks that they have passed. `shares`: which of the batches are this
    rank's. Rank 0 writes them, and says what there is; each rank reads its own batches."""

    scratch: Path
    shares: Mapping[str, BatchShare]
    written: float = field(default_factory=time.perf_counter)

    @property
    def ranks(self) -> Ranks:
        return next(iter(self.shares.values())).ranks

    def latest(self, blocks: int) -> int:
        """How many of the first `blocks` blocks need not be run again."""
        return self.ranks.broadcast(self._latest(blocks) if self.ranks.leads else None)

    def _latest(self, blocks: int) -> int:
        result = sorted({int(path.name.split("-")[1]) for path in self._files()}, reverse=True)
        return next((index for index in result if index <= blocks and all(is_whole(self._path(index, name)) for name in self.shares)), 0)

    def load(self, index: int, room: Room) -> dict[str, HiddenStates]:
        """What enters block `index`."""
        return {name: HiddenStates.load(self._path(index, name), room, share.has) for name, share in self.shares.items()}

    def keep(self, index: int, states: Mapping[str, HiddenStates]) -> None:
        """Write what enters block `index`, if the last time is long enough ago and the disk has room; older ones go."""
        ranks, size = self.ranks, sum(slot.size for each in states.values() for slot in each.slots)
        if not ranks.broadcast(ranks.leads and time.perf_counter() - self.written >= SECONDS):
            return
        sizes = ranks.gathered(size)
        if ranks.leads:
            self.scratch.mkdir(parents=True, exist_ok=True)
        if not ranks.broadcast(ranks.leads and sum(sizes) <= DISK_SHARE * shutil.disk_usage(self.scratch).free):
            return
        for name, each in states.items():
            share = self.shares[name]
            counts = ranks.in_order(dict(zip(share.numbers, each.counts, strict=True)))
            everyones = share.all_batches(each)
            if ranks.leads:
                each.save(self._path(index, name), everyones, [*counts.values()])
            else:
                for _ in everyones:
                    pass
        if ranks.leads:
            self.forget(but=index)
        self.written = time.perf_counter()

    def forget(self, but: int | None = None) -> None:
        """Remove all, or all but those under one number of blocks."""
        for path in self._files():
            if but is None or not path.name.startswith(f"walked-{but:05d}-"):
                path.unlink()

    def _files(self) -> list[Path]:
        return [*self.scratch.glob("walked-*.safetensors")]

    def _path(self, index: int, name: str) -> Path:
        return self.scratch / f"walked-{index:05d}-{name}.safetensors"
