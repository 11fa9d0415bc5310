"""Autotuning: which kernel and which block sizes to launch, measured on the card once and remembered on disk per device and shape.

The first candidate is the default that ships for the card; it is taken, and listed in `defaulted`, where nothing can be timed: in Triton's
interpreter, while a graph is recorded, and with BITMEND_TUNE=0. Knows configurations and how to time them; not kernels.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton.testing
from triton.runtime.errors import OutOfResources

from .choices import known, remembered
from .launch import can_time

SWITCH = "BITMEND_TUNE"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blocks:
    """Outputs and tokens of one program, its warps and stages (of a loop without the matrix unit: tiles under way at once), where the inputs
    are split, the most programs a row is split over, and the way, where there are several. slots: most fragments of a tile of codes that a step of
    the loop multiplies, 0 for all."""

    n: int
    m: int
    warps: int = 4
    stages: int = 3
    splits: int = 1
    way: str = ""
    slots: int = 0


_blocks: dict[tuple[torch.device, str], Blocks] = {}
_defaulted: dict[tuple[torch.device, str], dict[str, Any]] = {}


def tuned(
    key: str, device: torch.device, candidates: Sequence[Blocks], run: Callable[[Blocks], Any], burden: Callable[[Blocks], float] = lambda _: 1.0
) -> Blocks:
    """The fastest candidate for `key`, times multiplied by `burden`; the first one where nothing is timed. RuntimeError when none fits the
    device; ValueError when $BITMEND_TUNE is neither 0 nor 1."""
    if (settled := measured(key, device)) is not None:
        return settled
    if not can_time(device):
        return _default(key, device, candidates, "nothing is timed in Triton's interpreter")
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise ValueError(f"{SWITCH} is {switch!r}; expected 0 (take the defaults) or 1 (measure)")

    def measure() -> dict[str, Any]:
        times: dict[int, float] = {}
        for index, blocks in enumerate(candidates):
            try:
                milliseconds: Any = triton.testing.do_bench(lambda b=blocks: run(b), warmup=5, rep=20, return_mode="median")
                times[index] = milliseconds * 1e3 * burden(blocks)
            except OutOfResources as error:
                log.info("%s: %s does not fit: %s", key, blocks, error)
        if not times:
            raise RuntimeError(f"{key}: none of {len(candidates)} configurations fits {torch.cuda.get_device_name(device)}")
        best = min(times, key=lambda index: times[index])
        return {"choice": asdict(candidates[best]), "reason": f"fastest of {len(times)} at {times[best]:.1f} µs"}

    entry = known(device, key)
    if entry is None and torch.cuda.is_current_stream_capturing():
        return _default(key, device, candidates, "a graph is being recorded")
    if entry is None and switch == "0":
        return _default(key, device, candidates, f"{SWITCH}=0")
    chosen = Blocks(**remembered(device, key, measure)["choice"])
    _defaulted.pop((device, key), None)
    _blocks[device, key] = chosen
    return chosen


def measured(key: str, device: torch.device) -> Blocks | None:
    """What this process has measured, or read, for `key`."""
    return _blocks.get((device, key))


def _default(key: str, device: torch.device, candidates: Sequence[Blocks], why: str) -> Blocks:
    _defaulted[device, key] = {"choice": asdict(candidates[0]), "reason": f"default, not measured: {why}"}
    return candidates[0]


def defaulted(device: torch.device) -> dict[str, Any]:
    """Key → the entry of what was taken without a measurement in this process; "cuda" means every card."""
    return {
        key: entry for (place, key), entry in _defaulted.items() if place.type == device.type and device.index in (None, place.index)
    }  # fmt: skip
