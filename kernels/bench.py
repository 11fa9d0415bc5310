"""The kernels' benchmark: `python -m bitmend.kernels.bench` or `run(device)`; needs torch, triton and the standard library.

Every operator is first compared with the stored weight's definition; one that fails is listed under "refused" and not timed.
Rows are rows of activations × layers × ranks × variants. Writes JSON and a Markdown table; plots are others' business.
Legend: M rows of activations, O out, I in, R rank.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compress.weights import ActivationGrid, LowRank, StoredWeight, UniformWeight
from .layout import tile
from .linear import bind, bind_group
from .operators import ReferenceOperator
from .quantize_down import quantize_down
from .timing import Protocol, copies_for, environment, time_calls


@dataclass(frozen=True)
class Layer:
    """A linear of a model of this size; `group_size` inputs share a scale."""

    model: str
    out: int
    inputs: int
    group_size: int = 64


@dataclass(frozen=True)
class Plan:
    """What is measured. A variant's output may err at most `slack` × what torch errs with the same dense weight in bfloat16."""

    rows: tuple[int, ...]
    layers: tuple[Layer, ...]
    ranks: tuple[int, ...] = (0, 16, 32, 64, 128)
    bits: tuple[int, ...] = (4,)
    activation_bits: tuple[int | None, ...] = (None,)
    stack_blocks: int = 0
    slack: float = 2.0


DEMO = (Layer("demo", 576, 576), Layer("demo", 192, 576), Layer("demo", 1536, 576), Layer("demo", 576, 1536))
CPU = Plan((1, 4, 16, 64, 256), (*DEMO, Layer("1B", 2048, 2048), Layer("1B", 8192, 2048)), (0, 16, 64), (4,), (None,), 30)
CUDA = Plan(
    (1, 4, 16, 64, 256, 1024, 4096),
    (
        *(Layer("1B", out, inputs) for out, inputs in ((2048, 2048), (8192, 2048), (2048, 8192))),
        *(Layer("7B", out, inputs) for out, inputs in ((4096, 4096), (11008, 4096), (4096, 11008))),
        *(Layer("70B", out, inputs) for out, inputs in ((8192, 8192), (28672, 8192), (8192, 28672))),
    ),
    activation_bits=(None, 8),
)
STACK_COPIES = 6  # blocks with memory of their own, visited in turn: more than a core's cache holds, and quick to build
PLANS = {"cpu": CPU, "cuda": CUDA}
# One variant of an operator: x [M, I] → y [M, O], and the bytes it keeps.
Variant = tuple[Callable[[Tensor], Tensor], int]


def run(
    device: str = "auto",
    rows: Sequence[int] | None = None,
    output: Path | None = None,
    *,
    plan: Plan | None = None,
    protocol: Protocol | None = None,
) -> dict[str, Any]:
    """{"bench", "environment", "rows", "refused"}; with `output`, also <output>/bench-kernels.{json,md}.

    device "auto" takes CUDA where there is one; `rows` replaces the plan's numbers of activation rows."""
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    plan = plan or PLANS[place.type]
    plan = plan if rows is None else replace(plan, rows=tuple(rows))
    protocol = protocol or Protocol()
    measured: dict[str, Any] = {"bench": "kernels", "environment": environment(place, protocol), "rows": [], "refused": []}
    for layer in plan.layers:
        for bits in plan.bits:
            for activation_bits in plan.activation_bits:
                _measure_layer(layer, bits, activation_bits, plan, place, protocol, measured)
    if plan.stack_blocks:
        measured["rows"] += _stack_rows(plan, place, protocol)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "bench-kernels.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        (output / "bench-kernels.md").write_text(markdown(measured), encoding="utf-8")
    return measured


def _measure_layer(
    layer: Layer, bits: int, activation_bits: int | None, plan: Plan, place: torch.device, protocol: Protocol, measured: dict[str, Any]
) -> None:
    operator = f"W{bits}A{activation_bits or 16}"
    for rank in plan.ranks:
        stored = synthetic(layer, bits, rank, activation_bits, place)
        built: list[dict[str, Variant]] = []
        for m in plan.rows:
            x = torch.randn(m, layer.inputs, generator=torch.Generator().manual_seed(m)).to(torch.bfloat16).to(place)
            built = built or _copies(stored, place)
            where = {"operator": operator, **asdict(layer), "rows": m, "rank": rank}
            for name in built[0]:
                error, allowed = check(stored, built[0][name][0], x, plan.slack)
                if not error <= allowed:
                    measured["refused"].append(where | {"variant": name, "relative_error": error, "allowed": allowed})
                    continue
                timing = time_calls([partial(copy[name][0], x) for copy in built], place, protocol)
                row = where | {"variant": name, **asdict(timing), "resident_bytes": built[0][name][1], "relative_error": error}
                measured["rows"].append(row | _shares(row, measured["environment"]["peak"]))
            if place.type == "cuda" and activation_bits is not None:
                measured["rows"] += _quantize_rows(where, x, stored, activation_bits, place, protocol)


