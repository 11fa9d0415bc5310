"""`pipeline bench scale`: calibration, solving and recovery on 1, 2 and 4 gloo processes of one thread, compared with what `pipeline plan` predicts.

Strong scaling: the same work on more ranks; weak: so many times the work. Ranks that share cores with one another, or with other programs,
are distinguished from slow ones by processor time (`collectives`): `core_seconds` is the critical path on a core for each, `seconds` the clock's. A model of
random weights is made on the spot. Knows runs and plans.
"""

import json
import logging
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Concatenate, ParamSpec, TypedDict, TypeVar

import torch

from ...reports.json_values import integer, mapping, real
from ..devices.compute import Compute
from ..devices.link import Link, measured_link
from ..devices.rates import Speeds, measured
from ..errors import InputError, PipelineError
from ..planning import plan
from ..planning.scale_out import ScaleOut
from ..recipes.recipe import resolve
from ..recipes.stage_settings import StageSpec
from .collectives import MARK, Event, EventRow, counted, critical_seconds, mark, within
from .scaling import Row, Settings, Text, made, recipe_document, work_directory
from .synthetic import Shape

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
RANKS = (1, 2, 4)
SHAPE = Shape(1, 768, 2048, 12, 4, 2048)
EVALUATION = {"seq_len": 512, "windows": 2}
GPTQ: Settings = {"method": "gptq", "bits": 4}
RTN: Settings = {"method": "rtn", "bits": 4, "clip": "none"}
LORA: Settings = {
    "method": "lora", "rank": 8, "steps": 2, "batch_size": 1, "seq_len": 512, "accumulation": 8, "eval_every": 2, "loss": "cross_entropy"
}  # fmt: skip


class Answer(TypedDict):
    """What a process writes: its speeds, its collectives, and seconds of each stage by address."""

    speeds: dict[str, object]
    events: list[EventRow]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Subject:
    """What is scaled: windows of calibration text, blocks, or micro-batches of an update, whichever `grows`."""

    grows: str
    samples: int
    stages: tuple[dict[str, Settings], ...]


SUBJECTS = {
    "calibration": Subject("samples", 32, ({"quantize": GPTQ},)),
    "solving": Subject("blocks", 16, ({"quantize": GPTQ | {"clip": "joint"}},)),
    "recovery": Subject("accumulation", 4, ({"quantize": RTN}, {"recover": LORA})),
}


def rows(only: Sequence[str] = (), ranks: Sequence[int] = RANKS, shape: Shape = SHAPE, output: Path | None = None) -> list[Row]:
    """A row for each subject, kind of scaling and number of ranks."""
    link, result = measured_link(), []
    with work_directory(output, "scale") as place:
        for name in only or SUBJECTS:
            alone: Row = {}
            for kind in ("strong", "weak"):
                for size in ranks:
                    if kind == "weak" and size == 1:
                        continue
                    row = _row(name, kind, size, shape, place, link)
                    alone = alone or row
                    more = size if kind == "strong" else 1
                    row["efficiency"] = round(real(alone["core_seconds"]) / (more * real(row["core_seconds"])), 3)
                    result.append(row)
                    log.info("%s", row)
    return result


def of_a_block(row: Row) -> Row:
    """Communication of a block (of recovery: of a block's steps): collectives, bytes that a rank sends, seconds that it waits."""
    counted = ("collectives", "predicted_collectives", "sent_bytes", "predicted_sent_bytes", "waited_seconds")
    return {key: row[key] for key in ("subject", "scaling", "ranks")} | {key: round(real(row[key]) / real(row["blocks"]), 3) for key in counted}


def _row(name: str, kind: str, size: int, shape: Shape, place: Path, link: Link) -> Row:
    recipe, directory = _recipe(name, size if kind == "weak" else 1, shape, place), place / f"run-{name}-{kind}-{size}"
    answers = on_ranks(recipe, directory, size)
    address = resolve(str(recipe)).stages[-1].address
    events = [within([Event(**event) for event in answer["events"]], address) for answer in answers]
    made_of = plan.costed(resolve(str(recipe)), None, "cpu")
    needs, fleet = made_of.needs[address][:-1], ScaleOut(_speeds(answers), link)
    core_seconds, predicted = critical_seconds(events), fleet.seconds(needs, size)
    collectives = [event for event in events[0] if not event.kind.startswith(MARK)]
    exchanges = [exchange for each in needs for exchange in each.sent]
    return {
        "subject": name, "scaling": kind, "ranks": size, "seconds": answers[0]["seconds"][address],
        "predicted_seconds": predicted * max(1.0, size / (os.cpu_count() or 1)), "core_seconds": core_seconds,
        "predicted_core_seconds": predicted, "deviation": round(predicted / core_seconds - 1, 3),
        "collectives": len([event for event in collectives if event.kind != "barrier"]),
        "predicted_collectives": round(sum(exchange.calls(size) for exchange in exchanges)),
        "sent_bytes": max(sum(event.sent for event in of_rank) for of_rank in events),
        "predicted_sent_bytes": round(sum(exchange.sent(size) for exchange in exchanges)),
        "waited_seconds": statistics.mean(sum(event.waited for event in of_rank) for of_rank in events),
        "blocks": made_of.report["blocks"],
    }  # fmt: skip


