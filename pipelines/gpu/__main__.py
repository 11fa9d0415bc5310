"""`make gpu [PART=tests|demo|shape|kernels|decode|train]`, that is `python -m bitmend.pipelines.gpu [PART …]`: tests and measurements on a card.

Each part stops by itself after two minutes, prints its results and what is left, and goes on in the next call. What is finished is in
reports/published/gpu-<card>.{json,md} at once; `runs/gpu` keeps what is under way. Knows the parts' order; not what they measure.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import benches, demo_runs, suite
from .card import missing, way_out
from .card_results import CardPart, Results
from .child import ROOT, Call, CardPlan

PARTS: dict[str, tuple[Callable[[CardPart, Call], None], Sequence[tuple[str, str]]]] = {
    "tests": (suite.tests, suite.COLUMNS),
    "demo": (demo_runs.demo, demo_runs.DEMO_COLUMNS),
    "shape": (benches.shape, benches.SHAPE_COLUMNS),
    "kernels": (benches.kernels, benches.KERNEL_COLUMNS),
    "decode": (benches.decode, benches.DECODE_COLUMNS),
    "train": (demo_runs.train, demo_runs.TRAIN_COLUMNS),
}
PUBLISHED = ROOT / "reports" / "published"


def main(arguments: Sequence[str] | None = None, plan: CardPlan | None = None) -> int:
    """0 when nothing failed, 1 when something did (it is listed), 2 when nothing could be run."""
    options = _parse(arguments)
    parts = [name for name in options.part or PARTS if _complete(name)]
    if not parts:
        return 2
    launcher = (sys.executable, options.launcher) if options.launcher else Call.launcher
    first = Call(plan or CardPlan(), options.place, time.monotonic() + 60, 5, launcher)
    machine = _machine(first)
    if machine.get("card") is None:
        sys.stdout.write(f"make gpu: {machine.get('error') or 'this torch sees no CUDA device'}; nothing was measured\n")
        return 2
    from ..bench.kernel_tables import short_name

    short = short_name({"device": "cuda", "device_name": machine["card"]}) if not options.launcher else machine["card"]
    results = Results(options.output or PUBLISHED, short, machine, {name: columns for name, (_, columns) in PARTS.items()})
    sys.stdout.write(f"{machine['card']}, torch {machine['torch']}, triton {machine['triton']}; results in {results.path}\n")
    for name in parts:
        _one(name, results, options, plan or CardPlan(), launcher, short)
    failed = [name for name in parts if _failed(results.parts[name])]
    return 1 if failed or len(parts) < len(options.part or PARTS) else 0


def _one(name: str, results: Results, options: argparse.Namespace, plan: CardPlan, launcher: tuple[str, ...], short: str) -> None:
    part = results.begin(name, options.again, by_sources=name == "tests")
    if part.left == []:
        part.say("finished before; AGAIN=1 measures it anew")
        return
    until = time.monotonic() + options.seconds
    PARTS[name][0](part, Call(plan, options.place / short / name, until, min(20.0, options.seconds / 6), launcher))
    part.say("finished" if part.left == [] else f"left: {_some(part.left)}; the same command goes on")


def _some(left: Sequence[str] | None) -> str:
    if left is None:
        return "all of it"
    return ", ".join(left) if len(left) <= 12 else f"{len(left)}, the next are {', '.join(left[:5])}"


def _failed(part: dict[str, Any]) -> bool:
    return bool(part["notes"]) or any("error" in row or row.get("outcome") == "failed" for row in part["rows"].values())


def _complete(part: str) -> bool:
    """Whether this Python has what the part needs; else the line that says what is missing."""
    absent = missing(part)
    if absent:
        sys.stdout.write(f"{part}: {sys.executable} lacks {', '.join(absent)}: {way_out(absent)}\n")
    return not absent


def _machine(call: Call) -> dict[str, Any]:
    call.run("bitmend.pipelines.gpu.card", [], "machine")
    line = call.last_line("machine")
    return json.loads(line) if line.startswith("{") else {"error": line}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make gpu", description="What a card has to show, in pieces of two minutes.")
    parser.add_argument("part", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; without any all in turn")
    parser.add_argument("--seconds", type=float, default=120.0, help="of each part")
    parser.add_argument("--again", action="store_true", help="forget the results that these parts have")
    parser.add_argument("--output", type=Path, help="where results are merged, instead of reports/published")
    parser.add_argument("--place", type=Path, default=ROOT / "runs" / "gpu", help="where runs and benchmarks lie")
    parser.add_argument("--launcher", help="a script that runs a module: tests/device/pretended.py, where there is no card")
    options = parser.parse_args(arguments)
    for part in options.part:
        if part not in PARTS:
            parser.error(f"unknown part {part!r}; choose one of {', '.join(PARTS)}")
    if options.launcher and options.output is None:
        parser.error("--launcher needs --output: what is not measured on a card is not published")
    options.place = options.place.resolve()
    return options


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(130))  # what it has started is ended with it
    sys.exit(main())