def _copies(stored: StoredWeight, place: torch.device) -> list[dict[str, Variant]]:
    first = variants(stored, place)
    smallest = min(kept for _, kept in first.values())
    return [first, *(variants(stored, place) for _ in range(copies_for(smallest, place) - 1))]


def variants(stored: StoredWeight, place: torch.device) -> dict[str, Variant]:
    """Every way to multiply with a weight that the table compares, each with weights of its own in memory."""
    plain = replace(stored, low_rank=None)
    dense, packed = stored.dense(torch.bfloat16), bind(plain, device=place, dtype=torch.bfloat16)
    base = plain.base
    found: dict[str, Variant] = {}
    if stored.activations is None:
        found["torch bfloat16"] = (lambda x: F.linear(x, dense)), _bytes(dense)
        if place.type == "cpu":
            wide = dense.float()
            found["torch float32"] = (lambda x: F.linear(x.float(), wide).to(x.dtype)), _bytes(wide)
    assert isinstance(base, UniformWeight)
    if stored.activations is None and stored.low_rank is None:
        tiled = tile(base)
        found["dequantize then matmul"] = (lambda x: F.linear(x, tiled.dense(x.dtype))), tiled.resident_bytes()
    if stored.low_rank is None:
        return found | {f"{packed.backend} without rank": (packed, packed.resident_bytes())}
    up, down = stored.low_rank.factors(torch.bfloat16)
    fused = bind(stored, device=place, dtype=torch.bfloat16)
    found["unfused rank"] = (lambda x: packed(x) + F.linear(F.linear(x, down), up)), packed.resident_bytes() + _bytes(up) + _bytes(down)
    return found | {f"{fused.backend} fused": (fused, fused.resident_bytes())}


def check(stored: StoredWeight, call: Callable[[Tensor], Tensor], x: Tensor, slack: float) -> tuple[float, float]:
    """(relative error against the definition in float32, what is allowed): slack × torch's own error in bfloat16.

    Rounding to bfloat16 and then to a grid may move a code by one, so a rounded input is allowed half a step of 8 bits more."""
    x = x[:256]
    truth = ReferenceOperator(stored, None)(x.float())
    eager = F.linear(x, stored.dense(torch.bfloat16)) if stored.activations is None else truth.to(torch.bfloat16)
    extra = 0.0 if stored.activations is None else 0.5 / 127
    with torch.inference_mode():
        return _relative(call(x), truth), slack * _relative(eager, truth) + extra


def synthetic(layer: Layer, bits: int, rank: int, activation_bits: int | None, place: torch.device) -> StoredWeight:
    """Random codes, scales and factors of a size that real layers have; the same on every machine."""
    random = torch.Generator().manual_seed(layer.out * 31 + layer.inputs)
    groups = layer.inputs // layer.group_size
    codes = torch.randint(0, 1 << bits, (layer.out, layer.inputs), generator=random)
    zeros = torch.randint(1, 1 << bits, (layer.out, groups), generator=random)
    scales = (torch.rand(layer.out, groups, generator=random) + 0.5) / (1 << (bits - 1)) / layer.inputs**0.5
    base = UniformWeight.from_codes(codes, scales.half(), zeros, bits, layer.group_size)
    low_rank = None
    if rank:
        up = torch.randn(layer.out, rank, generator=random) / rank**0.5 / 4
        low_rank = LowRank(up.bfloat16(), (torch.randn(rank, layer.inputs, generator=random) / layer.inputs**0.5).bfloat16())
    activations = None if activation_bits is None else ActivationGrid(activation_bits)
    return StoredWeight(base, low_rank=low_rank, activations=activations).to(place)


def _quantize_rows(
    where: dict[str, Any], x: Tensor, stored: StoredWeight, bits: int, place: torch.device, protocol: Protocol
) -> Iterator[dict[str, Any]]:
    """The quantizer alone, and with the down-projection on board: reading x once should make them cost the same."""
    down = None if stored.low_rank is None else stored.low_rank.factors(torch.bfloat16)[1]
    timing = time_calls([partial(quantize_down, x, None, down, bits=bits)] * 8, place, protocol)
    yield where | {"operator": "quantize", "variant": "quantize" if down is None else "quantize_down", **asdict(timing)}


