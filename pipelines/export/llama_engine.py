"""`pipeline generate --engine llama.cpp`: the run's model written as a GGUF file once, and llama.cpp lets it write.

On a CPU that is the fastest way to text from a quantized model. Knows the export and llama-cpp-python, which is an extra; no kernels of ours.
"""

import ctypes
import logging
import time
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ...kernels.cache import cache_directory
from ..demo.download import locked
from ..errors import InputError, UsageError
from ..formats.gguf_files import adapter_beside
from ..models.source import load_config, load_tokenizer, refuse_beyond, refuse_unknown_tokens
from ..run.opening import opened
from ..store.artifact import Artifact
from .audit import write_audited
from .exporting import checkpoint_of

log = logging.getLogger(__name__)
INSTALL = "pip install 'bitmend[llama.cpp]'"


def generate(run_directory: Path, prompt: str, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0) -> Iterator[str]:
    """Pieces of text as they come; temperature 0 takes the likeliest token each time. UsageError, before any work, without llama-cpp-python and
    for a model that no GGUF file holds exactly."""
    if find_spec("llama_cpp") is None:
        raise UsageError(f"--engine llama.cpp: llama-cpp-python is not installed; {INSTALL}")
    with opened(str(run_directory)) as artifact:
        tokenizer, config = load_tokenizer(artifact.directory), load_config(artifact.directory)
        ids = tokenizer(prompt).input_ids
        refuse_unknown_tokens(config, torch.tensor(ids), "the prompt")
        refuse_beyond(config, {f"--max-new-tokens {max_new_tokens} and a prompt of {len(ids)} tokens": len(ids) + max_new_tokens})
        ends = {tokenizer.eos_token_id}
        if (artifact.directory / "generation_config.json").is_file():
            named = GenerationConfig.from_pretrained(artifact.directory).eos_token_id
            ends |= set(named if isinstance(named, list) else [named])
        file = _file(artifact)
    return _pieces(_opened(file, len(ids) + max_new_tokens, seed), tokenizer, ids, max_new_tokens, temperature, ends)


def _file(artifact: Artifact) -> Path:
    """The artifact as a GGUF file in the cache, kept by the artifact's key, its adapter beside it."""
    file = cache_directory() / "gguf" / f"{artifact.manifest['key'][:16]}.gguf"
    if not file.is_file():
        with locked(file):
            if not file.is_file():
                begun = time.perf_counter()
                apart = any("low_rank" in description for description in artifact.linears.values())
                write_audited("gguf", checkpoint_of(artifact, {"title": "bitmend"}, embeddings=True), file, apart)
                log.info("%s: written for llama.cpp in %.1f s, and kept there", file, time.perf_counter() - begun)
    return file


def _opened(file: Path, length: int, seed: int) -> Any:
    llama: object = import_module("llama_cpp")
    _into_our_log(llama)
    adapter = adapter_beside(file)
    settings: dict[str, object] = {"lora_path": str(adapter)} if adapter.is_file() else {}
    try:
        return llama.Llama(str(file), n_ctx=length, n_threads=torch.get_num_threads(), seed=seed, verbose=False, **settings)
    except ValueError as error:
        raise InputError(f"{file}: llama.cpp cannot open it ({error}); delete it and run again") from error


@cache  # llama.cpp keeps the address of the callback
def _into_our_log(llama: Any) -> Any:
    callback = llama.llama_log_callback(lambda level, text, data: log.debug(text.decode(errors="replace").rstrip()))
    llama.llama_log_set(callback, ctypes.c_void_p(0))
    return callback


def _pieces(model: Any, tokenizer: Any, ids: list[int], new_tokens: int, temperature: float, ends: set[int | None]) -> Iterator[str]:
    from tokenizers.decoders import DecodeStream

    stream, begun, count = DecodeStream(ids, skip_special_tokens=True), time.perf_counter(), 0
    for token in model.generate(ids, temp=temperature, top_k=0, top_p=1.0, min_p=0.0):
        count += 1
        if token not in ends:
            yield stream.step(tokenizer.backend_tokenizer, token) or ""
        if token in ends or count == new_tokens:
            break
    seconds = time.perf_counter() - begun
    log.info("%d tokens, %.1f a second with the prompt's %d; llama.cpp", count, count / seconds, len(ids))
