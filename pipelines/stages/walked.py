"""What a stage carries from block to block: hidden states of the calibration text, and which of its batches are this rank's.

Knows hidden states; not what a stage does with a block.
"""

from dataclasses import dataclass

from torch import Tensor

from ..evaluation.perplexity import batches
from ..models.blocks import StreamedModel
from ..models.hidden import HiddenStates, Room
from ..models.sharding import BatchShare
from ..ranks.exchange import Ranks


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
