"""The table of scaling over processes: calibration, solving and recovery on 1, 2 and 4 of them, next to what `pipeline plan` predicts.

Rows are `bench scale`'s. The machine is named: its cores are shared by the processes, and by whatever else runs.
"""

import os
from pathlib import Path

from ...reports import published
from ...reports.json_values import integer, text
from ..bench import process_scaling
from ..doctor import cpu_name

NAME = "scale"
COLUMNS = (
    ("subject", "what", "text"), ("scaling", "scaling", "text"), ("ranks", "processes", "exact"), ("seconds", "seconds", "seconds"),
    ("predicted_seconds", "predicted", "seconds"), ("core_seconds", "seconds on a core for each", "seconds"),
    ("predicted_core_seconds", "predicted", "seconds"), ("deviation", "off by", "percent"), ("efficiency", "efficiency", "percent"),
    ("collectives", "collectives", "exact"), ("predicted_collectives", "predicted", "exact"), ("sent_bytes", "sent by each", "bytes"),
    ("predicted_sent_bytes", "predicted", "bytes"), ("waited_seconds", "waited", "seconds"),
)  # fmt: skip


def publish(directory: Path) -> list[Path]:
    """Measure what is not there yet, then write the table."""
    kept = published.PublishedRows(directory / f"{NAME}.jsonl", ("subject", "scaling", "ranks"), {"shape": str(process_scaling.SHAPE)})
    for name in process_scaling.SUBJECTS:
        if {"subject": name, "scaling": "weak", "ranks": process_scaling.RANKS[-1]} not in kept:
            for row in process_scaling.rows((name,), output=directory / NAME):
                kept.append(row)
    shape = process_scaling.SHAPE
    notes = (
        f"{cpu_name()}, {os.cpu_count()} cores, processes of one thread talking through gloo on one machine. More processes than cores share them: "
        "their seconds by the clock are predicted as so many times longer.",
        f"A model of random weights, {shape.blocks} block of width {shape.width}. Strong scaling: the same work; weak: so many times the calibration "
        "text, the blocks (solving) or the micro-batches of an update.",
        "Seconds on a core for each: the processors' time along the critical path, from collective to collective the longest of the ranks, so "
        "that other programs on the machine do not count. Efficiency is of those seconds. Seconds and waiting are the clock's, other programs included.",
        "Predicted: `pipeline plan` with the constants that the processes measure while all of them run. Bytes of sums are exact, those of "
        "pickled objects and of hidden states kept once a minute are not.",
        "Made by `make publish TABLE=scale`.",
    )
    order = {name: number for number, name in enumerate(process_scaling.SUBJECTS)}
    rows = sorted(kept, key=lambda row: (order[text(row["subject"])], text(row["scaling"]), integer(row["ranks"])))
    return published.write(NAME, rows, COLUMNS, title="Scaling over processes", notes=notes)
