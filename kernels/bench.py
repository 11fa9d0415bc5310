"""The kernels' benchmark: `python -m bitmend.kernels.bench` or `run(device)`; needs torch, triton and the standard library.

Every operator is first compared with the stored weight's definition; one that fails is listed under "refused" and not timed.
Rows are rows of activations × layers × ranks × variants. Writes JSON and a Markdown table, and goes on where it was stopped; plots are
others' business.
Legend: M rows of activations, O out, I in, R rank.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypedDict

import torch
from torch import Tensor

from ..compress.weights import ActivationGrid, StoredWeight
from .journal import Journal
from .quantize_down import quantize_down
from .rivals import rivals
from .timing import TimingProtocol, clocks, copies_for, environment, time_calls
from .variants import DEMO, Layer, Variant, check, site, synthetic, variants

Row: TypeAlias = dict[str, object]
"""A line of the table, as JSON holds it: its columns by name."""


class BenchPiece(TypedDict):
    """What one piece of the benchmark gave."""

    rows: list[Row]
    refused: list[Row]


class KernelReport(BenchPiece):
    bench: str
    environment: dict[str, object]


@dataclass(frozen=True)
class BenchPlan:
    """What is measured. A variant's output may err at most `slack` × what torch errs with the same dense weight in bfloat16. `two_levels`: of 8-bit
    inputs also with one scale a token and weights' scales of two levels."""

    rows: tuple[int, ...]
    layers: tuple[Layer, ...]
    ranks: tuple[int, ...] = (0, 16, 32, 64, 128)
    bits: tuple[int, ...] = (4,)
    activation_bits: tuple[int | None, ...] = (None,)
    stack_blocks: int = 0
    slack: float = 2.0
    two_levels: bool = False


ONE = tuple(Layer("1B", out, inputs) for out, inputs in ((2048, 2048), (8192, 2048), (2048, 8192)))
SEVEN = tuple(Layer("7B", out, inputs) for out, inputs in ((4096, 4096), (11008, 4096), (4096, 11008)))
SEVENTY = tuple(Layer("70B", out, inputs) for out, inputs in ((8192, 8192), (28672, 8192), (8192, 28672)))
DECODE = tuple(Layer("8B and 70B", out, inputs) for out, inputs in ((4096, 4096), (28672, 4096), (4096, 14336)))
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
RANKS = (0, 16, 32, 64, 128)
PLANS = {
    "cpu": BenchPlan((1, 16, 64, 256), (*DEMO, ONE[0]), (0, 16, 64), (4,), (None,), stack_blocks=30),
    "cpu, full": BenchPlan(ROWS[:-1], (*DEMO, *ONE, *SEVEN), RANKS, (4, 8), (None,), stack_blocks=30),
    "cuda": BenchPlan(ROWS, (*ONE, *SEVEN, *SEVENTY), RANKS, (4,), (None, 8), two_levels=True),
}
PLANS["cuda, quick"] = BenchPlan((1, 16, 64, 256, 2048), DECODE, (0, 32), (4,), (None, 8), two_levels=True)
QUICK = TimingProtocol(warm_up=1, repeats=5, most_seconds=0.3)
"""Minutes instead of an hour: the shapes and rows that decide decode and prefill of an 8B model, few repeats."""
PLANS["cuda, full"] = replace(PLANS["cuda"], bits=(2, 3, 4), activation_bits=(None, 8, 4))
STACK_COPIES = 6  # blocks with memory of their own, visited in turn: more than a core's cache holds, and quick to build


