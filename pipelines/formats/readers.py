"""Programs known to read an export of this format and these grids, and what would have to change for the others.

A row is a claim with its proof: a test here, or a measurement. A program without a row may well read the file; nobody here has seen it.
Knows descriptions of records; no file.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Exported:
    """What decides who reads an export. `grids`: (bits, group size, symmetric) of each kind of uniform grid; `kinds` of bases: uniform,
    normal_float, dense; `low_rank`: whether the model that is exported has a low-rank term."""

    format: str
    adapter: bool
    family: str
    grids: frozenset[tuple[int, int, bool]]
    kinds: frozenset[str]
    low_rank: bool

    @classmethod
    def of(cls, format_: str, adapter: bool, family: str, descriptions: Iterable[Mapping[str, Any]]) -> "Exported":
        """`descriptions` of the records, as an artifact's manifest has them; codes of 5 and 6 bits are written in 8."""
        records = list(descriptions)
        bases = [record["base"] for record in records]
        uniform = [b for b in bases if b["kind"] == "uniform"]
        grids = {(8 if b["bits"] in (5, 6) else b["bits"], b["group_size"], "zeros" not in b) for b in uniform}
        low_rank = any("low_rank" in record for record in records)
        return cls(format_, adapter, family, frozenset(grids), frozenset(b["kind"] for b in bases), low_rank)


# what a program asks for → (whether it is so, what to change otherwise)
CONDITIONS: Mapping[str, tuple[Callable[[Exported], bool], str]] = {
    "one model": (lambda e: not e.adapter, "one model (leave --adapter out)"),
    "adapter": (lambda e: e.adapter, "base and adapter apart (--adapter)"),
    "merged": (lambda e: not e.low_rank, "no low-rank term (--merge --requantize, or an earlier --stage)"),
    "uniform": (lambda e: "uniform" in e.kinds and not {"normal_float", "ggml"} & e.kinds, "uniform grids (a method as rtn or gptq)"),
    "NormalFloat4": (lambda e: "normal_float" in e.kinds and "uniform" not in e.kinds, "NormalFloat4 (the method nf4)"),
    "symmetric": (lambda e: all(symmetric for _, _, symmetric in e.grids), "grids without zero points (quantize.symmetric=true)"),
    "4 bits": (lambda e: all(bits == 4 for bits, _, _ in e.grids), "4 bits in every matrix (quantize.bits=4)"),
    "one grid": (lambda e: len(e.grids) < 2, "one width and group size for all matrices (no --budget, no overrides)"),
    "one grid or symmetric": (
        lambda e: len(e.grids) < 2 or all(symmetric for _, _, symmetric in e.grids),
        "one width and group size for all matrices, or grids without zero points (quantize.symmetric=true)",
    ),
    "a Llama": (lambda e: e.family == "llama", "a model of type llama"),
    "auto-gptq's families": (lambda e: e.family in ("llama", "opt", "gpt2", "gpt_neox"), "a model of type llama, opt, gpt2 or gpt_neox"),
}
FORMATS_TESTS = "tests/pipelines/formats/"
VLLM = "vLLM 0.32 on a CPU with AVX-512"
VLLM_TEST = "tests/interop/test_vllm.py::test_vllm_writes_what_we_write"
OF_VLLM = ("uniform", "one grid", "4 bits", "symmetric", "a Llama")
# program → (format, conditions, proof)
READERS: Mapping[str, tuple[str, tuple[str, ...], str]] = {
    "transformers 5.24": ("dense", ("one model",), f"{FORMATS_TESTS}test_dense.py::test_transformers_loads_it_and_gives_the_same_logits"),
    "PEFT 0.21 on transformers": (
        "dense", ("adapter",), f"{FORMATS_TESTS}test_peft.py::test_peft_loads_the_adapter_on_the_base_and_reproduces_the_logits",
    ),
    "auto-gptq 0.7.1": (
        "gptq", ("one model", "merged", "uniform", "one grid", "auto-gptq's families"),
        "tests/interop/test_auto_gptq.py::test_auto_gptq_loads_ours_and_gives_the_same_logits",
    ),
    "transformers with compressed-tensors 0.20": (
        "compressed-tensors", ("one model", "merged", "uniform", "one grid or symmetric"),
        f"{FORMATS_TESTS}test_compressed_tensors.py::test_transformers_gives_the_same_logits",
    ),
    VLLM: ("compressed-tensors", ("one model", "merged", *OF_VLLM), VLLM_TEST),
    f"{VLLM}, GPTQ": ("gptq", ("one model", "merged", *OF_VLLM), VLLM_TEST),
    f"{VLLM}, LoRA on compressed-tensors": ("compressed-tensors", ("adapter", *OF_VLLM), VLLM_TEST),
    f"{VLLM}, LoRA on GPTQ": ("gptq", ("adapter", *OF_VLLM), VLLM_TEST),
    "transformers with bitsandbytes 0.50": (
        "bnb", ("one model", "merged", "NormalFloat4"), f"{FORMATS_TESTS}test_bitsandbytes.py::test_transformers_gives_the_same_logits",
    ),
    "llama.cpp (as in llama-cpp-python 0.3.36)": ("gguf", (), "tests/interop/test_llama_cpp.py::test_every_family_computes_the_same"),
    "PEFT 0.21 on transformers with bitsandbytes 0.50": (
        "bnb", ("adapter", "NormalFloat4"), f"{FORMATS_TESTS}test_bitsandbytes.py::test_peft_loads_an_adapter_on_the_4bit_base",
    ),
}  # fmt: skip


def missing(program: str, exported: Exported) -> list[str]:
    """What keeps a program of `READERS` from being known to read this, in words; empty where it is known to."""
    format_, conditions, _ = READERS[program]
    other = [] if exported.format == format_ else [f"--format {format_}"]
    return other + [change for holds, change in map(CONDITIONS.__getitem__, conditions) if not holds(exported)]


def known_readers(exported: Exported) -> list[str]:
    """The programs that read exactly this."""
    return [program for program in READERS if not missing(program, exported)]


def for_the_others(exported: Exported, has_adapter: bool) -> dict[str, str]:
    """Program → what would have to change. Rows that want an adapter are left out where the model has nothing to put into one."""
    rows = {
        program: missing(program, exported) for program, (_, conditions, _) in READERS.items() if has_adapter or "adapter" not in conditions
    }
    return {program: ", ".join(changes) for program, changes in rows.items() if changes}
