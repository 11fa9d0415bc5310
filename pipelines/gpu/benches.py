"""shape: two blocks of a large model through every method of `pipeline bench compress --shape`; kernels: their benchmark, piece by piece.

Knows how the two are started and where they write what they have finished.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .card_results import CardPart
from .child import Call

SHAPE_COLUMNS = (
    ("stage", "stage"), ("method", "method"), ("blocks", "blocks"), ("seconds_per_block", "seconds a block"), ("seconds_per_step", "seconds a step"),
    ("steps", "steps"), ("bits_per_weight", "bits per weight"), ("device_peak_bytes", "memory of the card"), ("host_peak_bytes", "memory of the host"),
    ("error", "error"),
)  # fmt: skip
KERNEL_COLUMNS = (
    ("operator", "operator"), ("variant", "variant"), ("out", "out"), ("inputs", "in"), ("rows", "rows"), ("rank", "rank"),
    ("microseconds", "µs"), ("spread", "spread µs"), ("times_bfloat16", "× bf16"), ("bandwidth_share", "of bandwidth"),
    ("arithmetic_share", "of arithmetic"), ("reason", "refused"),
)  # fmt: skip


def shape(part: CardPart, call: Call) -> None:
    """A row a process; one that had to be stopped goes on in the next call, in its run directory."""
    from dataclasses import replace

    from ..bench import shape
    from ..bench.synthetic import SHAPES

    name, blocks = call.plan.shape
    text = shape.SMALL if name == "1b" else shape.STANDARD
    bench = shape.Bench(name, replace(SHAPES[name], blocks=blocks), text, "cuda", call.place)
    wanted = {f"{name} {stage} {method}": (stage, method) for stage, method in call.plan.shape_rows or shape.ROWS}

    def launch(arguments: Sequence[str], answer: Path) -> dict[str, Any]:
        answer.unlink(missing_ok=True)
        code = call.run(shape.MODULE, arguments, answer.stem)
        if answer.is_file():
            return json.loads(answer.read_text(encoding="utf-8"))
        return {"stopped": True} if code is None else {"error": f"exit code {code}: {call.last_line(answer.stem)}"}

    for key, (stage, method) in wanted.items():
        if key in part.rows or call.over():
            continue
        row = bench.row(stage, method, launch)
        if "stopped" in row:
            part.say(f"{method} was stopped in time")
            continue
        part.add(key, row)
        seconds = row.get("seconds_per_block")
        part.say(f"{method}: {row['error']}" if "error" in row else f"{method}: {seconds or float('nan'):.3g} s a block")
    part.remain([key for key in wanted if key not in part.rows])


def kernels(part: CardPart, call: Call) -> None:
    """The benchmark's journal is read while it is written; what it has finished is kept there for the next call."""
    place, seen = call.place / "kernels", 0

    def watch() -> None:
        nonlocal seen
        journal = place / "bench-kernels.journal"
        if not journal.is_file():
            return
        pieces = [json.loads(line) for line in journal.read_text(encoding="utf-8").split("\n")[1:-1]]
        for piece in pieces[seen:]:
            keep(piece["result"])
            part.say(f"{piece['key']} measured")
        seen = len(pieces)

    def keep(measured: dict[str, Any]) -> None:
        for row in (*measured.get("rows", []), *measured.get("refused", [])):
            part.add(" ".join(str(row[key]) for key in ("operator", "variant", "out", "inputs", "rows", "rank")), row)

    code = call.run("bitmend.kernels.bench", ["--device", "cuda", "--output", str(place), *call.plan.kernels], "kernels", watch)
    if code in (0, 1):
        from ...kernels.bench import beside_bfloat16

        measured = json.loads((place / "bench-kernels.json").read_text(encoding="utf-8"))  # the journal goes with the last piece
        keep(measured | {"rows": beside_bfloat16(measured["rows"])})
        part.note("kernels", None)
        part.remain([])
    else:
        said = "was stopped in time" if code is None else f"exit code {code}: {call.last_line('kernels')}"
        part.note("kernels", None if code is None else f"kernels: {said}")
        part.remain([f"pieces of the benchmark after {len(part.rows)} rows"])
