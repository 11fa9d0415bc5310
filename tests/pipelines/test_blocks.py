"""A model run block by block is the model."""

from pathlib import Path

import pytest
import torch
from bitmend.compress.statistics import InputStatistics
from bitmend.pipelines.artifact import Artifact
from bitmend.pipelines.blocks import StreamedModel, collecting
from bitmend.pipelines.stages.baseline import build_baseline, fingerprint

from .families import FAMILIES, save_tiny

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


def test_q_k_v_share_one_second_moment(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    streamed = StreamedModel(baseline(tmp_path / "source", tmp_path), CPU)
    statistics: dict[str, InputStatistics] = {}
    with torch.no_grad():
        hidden = streamed.embed(torch.arange(3, 27).view(1, -1))
        streamed.load_block(1)
        with collecting(streamed, streamed.structure.of_block(1), frozenset({"second_moment"}), statistics):
            streamed.run_block(1, hidden)
    at = {name.rpartition(".")[2]: found for name, found in statistics.items()}
    assert at["q_proj"] is at["k_proj"] is at["v_proj"]
    assert at["gate_proj"] is at["up_proj"]
    assert len({id(s) for s in at.values()}) == 4
