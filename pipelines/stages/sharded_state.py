"""The state of a training whose values lie in parts on the ranks: torch's distributed checkpoint, a file a rank, which any number of ranks can read.

It lies in the scratch directory of its stage, whole once PARTS_META is in it, and takes the place of the one before by renaming: killed at any moment,
one of the two is whole. Like all of torch's, its index is a pickle: it is read
from this run's directory alone. Knows training states and files.
"""

import os
import shutil
from pathlib import Path

import torch

from ...recover.adamw import TrainState
from ...recover.trainable import Attached
from ..ranks.exchange import Ranks, collective
from ..store.files import read_json, write_json
from ..store.rundir import PARTS_META, TRAINING_PARTS


def keep_parts(scratch: Path, state: TrainState, ranks: Ranks) -> None:
    """Every rank writes its own; rank 0 puts the directory in its place."""
    import torch.distributed.checkpoint as dcp

    place, fresh = _places(scratch)
    if ranks.leads:
        shutil.rmtree(fresh, ignore_errors=True)
    ranks.barrier()
    with collective():
        dcp.save(dict(state.tensors), checkpoint_id=fresh, process_group=ranks.control)
    if ranks.leads:
        write_json(fresh / PARTS_META, state.meta)
        (place / PARTS_META).unlink(missing_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        os.rename(fresh, place)
    ranks.barrier()


def kept_parts(scratch: Path, attached: Attached, ranks: Ranks) -> TrainState | None:
    """What was kept, in the parts that the trainables now lie in; None where nothing was."""
    import torch.distributed.checkpoint as dcp

    latest = next((place for place in _places(scratch) if (place / PARTS_META).is_file()), None) if ranks.leads else None
    place, meta = ranks.broadcast((latest, None if latest is None else read_json(latest / PARTS_META)))
    if place is None:
        return None
    labels = ("value", "first", "second", "best", "good")
    tensors = {f"{label}.{name}": torch.zeros_like(t.parameter.detach()) for label in labels for name, t in attached.trainables.items()}
    with collective():
        dcp.load(tensors, checkpoint_id=place, process_group=ranks.control)
    return TrainState(tensors, meta)


def _places(scratch: Path) -> tuple[Path, Path]:
    """Where the state lies, and where the next one is written."""
    return scratch / TRAINING_PARTS, scratch / f"{TRAINING_PARTS}.new"
