"""A model run block by block is the model."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from bitmend.compress.statistics import InputStatistics
from bitmend.pipelines.evaluation.perplexity import last_hidden
from bitmend.pipelines.models.blocks import StreamedModel
from bitmend.pipelines.models.collecting import collect, collecting, gather
from bitmend.pipelines.models.hidden import HiddenStates, Room
from bitmend.pipelines.stages.baseline import build_baseline, fingerprint
from bitmend.pipelines.store.artifact import Artifact, ArtifactWriter, open_artifact
from bitmend.recover.extra_modules import ExtraModules, Place, Tokens, start_tensors
from bitmend.recover.prompts import peft_settings
from peft import get_peft_model

from ..families import FAMILIES, save_tiny

CPU = torch.device("cpu")


def baseline(source: Path, place: Path) -> Artifact:
    key = fingerprint(source)
    return build_baseline(source, place / "b.partial", place / "b", {"key": key, "parent": None, "stage": {"name": "baseline"}})


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_are_the_models(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "source")
    ids = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    streamed = StreamedModel(baseline(tmp_path / "source", tmp_path), CPU)
    with torch.no_grad():
        hidden = streamed.embed(ids)
        for index in range(streamed.structure.blocks):
            streamed.load_block(index)
            hidden = streamed.run_block(index, hidden)
            streamed.unload_block(index)
        torch.testing.assert_close(streamed.logits(hidden), model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_a_block_gets_statistics(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "source")
    streamed = StreamedModel(baseline(tmp_path / "source", tmp_path), CPU)
    ids = torch.randint(3, 97, (4, 32), generator=torch.Generator().manual_seed(1))
    sites = streamed.structure.of_block(0)
    statistics: dict[str, InputStatistics] = {}
    with torch.no_grad():
        hidden = streamed.embed(ids)
        streamed.load_block(0)
        with collecting(streamed, sites, frozenset({"second_moment"}), statistics):
            streamed.run_block(0, hidden)
    assert set(statistics) == {site.name for site in sites}
    plain = [s for s in sites if s.expert is None]
    assert all(statistics[s.name].tokens == ids.numel() for s in plain)
    assert all(statistics[s.name].features == s.shape[1] for s in sites)
    experts = [s for s in sites if s.expert is not None and s.parameter == "gate_up_proj"]
    if experts:
        assert sum(statistics[s.name].tokens for s in experts) == 2 * ids.numel()  # two experts a token


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_that_stop_at_their_last_input_give_the_statistics_of_whole_ones(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "source")
    streamed = StreamedModel(baseline(tmp_path / "source", tmp_path), CPU)
    ids = torch.randint(3, 97, (6, 16), generator=torch.Generator().manual_seed(1))
    sites, needs = streamed.structure.of_block(0), frozenset({"second_moment"})
    with torch.no_grad():
        hidden = HiddenStates.of((streamed.embed(part) for part in ids.split(2)), Room(CPU))
        streamed.load_block(0)
        whole = gather(streamed, hidden, sites, needs, lambda _, h: streamed.run_block(0, h))
        stopped = collect(streamed, 0, hidden, sites, needs)
    assert whole.keys() == stopped.keys()
    for name, actual in whole.items():
        assert stopped[name].tokens == actual.tokens
        assert torch.equal(stopped[name].second_moment_II, actual.second_moment_II)


def test_the_product_behind_the_last_input_is_left_out(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    streamed = StreamedModel(baseline(tmp_path / "source", tmp_path), CPU)
    finished = []
    with torch.no_grad():
        hidden = [streamed.embed(torch.arange(3, 27).view(1, -1))] * 3
        block = streamed.load_block(0)
        block.mlp.down_proj.register_forward_hook(lambda *_: finished.append(1))
        collect(streamed, 0, HiddenStates.of(hidden, Room(CPU)), streamed.structure.of_block(0), frozenset({"norms"}))
    assert len(finished) == 1


def test_q_k_v_share_one_second_moment(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    streamed = StreamedModel(baseline(tmp_path / "source", tmp_path), CPU)
    statistics: dict[str, InputStatistics] = {}
    with torch.no_grad():
        hidden = streamed.embed(torch.arange(3, 27).view(1, -1))
        streamed.load_block(1)
        with collecting(streamed, streamed.structure.of_block(1), frozenset({"second_moment"}), statistics):
            streamed.run_block(1, hidden)
    at = {name.rpartition(".")[2]: actual for name, actual in statistics.items()}
    assert at["q_proj"] is at["k_proj"] is at["v_proj"]
    assert at["gate_proj"] is at["up_proj"]
    assert len({id(s) for s in at.values()}) == 4


def with_adapter(artifact: Artifact, extra: ExtraModules, place: Path) -> Artifact:
    """The artifact with one more adapter."""
    writer = ArtifactWriter(place.with_suffix(".partial"), artifact)
    writer.write_part("all", {"tensors": {n: artifact.tensor(n) for n in artifact.index}}, {})
    writer.write_extra_modules(extra)
    documents = {"config.json": (artifact.directory / "config.json").read_bytes()}
    return writer.seal(place, {"key": "k", "parent": None, "stage": {"name": "recover"}}, documents)


def tokens_for(model: Any, kind: Literal["prefix", "prompt"], count: int = 3) -> Tokens:
    """Virtual tokens as a model's own text would make them, louder."""
    ids = torch.arange(5, 5 + count).view(1, -1)
    with torch.no_grad():
        if kind == "prompt":
            return Tokens(kind, 2 * model.get_input_embeddings()(ids)[0])
        pairs = [torch.stack((layer.keys[0], layer.values[0])) for layer in model(ids, use_cache=True).past_key_values.layers]
    return Tokens(kind, 2 * torch.stack(pairs).permute(3, 0, 1, 2, 4))


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_virtual_tokens_a_streamed_model_is_the_whole_one(family: str, kind: Literal["prefix", "prompt"], tmp_path: Path) -> None:
    """Twice, since attention grows a cache; every window sees the tokens, and no position of a text is lost."""
    model = save_tiny(family, tmp_path / "source")
    tokens = tokens_for(model, kind)
    kept = ExtraModules(f"{kind}_tuning", tokens=kind, tensors={"tokens": tokens.values})
    made = with_adapter(baseline(tmp_path / "source", tmp_path), kept, tmp_path / "r")
    streamed, fronted, theirs = (
        StreamedModel(made, CPU),
        save_tiny(family, tmp_path / "again"),
        in_peft(save_tiny(family, tmp_path / "p"), tokens),
    )
    tokens.stand_before(fronted)
    for seed in (1, 2):
        ids = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
            hidden = last_hidden(streamed, ids)
            assert hidden.shape[:2] == ids.shape
            torch.testing.assert_close(streamed.logits(hidden), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(fronted(ids).logits, expected, rtol=1e-4, atol=1e-4)
            without = StreamedModel(made, CPU, virtual=False)
            torch.testing.assert_close(without.logits(last_hidden(without, ids)), model(ids).logits, rtol=1e-5, atol=1e-5)
            assert float((expected - model(ids).logits).abs().max()) > 1e-2
    begun = torch.tensor([[5, 6, 7], [8, 9, 10]])
    cached, anew = (
        fronted.generate(
            begun, attention_mask=torch.ones_like(begun), max_new_tokens=5, do_sample=False, eos_token_id=None, use_cache=cache
        )
        for cache in (True, False)
    )
    assert torch.equal(cached, anew), "a text that is written with a cache is the one that is written without"


def in_peft(model: Any, tokens: Tokens) -> Any:
    """The model in peft's wrapper, with these tokens."""
    made: Any = get_peft_model(model, peft_settings(tokens))
    embedding = made.prompt_encoder["default"].embedding
    embedding.weight = torch.nn.Parameter(tokens.values.reshape(tokens.count, -1).to(embedding.weight), requires_grad=False)
    return made.eval()


def test_bottlenecks_hang_on_their_blocks_only_while_those_are_loaded(tmp_path: Path) -> None:
    """Two adapters, one on top of the other; a later artifact takes both over."""
    model = save_tiny("llama", tmp_path / "source")
    made = baseline(tmp_path / "source", tmp_path)
    places = [{"attention": ("o_proj", None)}, {"attention": ("o_proj", "q_proj"), "mlp": ("down_proj", "gate_proj")}]
    for index, chosen in enumerate(places):
        kept = _bottlenecks(model, chosen, index)
        kept.hang(model)
        made = with_adapter(made, kept, tmp_path / f"r{index}")
    streamed, ids = StreamedModel(made, CPU), torch.arange(3, 27).view(1, -1)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(streamed.logits(last_hidden(streamed, ids)), model(ids).logits, rtol=1e-5, atol=1e-5)
        plain = StreamedModel(open_artifact(tmp_path / "b"), CPU)
        assert float((plain.logits(last_hidden(plain, ids)) - model(ids).logits).abs().max()) > 1e-2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in streamed.model.modules())
    writer = ArtifactWriter(tmp_path / "n.partial", made)
    writer.copy_part("all")
    after = writer.seal(tmp_path / "n", {"key": "n", "parent": "k", "stage": {"name": "fuse"}}, {})
    assert [b.describe() for b in after.extra_modules] == [b.describe() for b in made.extra_modules] and len(after.extra_modules) == 2
    assert (tmp_path / "n" / "adapter-01.tensors.safetensors").stat().st_nlink == 2
    after.verify()
    assert after.total_bytes() == made.total_bytes() > open_artifact(tmp_path / "b").total_bytes()
    assert set(after.index) == set(open_artifact(tmp_path / "b").index), "adapters are no tensors of the model"


def _bottlenecks(model: Any, chosen: dict[str, tuple[str, str | None]], seed: int) -> ExtraModules:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    actual: dict[str, Place] = {}
    width = model.config.hidden_size
    for index in range(model.config.num_hidden_layers):
        for kind, (exit_, entry) in chosen.items():
            name, owner = f"model.layers.{index}.{kind}", f"model.layers.{index}.{'mlp' if kind == 'mlp' else 'self_attn'}"
            started = start_tensors(width, width, 4, generator)
            tensors |= {f"{name}.{part}": t + 0.3 * torch.randn(t.shape, generator=generator) for part, t in started.items()}
            actual[name] = Place(f"{owner}.{exit_}", entry and f"{owner}.{entry}", "gelu", 2.0)
    return ExtraModules("parallel_adapter", actual, None, tensors)
