"""Published results of plain methods on the demo model, drawn next to a run of it in the plot of sizes.

Knows where the rows lie; draws nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import replace

from .published import DIRECTORY
from .record import RunRecord, StageRecord

ROWS = DIRECTORY / "plain.json"


def rivals(record: RunRecord) -> Sequence[StageRecord]:
    """The published rows, if the run is of their model and was measured as they were; of further texts those that were the same."""
    published = RunRecord.from_json(json.loads(ROWS.read_text(encoding="utf-8")))
    if record.model != published.model or record.protocol.identity() != published.protocol.identity():
        return ()
    same = [name for name, text in record.texts.items() if name in published.texts and text.identity() == published.texts[name].identity()]
    return [replace(row, texts={name: row.texts[name] for name in same}) for row in published.stages]
