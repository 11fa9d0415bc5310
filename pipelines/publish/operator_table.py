"""The table of operators: what GPTQ takes of one block, by part, and what a step of training takes behind it, on a CPU and on the pretended
card of the tests, next to what it once took.

The counts are `bench compress --count`'s, each in a process of its own; those of before stay as they were published. Nothing is timed.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ...reports import published
from ..bench.operator_counts import BEFORE_SOLVER, STEP_PART
from ..errors import InputError

NAME = "operators"
SHAPES, DEVICES = ("135m", "8b"), ("cpu", "cuda")
CARD = Path("tests/device/pretended.py")
FIELDS = ("operators", "waits")
COLUMNS = (
    ("shape", "shape", "text"), ("part", "part", "text"), ("cpu_operators_before", "CPU, before", "exact"), ("cpu_operators", "CPU", "exact"),
    ("cuda_operators_before", "card, before", "exact"), ("cuda_operators", "card", "exact"), ("cuda_waits_before", "waits, before", "exact"),
    ("cuda_waits", "waits", "exact"), ("cuda_copied_bytes", "copied to it and back", "bytes"),
)  # fmt: skip
NOTES = (
    "Operators that torch dispatches, views among them, while GPTQ (4 bits, group 64, hessian clip) solves the seven matrices of one block of Llama's shape; a kernel is one. The card is the pretended one of the tests, sent what a real one would be. Waits: how often the host waits for a number, a size or a copy.",
    "A step: one micro-batch of 128 tokens through one block and a head of 512, forward, both losses, backward, AdamW, norms as well; the teacher's pass ahead is not in it. Before, the loss, the gradient's norm and every matrix' scales were looked at in each step.",
    "Before: one sweep a matrix, columns one by one everywhere, grids searched in pieces of a CPU cache's size, codes packed word by word.",
    "Made by `make publish TABLE=operators` (the larger shape takes ten minutes and 7 GB): counted, not timed, the same on every machine.",
)


def publish(directory: Path) -> list[Path]:
    """Count what is not there yet, then write the table. InputError outside of the repository, where the pretended card lies."""
    if not CARD.is_file():
        raise InputError(f"{CARD}: no such file; run this from the root of the repository")
    before = {}
    if (published.DIRECTORY / f"{NAME}.json").is_file():
        before = {(row["shape"], row["part"]): row for row in published.read(NAME)["rows"]}
    rows: dict[tuple[str, str], dict[str, object]] = {}
    for shape in SHAPES:
        for device in DEVICES:
            for counted in _counted(directory / NAME, shape, device):
                part = f"a step of {counted['method']}" if counted["part"] == STEP_PART else counted["part"]
                key = shape, part
                row = rows.setdefault(key, {"shape": shape, "part": part})
                kept = {f"{device}_{field}_before": before.get(key, {}).get(f"{device}_{field}_before") for field in FIELDS}
                row |= kept | {f"{device}_{field}": counted[field] for field in (*FIELDS, "views", "read_bytes", "copied_bytes")}
    shown = [row for (_, part), row in rows.items() if part not in BEFORE_SOLVER]
    return published.write(NAME, shown, COLUMNS, title="Operators of GPTQ, one block", notes=NOTES)


def _counted(place: Path, shape: str, device: str) -> list[dict[str, Any]]:
    answer = place / f"bench-compress-count-{shape}-{device}.json"
    if not answer.is_file():
        program = ["-m"] if device == "cpu" else [str(CARD)]
        asked = ["bench", "compress", "--count", "--shape", shape, "--device", device, "-o", str(place)]
        subprocess.run([sys.executable, "-P", *program, "bitmend.pipelines.cli", *asked], stdout=subprocess.DEVNULL, check=True)
    return json.loads(answer.read_text())["rows"]