def _recipe(name: str, times: int, shape: Shape, place: Path) -> Path:
    """The recipe file of so many times the work."""
    subject = SUBJECTS[name]
    grown = replace(shape, blocks=shape.blocks * (times if subject.grows == "blocks" else 1))
    text: Text = {"calibration": {"samples": subject.samples * (times if subject.grows == "samples" else 1), "seq_len": 512}, "evaluation": EVALUATION}
    enough: Text = {"calibration": {"samples": 256, "seq_len": 512}}
    model, _ = made(place / f"blocks-{grown.blocks}", grown, enough)
    stages = [{n: s | ({"accumulation": integer(s["accumulation"]) * times} if subject.grows in s else {}) for n, s in each.items()} for each in subject.stages]
    path = place / f"{name}-{times}.json"
    path.write_text(json.dumps(recipe_document(model, text, stages) | {"dtype": "float32"}), encoding="utf-8")
    return path


def _speeds(answers: Sequence[Answer]) -> Speeds:
    """The mean of each over the ranks, which measured at the same time."""
    speeds = [answer["speeds"] for answer in answers]
    products = [mapping(each["products"]) for each in speeds]
    of_dtypes = {getattr(torch, n): statistics.mean(real(each[n]) for each in products) for n in products[0]}
    return Speeds(of_dtypes, **{n: statistics.mean(real(each[n]) for each in speeds) for n in speeds[0] if n != "products"})


# -- processes ---------------------------------------------------------------------------------------------------------------------


def on_ranks(recipe: Path, directory: Path, size: int) -> list[Answer]:
    """The run on so many gloo processes, and each one's answer. InputError where one does not end well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shutil.rmtree(directory, ignore_errors=True)  # a finished run has nothing left to time
    answers = [directory.with_name(f"{directory.name}.{rank}.json") for rank in range(size)]
    processes = []
    for rank, answer in enumerate(answers):
        answer.unlink(missing_ok=True)
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        command = [sys.executable, "-P", "-m", f"{__package__}.process_scaling", str(recipe), str(directory), str(answer)]
        environment = os.environ | {name: str(value) for name, value in world.items()}
        processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=recipe.parent, env=environment))
    codes = [process.wait() for process in processes]
    if any(codes) or not all(answer.is_file() for answer in answers):
        raise InputError(f"bench scale: {size} processes on {recipe.name} ended with {codes}")
    return [json.loads(answer.read_text()) for answer in answers]


def main(arguments: Sequence[str]) -> int:
    """What each process does: the run, its collectives counted, its speeds measured before and after while the others measure theirs."""
    from .. import stages
    from ..ranks import joining
    from ..run import runner

    recipe, directory, answer = arguments
    torch.set_num_threads(1)
    mine = joining.join()
    mine.barrier()
    speeds = [measured(Compute(torch.device("cpu")), time.process_time)]
    events: list[Event] = []
    plain = stages.perform

    def marked(perform: Callable[Concatenate[StageSpec, P], T]) -> Callable[Concatenate[StageSpec, P], T]:
        def performed(spec: StageSpec, *args: P.args, **options: P.kwargs) -> T:
            mark(events, f"{spec.address} begins")
            out = perform(spec, *args, **options)
            mark(events, f"{spec.address} ends")
            return out

        return performed

    stages.perform = marked(plain)
    try:
        with counted(events):
            record = runner.run(resolve(recipe), Path(directory), device="cpu", page=False, ranks=mine)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        stages.perform = plain
    mine.barrier()
    speeds.append(measured(Compute(torch.device("cpu")), time.process_time))
    seconds = {stage.stage: stage.seconds for stage in record.stages}
    result = {"speeds": _fastest(speeds), "events": [event.to_json() for event in events], "seconds": seconds}
    Path(answer).write_text(json.dumps(result), encoding="utf-8")
    joining.leave()
    return 0


def _fastest(measured: Sequence[Speeds]) -> dict[str, object]:
    """Of each kind the highest: what another program did to a measurement did it no good."""
    products = {str(dtype).removeprefix("torch."): max(each.products[dtype] for each in measured) for dtype in measured[0].products}
    speeds = [asdict(each) for each in measured]
    return {**{name: max(each[name] for each in speeds) for name in speeds[0] if name != "products"}, "products": products}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
