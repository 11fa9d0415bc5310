"""A float32 scratch that a thread uses again and again: small enough for a cache, and never given back to the system in between."""

import threading

import torch
from torch import Tensor

CHUNK = 1 << 19  # elements a chunk should hold: 2 MB
_kept = threading.local()


def scratch(elements: int) -> Tensor:
    """float32 [elements] with whatever was in it; the next call of this thread hands out the same memory."""
    buffer = getattr(_kept, "buffer", None)
    if buffer is None or buffer.numel() < elements:
        with torch.inference_mode(False):
            buffer = _kept.buffer = torch.empty(elements)
    return buffer[:elements]
