"""Blocks of an artifact in host memory: each read from disk once, the next one while the present one is computed on.

Knows artifacts; not what a block is made of, nor devices.
"""

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Thread
from typing import Any, TypeVar

from torch import Tensor

from ...compress.weights import DenseWeight, StoredWeight
from ..store.artifact import Artifact, record_of
from .structure import Site

T = TypeVar("T")


def in_background(work: Callable[[], T]) -> "Future[T]":
    """Its result, or what it raised, once somebody asks."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


@dataclass(frozen=True)
class BlockTensors:
    """Every tensor of an artifact whose name begins with one prefix, as stored, those of records included. Nobody writes into them."""

    artifact: Artifact
    prefix: str
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, artifact: Artifact, prefix: str) -> "BlockTensors":
        return cls(artifact, prefix, artifact.tensors(prefix))

    @property
    def linears(self) -> Mapping[str, Any]:
        return self.artifact.linears

    def stored(self, linear: str) -> StoredWeight:
        """The record of one of the block's compressed linears."""
        return record_of(self.artifact, linear, lambda prefix: {n: t for n, t in self.tensors.items() if n.startswith(prefix)})

    def matrix(self, site: Site) -> StoredWeight:
        """A site's record; a plain weight becomes a dense record in its own dtype."""
        if site.name in self.linears:
            return self.stored(site.name)
        return StoredWeight(DenseWeight(site.read(self.tensors[f"{site.module}.{site.parameter}"]).contiguous()))

    def others(self, replaced: Collection[Site]) -> tuple[dict[str, Tensor], dict[str, StoredWeight]]:
        """(plain tensors, records) of the block without those of the sites that are replaced."""
        names, parameters = {s.name for s in replaced}, {f"{s.module}.{s.parameter}" for s in replaced}
        plain = {n: t for n, t in self.tensors.items() if n not in parameters and self.artifact.is_plain(n)}
        return plain, {n: self.stored(n) for n in self.linears if n.startswith(self.prefix) and n not in names}


@dataclass
class BlockReader:
    """Reads an artifact's blocks by the prefix of their names. With `keeps` a block stays until it is dropped, for everybody who needs it
    within a stage; else it is freed by whoever requested it."""

    artifact: Artifact
    keeps: bool = False
    _read: dict[str, "Future[BlockTensors]"] = field(init=False, default_factory=dict)

    def expect(self, prefix: str) -> None:
        """Begin to read a block that will be needed next."""
        if prefix not in self._read:
            self._read[prefix] = in_background(lambda: BlockTensors.read(self.artifact, prefix))

    def block(self, prefix: str) -> BlockTensors:
        self.expect(prefix)
        return self._read[prefix].result() if self.keeps else self._read.pop(prefix).result()

    def drop(self, prefix: str) -> None:
        self._read.pop(prefix, None)
