"""Where and how exactly a run computes: device, dtype of its forward passes, determinism. Chosen once, before any work.

Forward passes (calibration, evaluation, Fisher information, teacher, training) run in the dtype; what is trained, the optimizer, sums,
solvers and losses stay in float32 or above. Knows torch and its devices; no recipe, no model, no files.
"""

import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from ...compress.ranges import DtypeName
from ..doctor import memory
from ..errors import UsageError
from ..ranks.exchange import ONE, Ranks
from ..ranks.watchdog import process_identity

AMPERE = (8, 0)
"""The first compute capability that multiplies bfloat16; cards before it take float16."""
FASTER = 1.25
"""How many times as fast as float32 bfloat16 must be on a CPU to be chosen there."""
WORKSPACE = ":4096:8"
"""cuBLAS's buffers, of fixed size and number: what makes its sums repeat (CUBLAS_WORKSPACE_CONFIG)."""


@dataclass(frozen=True)
class Compute:
    """What decides the bits of a result in addition to the recipe. `deterministic` matters on a GPU alone: a CPU's sums repeat anyway."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    deterministic: bool = True

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def identity(self) -> dict[str, Any]:
        """Its part of every key. Nothing for a CPU in float32, so that stages made before keys included the device are still reused."""
        if self.device.type == "cpu":
            return {} if self.dtype == torch.float32 else {"device": "cpu", "dtype": self.dtype_name}
        return {"device": self.device.type, "dtype": self.dtype_name, "deterministic": self.deterministic}

    def words(self) -> str:
        return f"{self.device.type} in {self.dtype_name}" + (
            "" if self.deterministic or self.device.type == "cpu" else ", not deterministic"
        )


def chosen_device(name: str, ranks: Ranks = ONE) -> torch.device:
    """The device of that name, `auto` the GPU where there is one. UsageError for a GPU that is not there.
    Several ranks: a GPU is the one of its local rank, or the only one that a rank sees."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("--device cuda: this torch sees no CUDA device; use --device cpu, and see `pipeline doctor`")
    device = torch.device(name)
    if ranks.size == 1:
        return device
    ranks.alike({"device": name})
    return _own_card(device, ranks) if device.type == "cuda" else device


def _own_card(device: torch.device, ranks: Ranks) -> torch.device:
    """UsageError names a rank that has none to itself."""
    if device.index is not None:
        raise UsageError(f"--device {device}: {ranks.size} ranks take a device each; give --device cuda")
    if not torch.distributed.is_nccl_available():
        raise UsageError(
            f"--device cuda: {ranks.size} ranks need NCCL, which this torch was built without; use a torch that has it, or start once"
        )
    count = torch.cuda.device_count()
    index = ranks.local if ranks.local < count else 0 if count == 1 else None
    machine = (process_identity() or [socket.gethostname()])[0]
    card = None if index is None else str(torch.cuda.get_device_properties(index).uuid)
    result = ranks.gathered((machine, card, count, ranks.local))
    for rank, (at, one, of, local) in enumerate(result):
        if one is None or (at, one) in [(there, other) for there, other, *_ in result[:rank]]:
            raise UsageError(
                f"rank {rank}: has no device to itself (LOCAL_RANK {local}, {of} CUDA device{'s' * (of > 1)} there); "
                "start as many processes a machine as it has devices (torchrun: --nproc-per-node)"
            )
    assert index is not None
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def chosen_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name. `auto` is bfloat16 on a GPU (float16 before Ampere), on a CPU what a short measurement finds faster.
    UsageError for one that the device lacks."""
    if name not in get_args(DtypeName):
        raise UsageError(f"--dtype {name}: unknown; choose one of {', '.join(get_args(DtypeName))}")
    if device.type != "cuda":
        return measured_dtype() if name == "auto" else getattr(torch, name)
    capability = torch.cuda.get_device_capability(device)
    if name == "auto":
        return torch.bfloat16 if capability >= AMPERE else torch.float16
    if name == "bfloat16" and capability < AMPERE:
        raise UsageError(
            f"--dtype bfloat16: {torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]}) has no bfloat16, "
            "which begins at 8.0; use --dtype float16 or float32"
        )
    return getattr(torch, name)


def chosen(device: str = "auto", dtype: str = "auto", deterministic: bool = True) -> Compute:
    place = chosen_device(device)
    return Compute(place, chosen_dtype(dtype, place), deterministic)


def measured_dtype() -> torch.dtype:
    """bfloat16 where this CPU has units for it (AMX, AVX512-BF16) and they are the faster ones on a product of a model's shape; elsewhere
    it is emulated, several times as slow as float32."""
    result = torch.cpu.get_capabilities()
    if not (result.get("amx_bf16") or result.get("avx512_bf16")):
        return torch.float32
    seconds = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    for _ in range(6):
        for dtype in seconds:
            seconds[dtype] = min(seconds[dtype], _product_seconds(dtype))
    return torch.bfloat16 if seconds[torch.float32] > FASTER * seconds[torch.bfloat16] else torch.float32


def _product_seconds(dtype: torch.dtype) -> float:
    """Processor time of this thread, in which others that use the machine have no part: the same machine must always choose the same."""
    x, weight = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    began = time.thread_time()
    torch.nn.functional.linear(x, weight)
    return time.thread_time() - began


def free_bytes(device: torch.device) -> int:
    """What may still be allocated: on a GPU by its own account, on a CPU what the system says is available, within the control group's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    result = memory()
    left = max(0, result["limit_bytes"] - _resident_bytes())
    return left if result["available_bytes"] is None else min(left, result["available_bytes"])


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


@contextmanager
def determinism(compute: Compute) -> Iterator[None]:
    """Within, a GPU computes the same bits from the same numbers, or raises: deterministic algorithms (which leave attention the flash,
    the memory-efficient and the plain kernels, whose backward passes then repeat), cuBLAS's fixed workspace."""
    if compute.device.type != "cuda" or not compute.deterministic:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled: Any = torch.utils.deterministic
    fills = filled.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    torch.use_deterministic_algorithms(True)
    filled.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        filled.fill_uninitialized_memory = fills
