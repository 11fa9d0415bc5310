"""The walk over a model: what is found in it, what is skipped and why, and where models come from."""

import json
from pathlib import Path

import pytest
import torch
from bitmend.pipelines.errors import InputError
from bitmend.pipelines.models.source import load_config, load_tokenizer, positions, resolve_model, source_files
from bitmend.pipelines.models.structure import find_blocks, inspect, set_parameter, skeleton, tied_names
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..families import FAMILIES, save_tiny, tiny_model

LINEARS = {
    "llama": 7, "qwen3": 7, "gemma3_text": 7, "mistral": 7, "phi3": 4, "opt": 6, "gpt2": 4, "gpt_neox": 4, "mixtral": 4 + 2 * 4,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_is_found(family: str) -> None:
    model = tiny_model(family)
    structure = inspect(model)
    assert structure.blocks == 3
    for index in range(3):
        sites = structure.of_block(index)
        assert len(sites) == LINEARS[family]
        assert all(site.name.startswith(f"{structure.prefix}.{index}.") for site in sites)
    weights = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and n.startswith(f"{structure.prefix}.")}
    assert weights == {site.module for site in structure.sites if site.expert is None}
    for site in structure.sites:
        assert site.read(model.get_parameter(f"{site.module}.{site.parameter}")).shape == site.shape


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skeleton_has_the_structure_and_no_weights(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path)
    empty = skeleton(load_config(tmp_path))
    assert inspect(empty, include_head=True) == inspect(model, include_head=True)
    assert all(p.is_meta for p in empty.parameters()) and not any(b.is_meta for b in empty.buffers())
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert tied_names(empty) == tied_names(model)


def test_what_is_skipped_is_reported() -> None:
    actual = {skipped.name: skipped.reason for skipped in inspect(tiny_model("mixtral")).skipped}
    assert "include_head" in actual.pop("lm_head")
    assert len(actual) == 3 and all("router" in reason for reason in actual.values())


def test_the_head_is_a_site_when_asked() -> None:
    site = inspect(tiny_model("llama"), include_head=True).sites[-1]
    assert (site.name, site.block, site.shape) == ("lm_head", None, (97, 64))


def test_the_decoder_is_the_longest_list() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.short = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
            self.mixed = nn.ModuleList([nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.ReLU()])
            self.long = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ModuleList(nn.ReLU() for _ in range(9))) for _ in range(3))

    assert find_blocks(Model())[0] == "long", "of one class, and no list inside another"
    with pytest.raises(InputError, match="Linear has no list of decoder blocks, so this is not a decoder-only language model"):
        find_blocks(nn.Linear(2, 2))


def test_blocks_without_a_linear_are_refused() -> None:
    with pytest.raises(InputError, match="its decoder blocks hold no linear layer to compress"):
        inspect(nn.Sequential(nn.ModuleList(nn.ReLU() for _ in range(3))))


def test_tied_weights_are_named() -> None:
    model = tiny_model("gpt2")
    assert tied_names(model) == {"lm_head.weight": "transformer.wte.weight"}
    assert tied_names(tiny_model("mistral")) == {}


def test_parameters_and_buffers_are_replaced() -> None:
    module = nn.Module()
    module.inner = nn.BatchNorm1d(3, device="meta")
    set_parameter(module, "inner.weight", torch.ones(3))
    set_parameter(module, "inner.running_mean", torch.zeros(3))
    assert not module.inner.weight.is_meta and not module.inner.weight.requires_grad
    assert "running_mean" in dict(module.inner.named_buffers()) and not module.inner.running_mean.is_meta  # type: ignore[union-attr]


def test_positions(small_model: Path) -> None:
    assert positions(load_config(small_model)) == 512
    assert positions(tiny_model("gpt2").config) == 64


def test_where_models_come_from(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small_model.parent)
    assert resolve_model(str(small_model)) == resolve_model("model") == small_model.resolve()
    for name, words in (
        ("./nothing", "no such model directory"), ("/no/such/place", "no such model directory"), ("single", "no such model directory"),
        ("some.gguf", "no such file; give a .gguf file"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            resolve_model(name)
    with pytest.raises(InputError, match=r"no config\.json"):
        resolve_model(str(tmp_path))


def test_offline_the_hub_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"not in the local cache, nor can the Hub be reached \(HF_HUB_OFFLINE is set\)"):
        resolve_model("bitmend-tests/no-such-model")


def test_source_files_are_hashed_once(small_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = source_files(small_model)
    monkeypatch.setattr("bitmend.pipelines.store.files.sha256", lambda path: pytest.fail("hashed again"))
    assert source_files(small_model) == first
    assert first["model.safetensors"]["bytes"] == (small_model / "model.safetensors").stat().st_size


def test_an_index_that_names_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00002.safetensors"}}))
    with pytest.raises(InputError, match=r"names model-00002\.safetensors, which is not in .*; fetch the missing shard"):
        source_files(tmp_path)


def test_code_in_a_model_directory_never_runs(small_model: Path, tmp_path: Path) -> None:
    config = json.loads((small_model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError):
        load_config(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match=r"tokenizer"):
        load_tokenizer(tmp_path)
