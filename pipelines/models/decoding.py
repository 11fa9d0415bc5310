"""One token after another with a static key-value cache, the forward pass recorded once as a CUDA graph and replayed: between the small
kernels of one token a GPU would otherwise wait for Python.

Knows transformers' caches; not artifacts. The graph is made by `record`, so that all else is tested without a GPU.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from ...recover.extra_modules import cache_argument

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Step = Callable[[], None]
Record = Callable[[Step], Step]
WARM_UP = 3


def graphable(model: "PreTrainedModel", length: int) -> str | None:
    """Why a graph of one token's forward pass cannot be replayed, or None: layers whose cache counts in Python (sliding windows,
    recurrent states) would repeat the count of the token they were recorded with."""
    try:
        layers = StaticCache(config=model.config, max_cache_len=length).layers
    except (KeyError, TypeError, ValueError) as error:
        return f"no static cache: {error}"
    odd = {type(layer).__name__ for layer in layers if type(layer) is not StaticLayer}
    odd |= {
        "StaticLayer without a count on the device" for layer in layers if not isinstance(getattr(layer, "cumulative_length", None), Tensor)
    }
    return f"its cache has layers of kind {', '.join(sorted(odd))}" if odd else None


def cuda_graph(step: Step) -> Step:
    """`step` recorded on the current device; it must have run before."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.no_grad()
def decode(
    model: "PreTrainedModel", prompt_1T: Tensor, new_tokens: int, choose: Callable[[Tensor], int], record: Record = cuda_graph
) -> Iterator[int]:
    """Up to `new_tokens` tokens after the prompt, each picked by `choose` from the logits [V]; the model's end tokens end it."""
    length = prompt_1T.shape[1] + new_tokens
    cache = StaticCache(config=model.config, max_cache_len=length)
    given: dict[str, object] = {cache_argument(model): cache, "use_cache": True}
    ids = torch.zeros(1, 1, dtype=torch.long, device=prompt_1T.device)
    positions = torch.zeros_like(ids)
    logits = model(prompt_1T, position_ids=torch.arange(prompt_1T.shape[1], device=ids.device).unsqueeze(0), **given).logits[0, -1].clone()

    def step() -> None:
        logits.copy_(model(ids, position_ids=positions, **given).logits[0, -1])

    replay: Step | None = None
    for position in range(prompt_1T.shape[1], length):
        token = choose(logits)
        yield token
        if token in _ends(model) or position + 1 == length:
            return
        ids.fill_(token)
        positions.fill_(position)
        if replay is None:
            replay = _recorded(step, [layer for layer in cache.layers if isinstance(layer, StaticLayer)], record)
        replay()


def _recorded(step: Step, layers: list[StaticLayer], record: Record) -> Step:
    """Warm-up and recording both advance the cache; what they counted is taken back, what they wrote is written again."""
    counted = [layer.cumulative_length.clone() for layer in layers]

    def rewind() -> None:
        for layer, count in zip(layers, counted, strict=True):
            layer.cumulative_length.copy_(count)

    for _ in range(WARM_UP):
        step()
        rewind()
    replay = record(step)
    rewind()
    return replay


def _ends(model: "PreTrainedModel") -> set[int]:
    end = model.generation_config.eos_token_id
    return set() if end is None else {end} if isinstance(end, int) else set(end)