def _stack_rows(plan: Plan, place: torch.device, protocol: Protocol) -> list[dict[str, Any]]:
    """One token through the linears of the demo model's blocks: what generation pays for them, and what they keep in memory."""
    q, kv, up, down = DEMO
    sites = ((q, kv, kv), (q,), (up, up), (down,))
    rows = []
    for rank in (r for r in plan.ranks if r <= 64):
        weights = [[synthetic(layer, 4, rank, None, place) for layer in site] for site in sites]
        for variant, dtype in (("torch bfloat16", torch.bfloat16), ("torch float32", torch.float32), ("fused", torch.float32)):
            distinct = [_site(site, variant, dtype, place) for site in weights * min(plan.stack_blocks, STACK_COPIES)]
            built = [distinct[i % len(distinct)] for i in range(plan.stack_blocks * len(sites))]
            inputs = {width: torch.randn(1, width, device=place).to(dtype) for width in (576, 1536)}
            calls = [partial(call, inputs[width]) for call, _, width in built]
            kept = sum(size for _, size, _ in built)
            timing = time_calls([lambda calls=calls: [call() for call in calls]], place, protocol)
            where = {"operator": f"{plan.stack_blocks} blocks' linears", "model": "demo", "rows": 1, "rank": rank, "variant": variant}
            rows.append(where | asdict(timing) | {"resident_bytes": kept})
    return rows


def _site(site: list[StoredWeight], variant: str, dtype: torch.dtype, place: torch.device) -> tuple[Callable[[Tensor], Any], int, int]:
    """(call, bytes kept, width of its input) of linears that read one x."""
    width = site[0].shape[1]
    if variant == "fused":
        group = bind_group([(weight, None) for weight in site], device=place)
        return group, group.resident_bytes(), width
    matrices = [weight.dense(dtype) for weight in site]
    return lambda x: [F.linear(x, matrix) for matrix in matrices], sum(_bytes(m) for m in matrices), width


def _shares(row: dict[str, Any], peak: dict[str, float]) -> dict[str, float]:
    """Achieved gigabytes and teraflops a second, as shares of what the device was seen to reach; the weight and x and y count once."""
    seconds = row["microseconds"] / 1e6
    moved = row["resident_bytes"] + 2 * row["rows"] * (row["inputs"] + row["out"])
    operations = 2 * row["rows"] * (row["out"] * row["inputs"] + row["rank"] * (row["out"] + row["inputs"]))
    gigabytes, teraflops = moved / seconds / 1e9, operations / seconds / 1e12
    return {
        "gigabytes_per_second": round(gigabytes, 2),
        "bandwidth_share": round(gigabytes / peak["gigabytes_per_second"], 4),
        "teraflops": round(teraflops, 4),
        "arithmetic_share": round(teraflops / peak["teraflops"], 4),
    }


def _relative(value: Tensor, truth: Tensor) -> float:
    return ((value.float() - truth.float()).norm() / truth.float().norm()).item()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


COLUMNS = (
    "operator",
    "variant",
    "model",
    "out",
    "inputs",
    "rows",
    "rank",
    "microseconds",
    "spread",
    "bandwidth_share",
    "arithmetic_share",
    "resident_bytes",
)


def markdown(measured: dict[str, Any]) -> str:
    """Environment, one table of what was measured, one of what was refused."""
    lines = ["# bench kernels", ""]
    lines += [f"- {name}: {json.dumps(value) if isinstance(value, dict) else value}" for name, value in measured["environment"].items()]
    lines += ["", "Microseconds are the median of one call; spread is the distance between the quartiles.", ""]
    lines += _table(COLUMNS, measured["rows"])
    if measured["refused"]:
        lines += [
            "",
            "Refused, since their output is wrong:",
            "",
            *_table(("operator", "variant", "out", "inputs", "rows", "rank", "relative_error", "allowed"), measured["refused"]),
        ]
    return "\n".join(lines) + "\n"


def _table(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    cells = [[f"{v:g}" if isinstance(v := row.get(name, ""), float) else str(v) for name in columns] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *cells)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 when an operator was refused."""
    parser = argparse.ArgumentParser(prog="python -m bitmend.kernels.bench", description="Benchmark of the fused kernels.")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of activation rows, instead of the plan's")
    parser.add_argument("--layers", nargs="+", help="models' sizes to keep: demo, 1B, 7B, 70B")
    parser.add_argument("--ranks", type=int, nargs="+", help="ranks, instead of the plan's")
    parser.add_argument("--output", type=Path, help="directory for bench-kernels.json and bench-kernels.md")
    chosen = parser.parse_args(arguments)
    kind = (
        "cuda"
        if torch.cuda.is_available() and chosen.device == "auto"
        else "cpu"
        if chosen.device == "auto"
        else torch.device(chosen.device).type
    )
    plan = PLANS[kind]
    if chosen.ranks:
        plan = replace(plan, ranks=tuple(chosen.ranks))
    if chosen.layers:
        plan = replace(plan, layers=tuple(layer for layer in plan.layers if layer.model in chosen.layers))
    measured = run(chosen.device, chosen.rows, chosen.output, plan=plan)
    sys.stdout.write(markdown(measured))
    return 1 if measured["refused"] else 0


if __name__ == "__main__":
    sys.exit(main())
