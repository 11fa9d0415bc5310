"""Model directories and gguf files with changed configs, headers, tensors and bytes: imported, or refused in one line."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.weights import NormalFloatWeight, UniformWeight
from bitmend.pipelines.demo import imported
from bitmend.pipelines.formats import write
from bitmend.pipelines.models.source import load_config, load_tokenizer, positions, resolve_model
from bitmend.pipelines.models.structure import inspect, skeleton
from bitmend.pipelines.planning.imported_sizes import imported_sizes
from bitmend.pipelines.stages.baseline import build_baseline, check_source
from bitmend.recover.extra_modules import TOKENS, ExtraModules
from torch import Tensor

from ..pipelines.demo.test_demo import write_gguf
from ..pipelines.families import save_speaking
from ..pipelines.formats.conftest import build, uniform
from ..pipelines.formats.test_bitsandbytes import quantized
from ..pipelines.formats.test_peft import with_low_rank
from .changes import Change, Files, changed, drawn, files_of, write_files
from .ending import counts, ending, fuzz

CORPUS = json.loads((Path(__file__).parents[1] / "corpus" / "checkpoints.json").read_text())
TINY = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_key_value_heads": 4,
    "vocab_size": 32,
    "tie_word_embeddings": False,
}


def on_grid(weight_OI: Tensor) -> UniformWeight:
    return uniform(weight_OI, symmetric=True)


def nf4(weight_OI: Tensor) -> NormalFloatWeight:
    return quantized(weight_OI, 32, double=True)


BASES: dict[str, tuple[str, str, Callable[[Tensor], Any], dict[str, Any]]] = {
    "dense": ("llama", "dense", on_grid, {}),
    "shards": ("llama", "dense", on_grid, {"shard_bytes": 20_000}),
    "experts": ("mixtral", "dense", on_grid, {}),
    "gptq": ("llama", "gptq-v2", uniform, {}),
    "gptq experts": ("mixtral", "gptq-v2", uniform, {}),
    "compressed-tensors": ("llama", "compressed-tensors", uniform, {}),
    "bnb": ("llama", "bnb", nf4, {}),
}
HEADS = torch.zeros(2, 1, 2, 4, 8)  # a prefix [P, L, 2, K, W] of TINY
ADAPTERS: dict[str, tuple[str, Callable[..., Any] | None, tuple[ExtraModules, ...]]] = {
    "lora": ("dense", with_low_rank, ()),
    "lora on gptq": ("gptq-v2", with_low_rank, ()),
    "prefix": ("dense", None, (ExtraModules("prefix_tuning", tokens="prefix", tensors={TOKENS: HEADS}),)),
    "prompt": ("gptq-v2", None, (ExtraModules("prompt_tuning", tokens="prompt", tensors={TOKENS: torch.zeros(3, 32)}),)),
}
"""A base and its PEFT adapter: the base's format, its low-rank terms, its virtual tokens."""
NAMES = [*BASES, *ADAPTERS, "gguf", "tokenizer"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """Valid directories by name, as files; README and generation config left out, which nobody reads."""
    place = tmp_path_factory.mktemp("bases")
    made: dict[str, Files] = {}
    for name, (family, form, base_of, options) in BASES.items():
        write(form, build(family, base_of, **TINY).checkpoint, place / name, **options)
    for name, (form, low_rank, tokens) in ADAPTERS.items():
        write(form, replace(build("llama", uniform, low_rank, **TINY).checkpoint, extra_modules=tokens), place / name, adapter=True)
    for name in (*BASES, *ADAPTERS):
        made[name] = {file: data for file, data in files_of(place / name).items() if Path(file).name != "README.md"}
    save_speaking("llama", place / "speaking", Path(__file__).parents[1] / "small_model" / "model", num_hidden_layers=1)
    made["gguf"] = {"model.gguf": write_gguf(place / "model.gguf", place / "speaking").read_bytes()}
    made["tokenizer"] = {
        n: d for n, d in files_of(place / "speaking").items() if n in ("config.json", "tokenizer.json", "tokenizer_config.json")
    }
    return made


def opened(files: Files, place: Path) -> None:
    """All that a run reads of a model before its first stage."""
    shutil.rmtree(place, ignore_errors=True)
    directory = write_files(place / "model", files)
    if "model.gguf" in files:
        directory = imported.import_gguf(directory / "model.gguf")
        shutil.rmtree(directory)
        return
    source = resolve_model(str(directory))
    if "tokenizer.json" in files:
        load_config(source)
        load_tokenizer(source)("The river", return_tensors="pt")
        return
    model = skeleton(load_config(source))
    structure, _ = inspect(model, include_head=True), positions(model.config)
    check_source(source)
    imported_sizes(source, model, structure)
    build_baseline(source, place / "a.partial", place / "a", {"key": "0", "stage": {"name": "baseline"}})


@pytest.mark.parametrize("name", NAMES)
def test_unchanged_they_are_read(name: str, bases: dict[str, Files], tmp_path: Path, cache: Path) -> None:
    opened(bases[name], tmp_path / "warm")  # what is imported and compiled at first use is not counted below
    assert ending(lambda: opened(bases[name], tmp_path / "m")) == 0


@counts(10, 3000)
@pytest.mark.parametrize("name", NAMES)
def test_changed(name: str, count: int, bases: dict[str, Files], tmp_path: Path, cache: Path) -> None:
    opened(bases[name], tmp_path / "m")
    changes = drawn(bases[name], 0.02 if name == "gguf" else 1.0)
    codes = fuzz(count, count > 1000, changes, lambda actual: opened(changed(bases[name], actual), tmp_path / "m"))
    assert codes[3] > 0, "no change was refused"


@pytest.mark.parametrize(("name", "changes"), [(row["base"], row["changes"]) for row in CORPUS])
def test_corpus(name: str, changes: list[Change], bases: dict[str, Files], tmp_path: Path, cache: Path) -> None:
    opened(bases[name], tmp_path / "m")
    assert ending(lambda: opened(changed(bases[name], changes), tmp_path / "m")) == 3
