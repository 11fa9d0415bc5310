"""`pipeline generate`: the compressed model writes text through the kernels, with a key-value cache. Knows no stage."""

from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from .loading import load, opened
from .models import load_tokenizer


def generate(
    run_directory: Path,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    **ignored: Any,
) -> Iterator[str]:
    """Pieces of text as they come. temperature 0 takes the likeliest token each time."""
    from transformers import TextIteratorStreamer

    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    with opened(str(run_directory)) as artifact:
        tokenizer = load_tokenizer(artifact.directory)
    model = load(run_directory, place)
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(place)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    settings: dict[str, Any] = {"do_sample": temperature > 0, "temperature": temperature or None, "top_p": None, "top_k": None}
    torch.manual_seed(seed)
    failed: list[BaseException] = []

    def write() -> None:
        try:
            with torch.inference_mode():
                model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, streamer=streamer, **settings
                )
        except BaseException as error:
            failed.append(error)
            streamer.end()

    thread = Thread(target=write, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failed:
        raise failed[0]
