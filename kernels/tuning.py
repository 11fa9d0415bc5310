"""Which block sizes a kernel runs with: tuned on the card once, remembered on disk per device and shape.

In the interpreter the first candidate is taken, since no time measured there means anything.
Knows configurations and how to time them; not kernels.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton.testing
from triton.runtime.errors import OutOfResources

from .choices import known, remembered

_blocks: dict[tuple[torch.device, str], "Blocks"] = {}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blocks:
    """Outputs and tokens of one program, its warps and stages, and, where the inputs are split, the programs a row is split over."""

    n: int
    m: int
    warps: int = 4
    stages: int = 3
    splits: int = 1


def tuned(key: str, device: torch.device, candidates: Sequence[Blocks], run: Callable[[Blocks], Any]) -> Blocks:
    """The fastest candidate for `key`; the first one where nothing can be timed. RuntimeError when none fits the device."""
    if device.type != "cuda":
        return candidates[0]
    if (device, key) in _blocks:
        return _blocks[device, key]

    def measure() -> dict[str, Any]:
        times: dict[int, float] = {}
        for index, blocks in enumerate(candidates):
            try:
                milliseconds: Any = triton.testing.do_bench(lambda b=blocks: run(b), warmup=5, rep=20, return_mode="median")
                times[index] = milliseconds * 1e3
            except OutOfResources as error:
                log.info("%s: %s does not fit: %s", key, blocks, error)
        if not times:
            raise RuntimeError(f"{key}: none of {len(candidates)} configurations fits {torch.cuda.get_device_name(device)}")
        best = min(times, key=lambda index: times[index])
        return {"choice": asdict(candidates[best]), "reason": f"fastest of {len(times)} at {times[best]:.1f} µs"}

    if torch.cuda.is_current_stream_capturing():  # nothing can be timed while a graph is recorded
        entry = known(device, key)
        return candidates[0] if entry is None else Blocks(**entry["choice"])
    _blocks[device, key] = Blocks(**remembered(device, key, measure)["choice"])
    return _blocks[device, key]
