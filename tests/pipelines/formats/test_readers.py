"""Who reads an export: every claim has its proof, and what is claimed of a file follows from what is in it."""

from pathlib import Path
from typing import Any

import pytest
from bitmend.pipelines.formats import FORMATS
from bitmend.pipelines.formats.readers import CONDITIONS, READERS, VLLM, Exported, for_the_others, known_readers

ROOT = Path(__file__).parents[3]


def described(bits: int = 4, group_size: int = 32, **parts: Any) -> dict[str, Any]:
    return {"kind": "stored", "base": {"kind": "uniform", "bits": bits, "group_size": group_size, **parts}}


ZEROS = {"zeros": "tensor"}
NF4 = {"kind": "stored", "base": {"kind": "normal_float", "bits": 4}}


def test_every_claim_has_its_proof() -> None:
    for program, (format_, conditions, proof) in READERS.items():
        assert format_ in FORMATS and set(conditions) <= set(CONDITIONS), program
        if not proof.startswith("measured: "):
            file, _, name = proof.partition("::")
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), program


@pytest.mark.parametrize(
    ("exported", "programs"),
    [
        (Exported.of("dense", False, "llama", [described(3, **ZEROS)]), ["transformers 5.24"]),
        (Exported.of("dense", True, "llama", [described()]), ["PEFT 0.21 on transformers"]),
        (Exported.of("gptq", False, "llama", [described(5, **ZEROS)]), ["auto-gptq 0.7.1"]),
        (Exported.of("gptq", False, "mixtral", [described()]), []),
        (Exported.of("gptq", False, "llama", [described(), described(8)]), []),
        (Exported.of("gptq-v2", False, "llama", [described()]), []),
        (Exported.of("compressed-tensors", False, "llama", [described()] * 2), ["transformers with compressed-tensors 0.20", VLLM]),
        (Exported.of("compressed-tensors", False, "llama", [described(**ZEROS)]), ["transformers with compressed-tensors 0.20"]),
        (Exported.of("compressed-tensors", False, "llama", [described(**ZEROS), described(8, **ZEROS)]), []),
        (Exported.of("compressed-tensors", True, "llama", [described()]), [f"{VLLM}, LoRA on compressed-tensors"]),
        (Exported.of("gptq", True, "llama", [{**described(), "low_rank": {}}]), [f"{VLLM}, LoRA on GPTQ"]),
        (Exported.of("gptq", False, "llama", [described()]), ["auto-gptq 0.7.1", f"{VLLM}, GPTQ"]),
        (Exported.of("bnb", False, "llama", [NF4]), ["transformers with bitsandbytes 0.50"]),
        (Exported.of("bnb", True, "llama", [{**NF4, "low_rank": {}}]), ["PEFT 0.21 on transformers with bitsandbytes 0.50"]),
    ],
)
def test_what_is_reported_follows_from_what_is_in_it(exported: Exported, programs: list[str]) -> None:
    assert known_readers(exported) == programs
    assert not set(programs) & set(for_the_others(exported, True)), "a program reads it or needs a change"


def test_what_would_have_to_change() -> None:
    others = for_the_others(Exported.of("gptq", False, "llama", [described(3, **ZEROS)]), has_adapter=False)
    assert others[VLLM] == (
        "--format compressed-tensors, 4 bits in every matrix (quantize.bits=4), grids without zero points (quantize.symmetric=true)"
    )
    assert others["transformers with bitsandbytes 0.50"] == "--format bnb, NormalFloat4 (the method nf4)"
    assert "PEFT 0.21 on transformers" not in others, "there is nothing to put into an adapter"
    dense = for_the_others(Exported.of("dense", False, "llama", [{**described(), "low_rank": {}}]), has_adapter=True)
    assert dense[VLLM] == "--format compressed-tensors, no low-rank term (--merge --requantize, or an earlier --stage)"
    assert dense["PEFT 0.21 on transformers"] == "base and adapter apart (--adapter)"
