"""What a GGUF file says of a tokenizer. That llama.cpp makes the same tokens of a text is proven by itself in tests/interop."""

import json
from pathlib import Path
from typing import Any

import pytest
from bitmend.pipelines.errors import UsageError
from bitmend.pipelines.formats.gguf_tokenizer import vocabulary
from gguf import TokenType
from tokenizers import normalizers, pre_tokenizers

from .gguf_tokenizers import GGUF_TOKENIZERS, ROWS, save_tokenizer

SPM = ("sentencepiece", "gemma", "unigram")


@pytest.mark.parametrize("name", GGUF_TOKENIZERS)
def test_kind_names_and_types(name: str, small_text: Path, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(name, small_text, tmp_path)
    actual = vocabulary(tmp_path, ROWS)
    kinds = {"sentencepiece": ("llama", "default"), "gemma": ("llama", "default"), "unigram": ("t5", "default")}
    assert (actual.kind, actual.pre) == kinds.get(name, ("gpt2", name))
    assert len(actual.tokens) == len(actual.types) == ROWS and actual.tokens[-1] == f"[PAD{ROWS - 1}]"
    assert actual.types[-1] == TokenType.UNUSED and actual.types[actual.tokens.index("<|im_start|>")] == TokenType.CONTROL
    assert {actual.tokens[i] for i in actual.special.values()} == {"<s>", "</s>", "<unk>"}
    assert actual.add == {"bos": name in SPM, "eos": False} and actual.template == "{{ messages }}"
    assert (actual.merges is None) == (name in SPM) == (actual.scores is not None)
    if name in ("sentencepiece", "gemma"):
        assert actual.types[actual.tokens.index("<0x0A>")] == TokenType.BYTE and not actual.notes
        assert actual.space_prefix is (name == "sentencepiece")
    assert all(actual.tokens[i] == piece for piece, i in tokenizer.get_vocab().items())


def changed(directory: Path, **parts: Any) -> None:
    file = directory / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))


def test_a_split_without_a_name_is_refused(small_text: Path, tmp_path: Path) -> None:
    save_tokenizer("gpt-2", small_text, tmp_path)
    changed(tmp_path, pre_tokenizer={"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False})
    with pytest.raises(UsageError, match=r"no name here for how its tokenizer splits .*x\+.* the names known are gpt-2, smollm"):
        vocabulary(tmp_path, ROWS)
    changed(tmp_path, pre_tokenizer={"type": "Whitespace"})
    with pytest.raises(UsageError, match="Whitespace"):
        vocabulary(tmp_path, ROWS)


def test_whole_words_count_in_the_name(small_text: Path, tmp_path: Path) -> None:
    save_tokenizer("gpt-2", small_text, tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    changed(tmp_path, model=model | {"ignore_merges": True})
    with pytest.raises(UsageError, match="no name here"):
        vocabulary(tmp_path, ROWS)


def test_other_kinds_frames_and_sizes_are_refused(small_text: Path, tmp_path: Path) -> None:
    save_tokenizer("gpt-2", small_text, tmp_path)
    with pytest.raises(UsageError, match=r"makes token \d+, the model has embeddings for 100 tokens"):
        vocabulary(tmp_path, 100)
    changed(tmp_path, model={"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}, added_tokens=[])
    with pytest.raises(UsageError, match="kind WordLevel; llama.cpp has BPE and Unigram"):
        vocabulary(tmp_path, ROWS)
    with pytest.raises(UsageError, match="no tokenizer.json, and a GGUF file holds its tokenizer"):
        vocabulary(tmp_path / "nowhere", ROWS)


def test_sentencepiece_merges_that_are_no_scores_are_refused(small_text: Path, tmp_path: Path) -> None:
    save_tokenizer("sentencepiece", small_text, tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    first = next(i for i, pair in enumerate(model["merges"]) if len("".join(pair)) > 2 and "".join(model["merges"][i + 1]) == "".join(pair))
    again = [*model["merges"], model["merges"][first + 1]]
    del again[first + 1]
    changed(tmp_path, model=model | {"merges": again})
    with pytest.raises(UsageError, match="at two ranks, and a SentencePiece tokenizer has one score for it"):
        vocabulary(tmp_path, ROWS)
    fewer = [pair for i, pair in enumerate(model["merges"]) if i != first + 1]
    changed(tmp_path, model=model | {"merges": fewer})
    assert "llama.cpp also merges 1 pairs" in vocabulary(tmp_path, ROWS).notes[0]


@pytest.mark.parametrize("name", ["sentencepiece", "unigram"])
def test_a_normalizer_that_llama_cpp_lacks_is_refused(name: str, small_text: Path, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(name, small_text, tmp_path)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁"), normalizers.Lowercase()])
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UsageError, match="no step Lowercase in a SentencePiece tokenizer"):
        vocabulary(tmp_path, ROWS)
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UsageError, match="does not write spaces as ▁"):
        vocabulary(tmp_path, ROWS)


def test_a_prefix_that_is_not_written_twice_is_reported(small_text: Path, tmp_path: Path) -> None:
    save_tokenizer("unigram", small_text, tmp_path)
    assert "begins with a space" in vocabulary(tmp_path, ROWS).notes[0]
