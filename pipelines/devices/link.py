"""Speed of the link between ranks: measured briefly with two gloo processes of this machine, or given by the user for a cluster.

Knows torch.distributed and processes; no ranks' work.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, UsageError

BYTES = 1 << 24
"""Handed over by each of the two in one exchange of the measurement."""
ROUNDS, SMALL_ROUNDS = 9, 50
SECONDS = 120.0
"""After which two processes that should answer within a few are given up."""
USUAL_LATENCY = 50e-6
"""Of a collective, where only the bandwidth was given."""


@dataclass(frozen=True)
class Link:
    """`bytes_per_second` that a rank sends while it receives as many; `latency_seconds` of a collective of two, however small."""

    bytes_per_second: float
    latency_seconds: float
    source: str

    def seconds(self, calls: float, sent: float, size: int) -> float:
        """Of so many collectives of `size` ranks, in which a rank sends so many bytes in all."""
        return calls * self.latency_seconds * max(1, (size - 1).bit_length()) + sent / self.bytes_per_second


def given_link(text: str) -> Link:
    """From `GB/s` or `GB/s,MICROSECONDS`. UsageError for anything else."""
    parts = text.split(",")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(0 < number < 1e9 for number in numbers):
        raise UsageError(f"--link {text}: expected GB/s between ranks, or GB/s and the latency in µs, as in 25 or 25,20")
    return Link(numbers[0] * 1e9, numbers[1] * 1e-6 if len(numbers) == 2 else USUAL_LATENCY, "given")


def measured_link() -> Link:
    """Between two processes of this machine. InputError where they do not find one another."""
    with tempfile.TemporaryDirectory(prefix="bitmend-link-") as place:
        command = [sys.executable, "-P", "-m", f"{__package__}.link", str(Path(place) / "store")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        both = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) for rank in range(2)
        ]
        try:
            answers = [process.communicate(timeout=SECONDS) for process in both]
        except subprocess.TimeoutExpired:
            answers = []
        finally:
            for process in both:
                process.kill()
        if not answers or any(process.returncode for process in both):
            lines = b"".join(err for _, err in answers).decode(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"no answer within {SECONDS:.0f} s"
            raise InputError(f"two gloo processes of this machine could not measure their link ({reason}); give it, as in --link 10")
        result = json.loads(answers[0][0])
        return Link(result["bytes_per_second"], result["latency_seconds"], "measured between two gloo processes of this machine")


def _measure(store: str, rank: int) -> dict[str, float]:
    """What one of the two does."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)

    def exchange(size: int, times: int, clock: Callable[[], float]) -> float:
        sent, received = (torch.ones(2 * size, dtype=torch.uint8) for _ in range(2))
        result = []
        for _ in range(times):
            began = clock()
            dist.all_to_all_single(received, sent)
            result.append(clock() - began)
        return statistics.median(result[1:])

    latency = exchange(1, SMALL_ROUNDS, time.perf_counter)
    seconds = exchange(BYTES, ROUNDS, time.process_time)  # the processors carry the bytes, whoever else uses them
    dist.destroy_process_group()
    return {"latency_seconds": latency, "bytes_per_second": BYTES / max(seconds, 1e-9)}


if __name__ == "__main__":
    result = _measure(sys.argv[1], int(sys.argv[2]))
    if sys.argv[2] == "0":
        print(json.dumps(result))