def run(
    device: str = "auto",
    rows: Sequence[int] | None = None,
    output: Path | None = None,
    *,
    full: bool = False,
    plan: BenchPlan | None = None,
    protocol: TimingProtocol | None = None,
) -> KernelReport:
    """{"bench", "environment", "rows", "refused"}; with `output`, also <output>/bench-kernels.{json,md}, and a journal until then.

    device "auto" takes CUDA where there is one; `full` measures every shape (hours on a CPU); `rows` replaces the plan's numbers of
    activation rows."""
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    plan = plan or PLANS[f"{place.type}, full" if full else place.type]
    plan = plan if rows is None else replace(plan, rows=tuple(rows))
    protocol = protocol or TimingProtocol()
    journal = Journal(None if output is None else output / "bench-kernels.journal", _context(place, plan, protocol))
    if "environment" not in journal:
        journal.add("environment", environment(place, protocol))
    measured: KernelReport = {"bench": "kernels", "environment": journal["environment"], "rows": [], "refused": []}
    for key, measure in _pieces(plan, place, protocol, journal["environment"]["peak"]).items():
        entry = journal[key] if key in journal else journal.add(key, measure())
        measured["rows"] += entry["rows"]
        measured["refused"] += entry["refused"]
    measured["environment"] |= {"clocks_at_the_end": clocks(place)}
    if output is not None:
        (output / "bench-kernels.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        (output / "bench-kernels.md").write_text(markdown(measured), encoding="utf-8")
        journal.close()
    return measured


def _context(place: torch.device, plan: BenchPlan, protocol: TimingProtocol) -> dict[str, object]:
    """What must be the same for rows to stand in one table."""
    import triton

    from .choices import device_name

    versions = {"torch": torch.__version__, "triton": triton.__version__, "threads": torch.get_num_threads()}
    return {"device": device_name(place), **versions, "plan": asdict(plan), "protocol": asdict(protocol)}


def _pieces(plan: BenchPlan, place: torch.device, protocol: TimingProtocol, peak: dict[str, float]) -> dict[str, Callable[[], BenchPiece]]:
    """Key → a function that measures one piece: a layer at one rank, or the stack at one rank."""
    pieces: dict[str, Callable[[], BenchPiece]] = {}
    for layer in plan.layers:
        for bits in plan.bits:
            for activation_bits in plan.activation_bits:
                for two_levels in (False, True) if plan.two_levels and activation_bits == 8 and bits <= 4 else (False,):
                    operator = f"W{bits}A{activation_bits or 16}{', two levels' if two_levels else ''}"
                    for rank in plan.ranks:
                        stored = partial(synthetic, layer, bits, rank, activation_bits, place, two_levels)
                        key = f"{operator} {layer.out}x{layer.inputs} rank {rank}"
                        pieces[key] = partial(_measure_layer, stored, {"operator": operator, **asdict(layer)}, rank, plan, place, protocol, peak)
    if plan.stack_blocks:
        pieces |= {f"stack rank {rank}": partial(_stack, rank, plan, place, protocol) for rank in plan.ranks if rank <= 64}
    return pieces


def _measure_layer(
    make: Callable[[], StoredWeight], what: Row, rank: int, plan: BenchPlan, place: torch.device, protocol: TimingProtocol, peak: dict[str, float]
) -> BenchPiece:  # fmt: skip
    rows: list[Row] = []
    stored = make()
    others, reasons = _rivals(stored, place)
    built = _copies(stored, others, place)
    refused: list[Row] = [
        what | {"rows": 1, "rank": rank, "variant": name, "reason": reason} for name, reason in reasons.items()
    ]
    for m in plan.rows:
        x = torch.randn(m, stored.shape[1], generator=torch.Generator().manual_seed(m)).to(torch.bfloat16).to(place)
        where = what | {"rows": m, "rank": rank}
        for name in built[0]:
            error, allowed = check(stored, built[0][name][0], x, plan.slack)
            if not error <= allowed:
                reason = f"errs {error:.3g}, allowed are {allowed:.3g}"
                refused.append(where | {"variant": name, "relative_error": error, "allowed": allowed, "reason": reason})
                continue
            timing = time_calls([partial(copy[name][0], x) for copy in built], place, protocol)
            row = where | {"variant": name, **asdict(timing), "resident_bytes": built[0][name][1], "relative_error": error}
            rows.append(row | _utilization(stored.shape, rank, m, built[0][name][1], timing.microseconds / 1e6, peak))
        if place.type == "cuda" and stored.activations is not None:
            rows.append(_quantize_row(where, x, stored, stored.activations, place, protocol))
    return {"rows": rows, "refused": refused}


def _rivals(stored: StoredWeight, place: torch.device) -> tuple[dict[str, Callable[[], Variant]], dict[str, str]]:
    """(third-party operators that multiply with this weight here, why the others do not): each is tried once."""
    builders, reasons = rivals(stored), {}
    for name, build in builders.items():
        try:
            build()[0](torch.zeros(1, stored.shape[1], dtype=torch.bfloat16, device=place))
        except (RuntimeError, ValueError, AssertionError, ImportError) as error:
            reasons[name] = str(error).strip().split("\n")[0] or type(error).__name__
    return {name: build for name, build in builders.items() if name not in reasons}, reasons


def _copies(stored: StoredWeight, others: Mapping[str, Callable[[], Variant]], place: torch.device) -> list[dict[str, Variant]]:
    def copy() -> dict[str, Variant]:
        return variants(stored, place) | {name: build() for name, build in others.items()}

    first = copy()
    smallest = min(kept for _, kept in first.values())
    return [first, *(copy() for _ in range(copies_for(smallest, place) - 1))]


def _quantize_row(
    where: Row, x: Tensor, stored: StoredWeight, grid: ActivationGrid, place: torch.device, protocol: TimingProtocol
) -> Row:
    """The quantizer alone, or with the down-projection on board: reading x once should make them cost the same."""
    down = None if stored.low_rank is None else stored.low_rank.factors(torch.bfloat16)[1]
    timing = time_calls([partial(quantize_down, x, None, down, bits=grid.bits, group_size=grid.group_size)] * 8, place, protocol)
    operator = "quantize, one scale a token" if grid.group_size == -1 else "quantize"
    return where | {"operator": operator, "variant": "quantize" if down is None else "quantize_down", **asdict(timing)}


def _stack(rank: int, plan: BenchPlan, place: torch.device, protocol: TimingProtocol) -> BenchPiece:
    """One token through the linears of the demo model's blocks: what generation pays for them, and what they keep in memory."""
    q, kv, up, down = DEMO
    rows = []
    weights = [[synthetic(layer, 4, rank, None, place) for layer in layers] for layers in ((q, kv, kv), (q,), (up, up), (down,))]
    for variant, dtype in (("torch bfloat16", torch.bfloat16), ("torch float32", torch.float32), ("fused", torch.float32)):
        distinct = [site(group, variant, dtype, place) for group in weights * min(plan.stack_blocks, STACK_COPIES)]
        built = [distinct[i % len(distinct)] for i in range(plan.stack_blocks * len(weights))]
        inputs = {width: torch.randn(1, width, device=place).to(dtype) for width in (576, 1536)}
        calls = [partial(call, inputs[width]) for call, _, width in built]
        timing = time_calls([lambda calls=calls: [call() for call in calls]], place, protocol)
        where = {"operator": f"{plan.stack_blocks} blocks' linears", "model": "demo", "rows": 1, "rank": rank, "variant": variant}
        rows.append(where | asdict(timing) | {"resident_bytes": sum(size for _, size, _ in built)})
    return {"rows": rows, "refused": []}


def _utilization(shape: tuple[int, int], rank: int, rows: int, resident_bytes: int, seconds: float, peak: dict[str, float]) -> dict[str, float]:
    """Achieved gigabytes and teraflops a second of a product with a matrix of this shape [O, I], as shares of what the device was seen to reach;
    the weight and x and y count once."""
    out, inputs = shape
    moved = resident_bytes + 2 * rows * (inputs + out)
    operations = 2 * rows * (out * inputs + rank * (out + inputs))
    gigabytes, teraflops = moved / seconds / 1e9, operations / seconds / 1e12
    return {
        "gigabytes_per_second": round(gigabytes, 2),
        "bandwidth_share": round(gigabytes / peak["gigabytes_per_second"], 4),
        "teraflops": round(teraflops, 4),
        "arithmetic_share": round(teraflops / peak["teraflops"], 4),
    }


COLUMNS = (
    "operator", "variant", "model", "out", "inputs", "rows", "rank", "microseconds", "spread", "repeats", "times_bfloat16", "bandwidth_share",
    "arithmetic_share", "resident_bytes",
)  # fmt: skip


def relative_to_bfloat16(rows: Sequence[Row]) -> list[Row]:
    """The rows with `times_bfloat16`: their time over that of torch's bfloat16 matmul with as many rows and no rank, where it was measured."""
    plain = {
        (r["out"], r["inputs"], r["rows"]): _time(r) for r in rows if r["variant"] == "torch bfloat16" and "out" in r and not r["rank"]
    }
    baselines = [plain.get((r.get("out"), r.get("inputs"), r["rows"])) for r in rows]
    return [r if base is None else r | {"times_bfloat16": round(_time(r) / base, 3)} for r, base in zip(rows, baselines, strict=True)]


def _time(row: Row) -> float:
    microseconds = row["microseconds"]
    assert isinstance(microseconds, int | float)
    return microseconds


def markdown(measured: KernelReport) -> str:
    """Environment, one table of what was measured, one of what was refused."""
    lines = ["# bench kernels", ""]
    lines += [f"- {name}: {json.dumps(value) if isinstance(value, dict) else value}" for name, value in measured["environment"].items()]
    lines += ["", "Microseconds are the median of one call; spread is the distance between the quartiles.", ""]
    lines += _table(COLUMNS, relative_to_bfloat16(measured["rows"]))
    if measured["refused"]:
        lines += [
            "",
            "Refused:",
            "",
            *_table(("operator", "variant", "out", "inputs", "rows", "rank", "reason"), measured["refused"]),
        ]
    return "\n".join(lines) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Row]) -> list[str]:
    cells = [[f"{v:g}" if isinstance(v := row.get(name, ""), float) else str(v) for name in columns] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *cells)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 when an operator was refused."""
    parser = argparse.ArgumentParser(prog="python -m bitmend.kernels.bench", description="Benchmark of the fused kernels.")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--full", action="store_true", help="every shape (hours on a CPU)")
    parser.add_argument("--quick", action="store_true", help="three shapes, two ranks, five numbers of rows, few repeats (a card alone)")
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of activation rows, instead of the plan's")
    parser.add_argument("--layers", nargs="+", help="models' sizes to keep: demo, 1B, 7B, 70B; or shapes of one's own: 4096x14336")
    parser.add_argument("--ranks", type=int, nargs="+", help="ranks, instead of the plan's")
    parser.add_argument("--output", type=Path, help="directory for bench-kernels.json and bench-kernels.md")
    chosen = parser.parse_args(arguments)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if chosen.device == "auto" else chosen.device
    kind = torch.device(device).type
    if chosen.quick and (chosen.full or kind != "cuda"):
        parser.error("--quick needs a CUDA device and excludes --full")
    plan = PLANS[f"{kind}, full" if chosen.full else f"{kind}, quick" if chosen.quick else kind]
    if chosen.ranks:
        plan = replace(plan, ranks=tuple(chosen.ranks))
    if chosen.layers:
        own = [Layer("own", *map(int, name.split("x"))) for name in chosen.layers if "x" in name]
        plan = replace(plan, layers=(*(layer for layer in plan.layers if layer.model in chosen.layers), *own))
    measured = run(device, chosen.rows, chosen.output, plan=plan, protocol=QUICK if chosen.quick else None)
    sys.stdout.write(markdown(measured))
    return 1 if measured["refused"] else 0


if __name__ == "__main__":
    sys.exit(main())
