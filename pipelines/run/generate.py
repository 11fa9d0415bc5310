"""`pipeline generate`: the compressed model writes text through the kernels, with a key-value cache. Knows no stage."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from ...kernels.linear import resident_bytes
from ..devices.compute import chosen_device
from ..models.decoding import decode, graphable
from ..models.source import load_config, load_tokenizer, refuse_beyond, refuse_unknown_tokens
from .opening import load, opened

log = logging.getLogger(__name__)


def generate(
    run_directory: Path,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
) -> Iterator[str]:
    """Pieces of text as they come. temperature 0 takes the likeliest token each time. On a GPU the pass of one token is a CUDA graph
    where the model allows."""
    from transformers import TextIteratorStreamer

    place = chosen_device(device)
    with opened(str(run_directory)) as artifact:
        tokenizer, config = load_tokenizer(artifact.directory), load_config(artifact.directory)
        virtual = any(extra.virtual() is not None for extra in artifact.extra_modules)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    refuse_unknown_tokens(config, ids, "the prompt")
    refuse_beyond(config, {f"--max-new-tokens {max_new_tokens} and a prompt of {ids.shape[1]} tokens": ids.shape[1] + max_new_tokens})
    model = load(run_directory, str(place))
    ids = ids.to(place)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    write = _writer(model, ids, max_new_tokens, temperature, streamer, virtual)
    torch.manual_seed(seed)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with torch.inference_mode():
                begun, count = time.perf_counter(), write()
            seconds, kept = time.perf_counter() - begun, resident_bytes(model)
            log.info("%d tokens, %.1f a second with the prompt's %d; weights keep %.1f MB", count, count / seconds, ids.numel(), kept / 1e6)
        except BaseException as error:
            failed.append(error)
            streamer.end()

    thread = Thread(target=run, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failed:
        raise failed[0]


def _writer(model: Any, ids_1T: Tensor, new_tokens: int, temperature: float, streamer: Any, virtual: bool) -> Callable[[], int]:
    """A function that writes into the streamer and returns how many tokens it wrote. Virtual tokens need a cache that grows."""
    why_not = "it runs on no GPU" if ids_1T.device.type != "cuda" else "virtual tokens stand before it" if virtual else None
    why_not = why_not or graphable(model, ids_1T.shape[1] + new_tokens)
    if why_not is not None:
        log.debug("no CUDA graph: %s", why_not)
        settings: dict[str, object] = {"do_sample": temperature > 0, "temperature": temperature or None, "top_p": None, "top_k": None}
        settings |= {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T), "max_new_tokens": new_tokens, "streamer": streamer}
        return lambda: model.generate(**settings).shape[1] - ids_1T.shape[1]

    def choose(logits_V: Tensor) -> int:
        if temperature == 0:
            return int(logits_V.argmax())
        return int(torch.multinomial(torch.softmax(logits_V.float() / temperature, -1), 1))

    def write() -> int:
        count = 0
        streamer.put(ids_1T.cpu())
        for token in decode(model, ids_1T, new_tokens, choose):
            streamer.put(torch.tensor([token]))
            count += 1
        streamer.end()
        return count

    return write
