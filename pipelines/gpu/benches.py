"""shape: two blocks of a large model through every method of `pipeline bench compress --shape`; kernels: their benchmark, piece by piece;
decode: a whole model of random weights, which writes and reads, by each way to store it.

Knows how the two are started and where they write what they have finished.
"""

import json
from collections.abc import Callable, Sequence
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
DECODE_COLUMNS = (
    ("variant", "variant"), ("regime", "regime"), ("blocks", "blocks"), ("tokens", "tokens"), ("tokens_per_second", "tokens/s"), ("milliseconds", "ms"),
    ("spread", "spread ms"), ("times_bfloat16", "× bf16"), ("resident_bytes", "weights in memory"), ("backends", "matrices"),
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
    place = call.place / "kernels"

    def keep(measured: dict[str, Any]) -> None:
        for row in (*measured.get("rows", []), *measured.get("refused", [])):
            part.add(" ".join(str(row[key]) for key in ("operator", "variant", "out", "inputs", "rows", "rank")), row)

    watch = _journal(part, place / "bench-kernels.journal", keep)
    code = call.run("bitmend.kernels.bench", ["--device", "cuda", "--output", str(place), *call.plan.kernels], "kernels", watch)
    if code in (0, 1):
        from ...kernels.bench import relative_to_bfloat16

        measured = json.loads((place / "bench-kernels.json").read_text(encoding="utf-8"))  # the journal goes with the last piece
        keep(measured | {"rows": relative_to_bfloat16(measured["rows"])})
    _ended(part, call, "kernels", code in (0, 1), code)


def decode(part: CardPart, call: Call) -> None:
    """A variant is a row of decode and one of prefill as soon as it is measured; what is left is measured in the next call."""
    place = call.place / "decode"

    def keep(measured: dict[str, Any]) -> None:
        for row in measured["rows"]:
            part.add(f"{row['variant']} {row['regime']}", row)

    from ..bench.model_speed import JOURNAL

    watch = _journal(part, place / JOURNAL, keep)
    code = call.run("bitmend.pipelines.cli", ["bench", "generate", "--device", "cuda", "-o", str(place), *call.plan.decode], "decode", watch)
    if code == 0:
        for path in place.glob("bench-generate-shape-*.json"):
            keep(json.loads(path.read_text(encoding="utf-8")))
    _ended(part, call, "decode", code == 0, code)


def _journal(part: CardPart, journal: Path, keep: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
    """Hands on what a benchmark's journal has got since the last look."""
    seen = 0

    def watch() -> None:
        nonlocal seen
        if not journal.is_file():
            return
        pieces = [json.loads(line) for line in journal.read_text(encoding="utf-8").split("\n")[1:-1]]
        for piece in pieces[seen:]:
            if "rows" in piece["result"]:  # the environment has none
                keep(piece["result"])
            part.say(f"{piece['key']} measured")
        seen = len(pieces)

    return watch


def _ended(part: CardPart, call: Call, name: str, finished: bool, code: int | None) -> None:
    if finished:
        part.note(name, None)
        part.remain([])
    else:
        part.note(name, None if code is None else f"{name}: exit code {code}: {call.last_line(name)}")
        part.remain([f"pieces of the benchmark after {len(part.rows)} rows"])
