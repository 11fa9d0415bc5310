"""Compiles the Triton kernels for cards that are not present and lists each configuration's registers, spills, shared memory and instructions.

Needs no card, and no interpreter: Triton compiles for a target, and its ptxas and cuobjdump describe the result. Knows launchers and the
compiler; not how fast anything is.
Legend: M rows of activations, O out, I in, R rank.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from . import lowbit_matmul_up
from .candidates import APART, CANDIDATES, DEFAULTS, INT4, OLDER, WITHOUT_LOW_RANK, default_for
from .launch import INTERPRETED, Launch, recording
from .layout import SLOTS, TiledWeight, lanes_for
from .lowbit_matmul_up import CANDIDATES as PRODUCTS
from .lowbit_matmul_up import HOPPERS, TWO_LEVELS, by_rows
from .quantize_down import CANDIDATES as QUANTIZERS
from .quantize_down import WHOLE_ROWS, quantize_down
from .tuning import Blocks
from .weight_only_ways import WAYS, Operands

CAPABILITIES = tuple(known for known in DEFAULTS if known != OLDER)
SHARED_LIMITS = {(8, 0): 163 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10}
"""Bytes of shared memory that one program may take (CUDA programming guide, compute capabilities)."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
INTEGER_ROWS = (16, 64, 1024)
OUT, INPUTS, BITS, GROUP, RANK = 4096, 4096, 4, 64, 32
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int8: "*i8"}


def configurations() -> Iterator[tuple[int, Blocks]]:
    """(rows, candidate) of every kernel configuration that the chooser of weight-only products may take: at the fewest and the most rows
    where it may, and wherever it is a default."""
    for fewest, most, some in CANDIDATES:
        for blocks in some:
            if blocks.way not in (INT4, APART):
                wanted = {fewest, min(most, ROWS[-1])} | {rows for rows in ROWS if blocks in [default_for(rows, c) for c in CAPABILITIES]}
                yield from ((rows, blocks) for rows in sorted(wanted))


