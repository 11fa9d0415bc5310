"""`pipeline generate --engine llama.cpp` around llama.cpp: the file, its adapter, tokens in and text out. That llama.cpp writes what we write is in
tests/interop."""

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from bitmend.pipelines import cli
from bitmend.pipelines.errors import UsageError
from bitmend.pipelines.export import llama_engine
from bitmend.pipelines.models.source import load_tokenizer
from bitmend.pipelines.run import runner

pytestmark = pytest.mark.usefixtures("no_pages")


class Pretended:
    """llama_cpp.Llama, which goes on with the tokens of WORDS for ever, an end in the midst of them."""

    WORDS = " over the hills and far away"
    made: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    tokens: ClassVar[list[int]] = []

    def __init__(self, path: str, **settings: Any) -> None:
        self.made.append((path, settings))

    def generate(self, ids: list[int], **settings: Any) -> Iterator[int]:
        self.made.append((repr(ids), settings))
        while True:
            yield from self.tokens


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, finished: Path) -> type[Pretended]:
    llama_engine._into_our_log.cache_clear()
    module = types.ModuleType("llama_cpp")
    vars(module).update(Llama=Pretended, llama_log_callback=lambda call: call, llama_log_set=lambda call, data: None)
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.setattr(llama_engine, "find_spec", lambda name: module)
    Pretended.made.clear()
    Pretended.tokens = load_tokenizer(runner.last_artifact(finished).directory)(Pretended.WORDS).input_ids
    return Pretended


def test_the_file_is_written_once_and_the_text_is_ours(pretended: type[Pretended], finished: Path, cache: Path) -> None:
    for _ in range(2):
        text = "".join(llama_engine.generate(finished, "The fox", max_new_tokens=len(pretended.tokens), temperature=0.5, seed=3))
        assert text == pretended.WORDS
    (file, adapter) = sorted((path for path in (cache / "gguf").glob("*.gguf")), key=lambda path: len(path.name))
    (path, opened), (ids, asked), *again = pretended.made
    assert path == str(file) and opened["lora_path"] == str(adapter) and opened["seed"] == 3
    assert opened["n_ctx"] == len(json.loads(ids)) + len(pretended.tokens) and asked["temp"] == 0.5 and asked["top_k"] == 0
    written = file.stat().st_mtime_ns
    assert again and file.stat().st_mtime_ns == written


def test_it_stops_at_the_end(pretended: type[Pretended], finished: Path, cache: Path) -> None:
    end = load_tokenizer(runner.last_artifact(finished).directory).eos_token_id
    pretended.tokens = [*pretended.tokens[:3], end, *pretended.tokens]
    assert len("".join(llama_engine.generate(finished, "The fox"))) < len(pretended.WORDS)


def test_without_the_extra_it_says_how_to_install(finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    monkeypatch.setattr(llama_engine, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"llama-cpp-python is not installed; pip install 'bitmend\[llama.cpp\]'"):
        llama_engine.generate(finished, "The fox")
    assert not (cache / "gguf").exists()
    assert cli.main(["generate", str(finished), "The fox", "--engine", "llama.cpp", "--device", "cuda"]) == 2
    assert "runs on the CPU" in capsys.readouterr().err


def test_it_exports_as_a_command(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run's base, adapter and mask: the file measures what the run measured; -o takes a file or a directory."""
    assert cli.main(["export", str(finished), "--format", "gguf", "--adapter", "-o", str(tmp_path / "m.gguf"), "--json", "-q"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["perplexity"] == pytest.approx(answer["artifact_perplexity"], rel=1e-3)
    assert answer["total_bytes"] == sum(path.stat().st_size for path in tmp_path.iterdir()) and len(list(tmp_path.iterdir())) == 2
    assert any("pruned" in note for note in answer["notes"]) and any("m.adapter.gguf" in note for note in answer["notes"])
    assert cli.main(["export", str(finished), "--format", "gptq", "-o", str(tmp_path / "x.gguf")]) == 2
    assert "--format gptq writes a directory" in capsys.readouterr().err
    assert cli.main(["export", str(finished), "--format", "gguf", "-o", str(tmp_path / "m.gguf")]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
