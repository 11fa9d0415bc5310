"""GGUF files: values, names and settings, read back by us and by transformers, which shares no line of this with us."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.packing import pack_mask
from bitmend.compress.weights import DenseWeight, LowRank, NormalFloatWeight, StoredWeight, UniformWeight
from bitmend.pipelines import formats
from bitmend.pipelines.errors import InputError, UsageError
from bitmend.pipelines.export.audit import write_audited
from bitmend.pipelines.formats import gguf_files
from bitmend.pipelines.formats.checkpoint import Lazy
from bitmend.pipelines.formats.gguf_types import held
from bitmend.pipelines.formats.shards import COUNTED, counted_bytes
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from .gguf_models import COMMON, GGUF_MODELS, made

IDS = torch.randint(3, 1000, (2, 24), generator=torch.Generator().manual_seed(5))
READ_BY_TRANSFORMERS = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"}
"""Its reader knows no biases and no rope scaling of these families; llama.cpp itself reads them in tests/interop."""
SETTINGS_UNREAD = {"qwen3", "gemma2", "gemma3"}
"""Of these it misses settings that are in the file (the width of a head, which layers have a window)."""


@pytest.fixture
def llama(case: Any, on_grid: Any, small_model: Path) -> Any:
    return made("llama", case, on_grid, small_model)


def uniform(bits: int, symmetric: bool, group_size: int = 32, **changes: Any) -> UniformWeight:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (6, 64), generator=generator)
    groups = 64 // group_size
    zeros = None if symmetric else torch.randint(1, 1 << bits, (6, groups), generator=generator)
    return replace(UniformWeight.from_codes(codes, torch.rand(6, groups, generator=generator).half(), zeros, bits, group_size), **changes)


@pytest.mark.parametrize(
    ("bits", "symmetric", "kind"),
    [
        *((2, True, "q4_0"), (3, True, "q4_0"), (4, True, "q4_0"), (5, True, "q5_0"), (6, True, "q8_0"), (8, True, "q8_0")),
        *((2, False, "q4_0"), (3, False, "q4_0"), (4, False, "q5_0"), (5, False, "q8_0"), (6, False, "q8_0")),
    ],
)
@pytest.mark.parametrize("group_size", [32, 64])
def test_the_smallest_type_that_holds_every_value(bits: int, symmetric: bool, kind: str, group_size: int) -> None:
    record = StoredWeight(uniform(bits, symmetric, group_size))
    actual, rounded = held("x", record)
    assert actual.type == kind and not rounded
    assert torch.equal(actual.dense(), record.dense())


@pytest.mark.parametrize(("bits", "kind"), [(4, "q4_1"), (5, "q5_1")])
def test_a_minimum_that_float16_holds_needs_no_wider_code(bits: int, kind: str) -> None:
    """Zero points that are powers of two, or scales with few digits: scale · zero is a float16."""
    base = uniform(bits, False)
    record = StoredWeight(UniformWeight.from_codes(base.codes_OI(), torch.full((6, 2), 0.25).half(), base.zeros_OG(torch.int64), bits, 32))
    actual, _ = held("x", record)
    assert actual.type == kind and torch.equal(actual.dense(), record.dense())


def test_a_mask_is_zeros(on_grid: Any) -> None:
    mask = torch.rand(6, 64, generator=torch.Generator().manual_seed(1)) < 0.5
    for base in (uniform(4, True), uniform(4, False), held("x", StoredWeight(uniform(4, True)))[0]):
        actual, _ = held("x", StoredWeight(base, mask=pack_mask(mask)))
        assert torch.equal(actual.dense(), base.dense().where(mask, 0)) and bool((actual.dense()[~mask] == 0).all())


REFUSED = {
    "groups of 16": (lambda: StoredWeight(uniform(4, True, 16)), r"groups of 16 of 64 columns, ggml's blocks have 32; --set quantize.group_size=32"),
    "scattered groups": (lambda: StoredWeight(uniform(4, True, group_index=torch.arange(64).flip(0) // 32)), "scattered over the columns"),
    "zero points between levels": (lambda: StoredWeight(uniform(4, False, zeros=torch.full((6, 2), 2.3))), "no whole numbers .*symmetric=true"),
    "levels out of reach": (lambda: StoredWeight(uniform(8, False)), "levels .* which none of Q4_0, .* holds exactly"),
    "scales past float16": (lambda: StoredWeight(uniform(4, True, scales=torch.full((6, 2), 1e5))), "past 65504"),
    "NormalFloat": (lambda: StoredWeight(NormalFloatWeight(torch.zeros(6, 8).int(), 4, 64, 64, torch.ones(6, 1))), "not NormalFloat4"),
    "smoothing": (lambda: StoredWeight(uniform(4, True), smooth=torch.ones(64)), "no place for a smoothing vector"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_type_holds_is_refused(case: str) -> None:
    record, words = REFUSED[case]
    with pytest.raises(UsageError, match=rf"x: .*{words}"):
        held("x", record())


@pytest.mark.parametrize("name", GGUF_MODELS)
def test_every_value_comes_back(name: str, case: Any, on_grid: Any, small_model: Path, tmp_path: Path) -> None:
    actual = made(name, case, on_grid, small_model)
    write_audited("gguf", actual.checkpoint, tmp_path / "m.gguf", False)  # QualityError otherwise
    kinds = {tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds == {"Q4_0", "F32"}
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("name", sorted(READ_BY_TRANSFORMERS))
def test_transformers_computes_the_same_from_it(name: str, case: Any, on_grid: Any, small_model: Path, tmp_path: Path) -> None:
    actual = made(name, case, on_grid, small_model)
    formats.write("gguf", actual.checkpoint, tmp_path / "m.gguf")
    own = {"config": actual.model.config} if name in SETTINGS_UNREAD else {}
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32, **own)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(IDS).logits, actual.model.eval()(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_directory_has_a_card_and_an_adapter_next_to_the_model(llama: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)

    def load(name: str) -> StoredWeight:
        rows, columns = llama.checkpoint.linears[name].shape
        rank = 2 if "q_proj" in name else 3
        term = LowRank(torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator))
        return replace(llama.checkpoint.linears[name], low_rank=term)

    records = {name: load(name) for name in llama.checkpoint.linears}
    checkpoint = llama.checkpoint.with_linears(records)
    notes = write_audited("gguf", checkpoint, tmp_path / "out", True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "adapter.gguf", "model.gguf"]
    assert "adapter.gguf" in notes[-1] and "--lora adapter.gguf" in (tmp_path / "out/README.md").read_text()
    back = formats.read_back("gguf", tmp_path / "out", checkpoint)
    for name, record in records.items():
        torch.testing.assert_close(back.linears[name].dense(), record.dense(), rtol=0, atol=0)
    formats.write("gguf", checkpoint, tmp_path / "one.gguf", True)
    assert (tmp_path / "one.adapter.gguf").is_file()
    with pytest.raises(UsageError, match=r"one.gguf exists; choose another name"):
        formats.write("gguf", checkpoint, tmp_path / "one.gguf", True)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_head_keep_their_codes(tied: bool, case: Any, on_grid: Any, small_model: Path, tmp_path: Path) -> None:
    actual = made("llama", case, on_grid, small_model, tie_word_embeddings=tied)
    table = on_grid(actual.model.model.embed_tokens.weight.detach(), bits=8, group_size=32, symmetric=True)
    linears = {**actual.checkpoint.linears, "lm_head" if tied else "model.embed_tokens": StoredWeight(table)}
    tensors = {n: t for n, t in actual.checkpoint.tensors.items() if n != "model.embed_tokens.weight"}
    checkpoint = replace(actual.checkpoint, linears=linears, tensors=tensors)
    notes = write_audited("gguf", checkpoint, tmp_path / "m.gguf", False)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["token_embd.weight"] == "Q8_0" and ("output.weight" in kinds) is not tied
    assert f"token_embd.weight: Q8_0, {1024 * 64 // 32 * 34} bytes" in notes


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, "F16"), (torch.bfloat16, "BF16"), (torch.float32, "F32")])
def test_dense_weights_stay_as_they_are(dtype: torch.dtype, kind: str, case: Any, small_model: Path, tmp_path: Path) -> None:
    actual = made("qwen2", case, lambda weight, **_: DenseWeight(weight.mul(1e6).to(dtype) if kind == "BF16" else weight.to(dtype)), small_model)
    write_audited("gguf", actual.checkpoint, tmp_path / "m.gguf", False)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_up.weight"] == kind and kinds["blk.0.attn_norm.weight"] == kinds["blk.0.attn_q.bias"] == "F32"


UNREADABLE = {
    "another family": ({"model_type": "gpt_neox"}, r"'gpt_neox': GGUF files are written for llama, mistral, .*--format dense carries every family"),
    "another activation": ({"hidden_act": "gelu"}, "computes silu in it, this config says gelu"),
    "another rope": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic' is not read"),
    "another scale": ({"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 99}, "scales attention by 16 in it"),
    "heads of another width": ({"model_type": "qwen2", "head_dim": 32}, "takes its 4 heads to be 64 wide in total, here they are 128"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_model_that_llama_cpp_computes_otherwise_is_refused(what: str, llama: Any, tmp_path: Path) -> None:
    changes, words = UNREADABLE[what]
    checkpoint = replace(llama.checkpoint, config={**llama.checkpoint.config, **COMMON, **changes})
    with pytest.raises(UsageError, match=words):
        formats.write("gguf", checkpoint, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_a_bias_that_llama_cpp_would_drop_is_refused(case: Any, on_grid: Any, small_model: Path, tmp_path: Path) -> None:
    actual = made("qwen3", case, on_grid, small_model, attention_bias=True)
    with pytest.raises(UsageError, match=r"q_proj.bias: llama.cpp has no place for it in a model of type 'qwen3'"):
        formats.write("gguf", actual.checkpoint, tmp_path / "m.gguf")


def test_a_damaged_file_and_one_of_another_model_are_named(llama: Any, case: Any, on_grid: Any, small_model: Path, tmp_path: Path) -> None:
    formats.write("gguf", llama.checkpoint, tmp_path / "m.gguf")
    other = made("qwen3", case, on_grid, small_model)
    with pytest.raises(InputError, match=r"m.gguf: holds no blk.0.attn_q_norm.weight, which is the model's"):
        gguf_files.read(tmp_path / "m.gguf", other.checkpoint)
    (tmp_path / "m.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:2000])
    with pytest.raises(InputError, match="no whole GGUF file"):
        gguf_files.read(tmp_path / "m.gguf", llama.checkpoint)


def test_the_file_is_read_by_its_config_alone(llama: Any, tmp_path: Path) -> None:
    """As an import does, which has no checkpoint yet."""
    formats.write("gguf", llama.checkpoint, tmp_path / "m.gguf")
    back = gguf_files.read(tmp_path / "m.gguf", replace(llama.checkpoint, linears={}, tensors={}))
    assert set(back.linears) == set(llama.checkpoint.linears) and set(back.tensors) == set(llama.checkpoint.tensors)


def test_a_changed_value_is_found(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitmend.pipelines.errors import QualityError

    plain = gguf_files.pack

    def damaged(record: Any) -> Any:
        out = plain(record).clone()
        out[0, 2] ^= 1
        return out

    monkeypatch.setattr(gguf_files, "pack", damaged)
    with pytest.raises(QualityError, match=r"1 of \d+ values changed; do not use it"):
        write_audited("gguf", llama.checkpoint, tmp_path / "m.gguf", False)


def test_refusals_of_lazy_records_come_before_any_file(llama: Any, tmp_path: Path) -> None:
    names = list(llama.checkpoint.linears)
    bad = {**llama.checkpoint.linears, names[-1]: StoredWeight(uniform(4, True, 16))}
    with pytest.raises(UsageError, match=f"{names[-1]}: groups of 16"):
        formats.write("gguf", llama.checkpoint.with_linears(Lazy({n: lambda r=r: r for n, r in bad.items()})), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_a_low_rank_term_asks_for_an_adapter_and_an_adapter_for_a_term(llama: Any, tmp_path: Path) -> None:
    name = next(iter(llama.checkpoint.linears))
    rows, columns = llama.checkpoint.linears[name].shape
    term = replace(llama.checkpoint.linears[name], low_rank=LowRank(torch.ones(rows, 2), torch.ones(2, columns)))
    with pytest.raises(UsageError, match="1 linears have a low-rank term: --adapter writes it as a LoRA adapter"):
        formats.write("gguf", llama.checkpoint.with_linears({**llama.checkpoint.linears, name: term}), tmp_path / "m.gguf")
    with pytest.raises(UsageError, match="no adapter to write; leave --adapter out"):
        formats.write("gguf", llama.checkpoint, tmp_path / "m.gguf", True)


def test_a_dry_run_counts_the_tensors(llama: Any, tmp_path: Path) -> None:
    formats.write("gguf", llama.checkpoint, tmp_path / "counted", shard_bytes=COUNTED)
    formats.write("gguf", llama.checkpoint, tmp_path / "m.gguf")
    assert counted_bytes(tmp_path / "counted") == sum(int(tensor.n_bytes) for tensor in GGUFReader(tmp_path / "m.gguf").tensors)
