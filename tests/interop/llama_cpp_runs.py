"""Run by the environment that build_llama_cpp.sh makes: llama.cpp itself, through its C API, reads GGUF files. Knows nothing of ours but the files.

    python llama_cpp_runs.py VERB JOBS.json        every job's answer goes to its "said", a JSON file

    tokenize  {"model", "texts"}                            → {"ids": [[…], …]}
    score     {"model", "windows", "adapter"?}              → {"nll": […]}, a mean of every window of token ids
    generate  {"model", "ids", "new_tokens", "adapter"?}    → {"ids": […], "gaps": […], "seconds"}: greedy; the two best logits' difference at each step
    quantize  {"model", "output", "type", "imatrix"?}       → {"types": {tensor: type}}; imatrix: an .npz of a vector for each tensor
"""

# pyright: reportMissingImports=false
import ctypes
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as api
import numpy as np

FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15}
THREADS = 1


@api.llama_log_callback
def silent(level: int, text: bytes, data: Any) -> None:
    if level >= 4:  # errors
        sys.stderr.write(text.decode("utf-8", errors="replace"))


@contextmanager
def opened(job: dict[str, Any], length: int = 0) -> Iterator[tuple[Any, Any]]:
    """(model, context of `length` tokens; none where it is 0)."""
    settings = api.llama_model_default_params()
    model = api.llama_model_load_from_file(job["model"].encode(), settings)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {job['model']}")
    context = None
    if length:
        wanted = api.llama_context_default_params()
        wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = max(length, 256)
        wanted.n_threads = wanted.n_threads_batch = THREADS
        wanted.type_k = wanted.type_v = 0  # float32, as ours
        wanted.flash_attn_type = 0
        context = api.llama_init_from_model(model, wanted)
    if job.get("adapter"):
        adapter = api.llama_adapter_lora_init(model, job["adapter"].encode())
        if not adapter:
            raise SystemExit(f"llama.cpp cannot load the adapter {job['adapter']}")
        if api.llama_set_adapters_lora(context, (api.llama_adapter_lora_p_ctypes * 1)(adapter), 1, (ctypes.c_float * 1)(1.0)):
            raise SystemExit("llama.cpp does not take the adapter")
    yield model, context
    if context:
        api.llama_free(context)
    api.llama_model_free(model)


def logits(model: Any, context: Any, ids: list[int], start: int, every: bool) -> np.ndarray:
    """[T, V] of all tokens, or [1, V] of the last one."""
    batch = api.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
        batch.logits[i] = every or i == len(ids) - 1
    if api.llama_decode(context, batch):
        raise SystemExit("llama_decode failed")
    api.llama_batch_free(batch)
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    rows = len(ids) if every else 1
    return np.ctypeslib.as_array(api.llama_get_logits(context), shape=(rows, vocabulary)).astype(np.float64)


def tokenize(job: dict[str, Any]) -> dict[str, Any]:
    with opened(job) as (model, _):
        vocabulary, out = api.llama_model_get_vocab(model), []
        for text in job["texts"]:
            data = text.encode()
            room = (ctypes.c_int32 * (len(data) + 8))()
            count = api.llama_tokenize(vocabulary, data, len(data), room, len(room), True, True)
            out.append(list(room[:count]))
        return {"ids": out}


def score(job: dict[str, Any]) -> dict[str, Any]:
    windows = np.load(job["windows"])
    out = []
    with opened(job, windows.shape[1]) as (model, context):
        for ids in windows.tolist():
            api.llama_memory_clear(api.llama_get_memory(context), True)
            actual = logits(model, context, ids, 0, True)[:-1]
            actual -= actual.max(1, keepdims=True)
            actual -= np.log(np.exp(actual).sum(1, keepdims=True))
            out.append(float(-actual[np.arange(len(actual)), ids[1:]].mean()))
    return {"nll": out}


def generate(job: dict[str, Any]) -> dict[str, Any]:
    ids, gaps = list(job["ids"]), []
    with opened(job, len(ids) + job["new_tokens"]) as (model, context):
        actual = logits(model, context, ids, 0, False)[0]
        began = time.perf_counter()
        for _ in range(job["new_tokens"]):
            second, first = np.argpartition(actual, -2)[-2:]
            first, second = (first, second) if actual[first] >= actual[second] else (second, first)
            gaps.append(float(actual[first] - actual[second]))
            ids.append(int(first))
            actual = logits(model, context, ids[-1:], len(ids) - 1, False)[0]
        seconds = time.perf_counter() - began
    return {"ids": ids[len(job["ids"]) :], "gaps": gaps, "seconds": seconds}


def quantize(job: dict[str, Any]) -> dict[str, Any]:
    settings = api.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = FILE_TYPES[job["type"]], THREADS
    kept: list[Any] = []
    if job.get("imatrix"):
        vectors = np.load(job["imatrix"])
        rows = (api.llama_model_imatrix_data * (len(vectors.files) + 1))()
        for row, name in zip(rows, vectors.files, strict=False):
            values = np.ascontiguousarray(vectors[name], np.float32)
            kept.append(values)
            row.name, row.size = name.encode(), values.size
            row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        settings.imatrix = rows
    if api.llama_model_quantize(job["model"].encode(), job["output"].encode(), ctypes.byref(settings)):
        raise SystemExit("llama_model_quantize failed")
    return {}


def main() -> None:
    api.llama_log_set(silent, ctypes.c_void_p(0))
    api.llama_backend_init()
    verb = {"tokenize": tokenize, "score": score, "generate": generate, "quantize": quantize}[sys.argv[1]]
    for job in json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")):
        Path(job["said"]).write_text(json.dumps(verb(job)), encoding="utf-8")


if __name__ == "__main__":
    main()
