"""Out-of-memory errors as one line: which stage, what it wanted, what there was, which settings need less.

Knows torch's errors and a stage's settings; not what a stage does with memory.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..doctor import memory
from ..errors import OutOfMemoryError, is_shortage
from ..recipes.stage_settings import StageSpec
from .compute import Compute

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@contextmanager
def shortage(address: str, spec: StageSpec | None, compute: Compute) -> Iterator[None]:
    """Within, an allocation that fails raises our OutOfMemoryError (exit code 5). What was finished is on disk already."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_shortage(error):
            raise
        on_card = isinstance(error, torch.OutOfMemoryError)
        where = "device memory" if on_card else "memory"
        raise OutOfMemoryError(
            f"{address}: out of {where}: {_wanted(error)}, {_free(compute, on_card)}; {advice(address, spec)}; what is finished is kept"
        ) from error


def _wanted(error: BaseException) -> str:
    result = re.search(r"[Tt]ried to allocate ([0-9.]+) (bytes|[KMG]iB)", str(error))
    return "an allocation failed" if result is None else f"{float(result[1]) * UNITS[result[2]] / 1e9:.2f} GB more were needed"


def _free(compute: Compute, on_card: bool) -> str:
    if on_card:
        free, total = torch.cuda.mem_get_info(compute.device)
        return f"{free / 1e9:.2f} of {total / 1e9:.1f} GB are free"
    available = memory()["available_bytes"]
    return "what is free is not known" if available is None else f"{available / 1e9:.2f} GB are free"


def advice(address: str, spec: StageSpec | None) -> str:
    """Settings that want less, with values."""
    if spec is None or spec.name == "fuse":
        return "use --set calibration.samples or evaluation.seq_len with a smaller number, or a device with more memory"
    config = spec.config
    if spec.name != "recover":
        batch = _halved(address, config, "batch_size")
        return "try " + " ".join([*batch, "--set calibration.samples=… with half as many"])
    tries = _halved(address, config, "batch_size")
    if tries and hasattr(config, "accumulation"):
        tries.append(f"--set {address}.accumulation={2 * config.accumulation} (the same updates)")
    if getattr(config, "gradient_checkpointing", True) is not True:
        tries.append(f"--set {address}.gradient_checkpointing=true")
    if getattr(config, "cache_dense", "never") != "never":
        tries.append(f"--set {address}.cache_dense=never")
    return "try " + ", ".join(tries or _halved(address, config, "seq_len") or ["a method with fewer trained parameters"])


def _halved(address: str, config: object, name: str) -> list[str]:
    value = getattr(config, name, 1)
    return [f"--set {address}.{name}={value // 2}"] if value > 1 else []