def launches(rows: int, blocks: Blocks, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """What a candidate starts for 4096 × 4096 in 4 bits, groups of 64, rank 32 (none where the way has no place for it)."""
    low_rank = blocks.way not in WITHOUT_LOW_RANK
    x, weight = torch.empty(rows, INPUTS, dtype=dtype, device="meta"), _weight()
    up = torch.empty(OUT, RANK, dtype=dtype, device="meta") if low_rank else None
    down = torch.empty(RANK, INPUTS, dtype=dtype, device="meta") if low_rank else None
    with recording() as started:
        WAYS[blocks.way](Operands(x, weight, None, up, None, down, ((0, OUT, 0, RANK),) if low_rank else ()), blocks)
    return started


def integer_launches(rows: int, x_group: int = GROUP, dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[Blocks, bool, Launch]]:
    """(candidate, whether it is the default, launch) of the same weight with its input rounded to 8 bits in groups of `x_group`, −1: one scale a
    token, for which the weight's scales are of two levels: the quantizer with down by its first candidate, and the product by each."""
    x, up = torch.empty(rows, INPUTS, dtype=dtype, device="meta"), torch.empty(OUT, RANK, dtype=dtype, device="meta")
    weight = _weight(two_levels=x_group == -1)
    with recording() as started:
        codes, scales, h = quantize_down(x, None, torch.empty(RANK, INPUTS, dtype=dtype, device="meta"), group_size=x_group)
    yield (WHOLE_ROWS if x_group == -1 else QUANTIZERS)[0], True, started[0]
    products = by_rows((*TWO_LEVELS, *HOPPERS) if x_group == -1 else PRODUCTS, rows)
    for blocks in (some for some in products if some.m <= rows):
        with recording() as started:
            lowbit_matmul_up.launch(codes, scales, weight, h, up, None, x_group if x_group > 0 else INPUTS, ((0, OUT, 0, RANK),), dtype, blocks)
        yield blocks, blocks == products[0], started[0]


def _weight(two_levels: bool = False) -> TiledWeight:
    lanes, groups = lanes_for(INPUTS, GROUP, BITS), INPUTS // GROUP
    codes = torch.empty(OUT, INPUTS // (SLOTS[BITS] * lanes), lanes // 2, dtype=torch.int32, device="meta")
    scales = torch.empty(groups, OUT, dtype=torch.float16, device="meta")
    weight = TiledWeight(codes, scales, torch.empty_like(scales), None, BITS, GROUP, INPUTS)
    levels = torch.empty_like(scales, dtype=torch.int8), torch.empty(OUT, dtype=torch.float32, device="meta")
    # a tensor without memory has no values to inspect
    weight.__dict__.update(exact_zeros=True, integer_zeros=True, two_levels=levels if two_levels else None)
    return weight


def compiled(launch: Launch, capability: tuple[int, int]) -> dict[str, Any]:
    """registers, spilled_bytes (of a thread's stack), shared_bytes, matrix (its instruction, and whether an operand comes from registers)
    and bits of the widest load. RuntimeError in Triton's interpreter."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1: the interpreter compiles nothing; unset it in a process of its own")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _specialized(launch)
    options = {name: value for name, value in launch.options.items() if name.startswith("num_")}
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    made: Any = triton.compile(source, target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32), options=options)
    return _resources(made.asm["cubin"]) | {"shared_bytes": made.metadata.shared} | _instructions(made.asm["ptx"])


def _specialized(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], object], dict[tuple[int, ...], object]]:
    """(types, constants, attributes) as Triton's launcher would find them."""
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.options[name] if name in launch.options else launch.arguments[index]
        if name in launch.options or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[(index,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _resources(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", output)
    if match is None:
        raise RuntimeError(f"cuobjdump names no registers: {output.strip()[-300:]!r}")
    return {"registers": int(match.group(1)), "spilled_bytes": int(match.group(2))}


def _instructions(ptx: str) -> dict[str, str | int]:
    wide = re.findall(r"wgmma\.mma_async[^;]*?\},\s*(\{|%)", ptx)
    matrix = "" if "mma.sync" not in ptx else "mma"
    if wide:
        matrix = "wgmma, weight in registers" if "{" in wide else "wgmma"
    vectors = [int(bits) * int(count or 1) for count, bits in re.findall(r"ld\.global(?:\.\w+|::\w+)*?(?:\.v(\d))?\.b(\d+)", ptx)]
    copied = [8 * int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x[0-9a-f]+|\d+)", ptx)]
    return {"matrix": matrix, "load_bits": max([*vectors, *copied, 0])}


def table(capabilities: Sequence[tuple[int, int]] = CAPABILITIES) -> list[dict[str, Any]]:
    """A row for each kernel of each configuration on each card: what several start alike is one row, with all their numbers of rows."""
    started = [(rows, blocks.way, blocks, launch) for rows, blocks in configurations() for launch in launches(rows, blocks)]
    for x_group, way in ((GROUP, "W4A8"), (-1, "W4A8, two levels")):
        started += [
            (rows, way, None if first else blocks, launch) for rows in INTEGER_ROWS for blocks, first, launch in integer_launches(rows, x_group)
        ]
    made_rows: dict[str, dict[str, Any]] = {}
    for rows, way, blocks, launch in started:
        for capability in capabilities:
            if blocks in HOPPERS and capability < (9, 0):
                continue
            key = f"{launch.kernel.__name__} {capability} {_specialized(launch)} {launch.options}"
            if key not in made_rows:
                made, options = compiled(launch, capability), launch.options
                sizes = {size: options.get(f"BLOCK_{size.upper()}") for size in ("n", "m")}
                sizes |= {"warps": options["num_warps"], "stages": options["num_stages"], "step": options.get("UNROLL", options.get("STEP"))}
                card = f"sm_{capability[0]}{capability[1]}"
                made_rows[key] = {"card": card, "way": way, "kernel": launch.kernel.__name__, "default": False, "rows": []} | sizes | made
                made_rows[key]["fits"] = made["shared_bytes"] <= SHARED_LIMITS[capability]
            row = made_rows[key]
            row["default"] |= blocks is None or default_for(rows, capability) == blocks  # None: the first of its own candidates
            row["rows"] = sorted({*row["rows"], rows})
    return [row | {"rows": ", ".join(map(str, row["rows"]))} for row in made_rows.values()]
