"""Sums over the calibration text are those of its slots, in their order."""

from pathlib import Path

import pytest
import torch
from bitmend.compress.statistics import InputStatistics
from bitmend.pipelines.errors import InputError
from bitmend.pipelines.models.blocks import StreamedModel
from bitmend.pipelines.models.collecting import collect, collect_head, collecting, gather
from bitmend.pipelines.models.hidden import HiddenStates, Room
from bitmend.pipelines.ranks.exchange import SLOTS
from torch import Tensor, nn

from ..families import save_tiny
from .test_blocks import CPU, baseline

BATCHES = 2 * SLOTS + 3
EVERYTHING = frozenset({"second_moment", "absmax", "absmean", "samples"})


def states(model: StreamedModel, room: Room | None = None) -> HiddenStates:
    ids = torch.randint(3, 97, (BATCHES, 1, 24), generator=torch.Generator().manual_seed(1))
    return HiddenStates.of((model.embed(some) for some in ids), room or Room(CPU))


def in_slot_order(model: StreamedModel, sites: list, hidden: HiddenStates) -> dict[str, InputStatistics]:
    """The slow twin: every slot by itself, then one after the other."""
    total: dict[str, InputStatistics] = {}
    for slot in range(SLOTS):
        actual: dict[str, InputStatistics] = {}
        with collecting(model, sites, EVERYTHING, actual):
            for number in range(slot, BATCHES, SLOTS):
                model.run_block(0, hidden[number])
        for name in actual:
            total.setdefault(name, InputStatistics(actual[name].features, EVERYTHING)).add(actual[name])
    return total


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@torch.no_grad()
def test_batches_are_summed_slot_by_slot(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "source")
    model = StreamedModel(baseline(tmp_path / "source", tmp_path), CPU)
    hidden, sites = states(model, Room(CPU, 20_000, 0, tmp_path)), model.structure.of_block(0)
    model.load_block(0)
    actual = collect(model, 0, hidden, sites, EVERYTHING)
    assert actual.keys() == {site.name for site in sites}
    for name, wanted in in_slot_order(model, sites, hidden).items():
        assert actual[name].tokens == wanted.tokens
        if wanted.tokens:
            for sums in ("moment_sum_II", "abs_sum_I", "max_I", "samples_TI"):
                assert torch.equal(getattr(actual[name], sums), getattr(wanted, sums)), (name, sums)
    if family == "llama":
        at = {name.rpartition(".")[2]: statistics for name, statistics in actual.items()}
        assert at["q_proj"] is at["k_proj"] is at["v_proj"] and at["q_proj"] is not at["o_proj"]
        rows = torch.cat([hidden[number] for number in range(0, BATCHES, SLOTS)])
        norm = model.layers[0].input_layernorm(rows).flatten(0, 1)
        assert at["q_proj"].samples_TI is not None and torch.equal(at["q_proj"].samples_TI[: len(norm)], norm), "those of slot 0 first"


@torch.no_grad()
def test_the_head_is_summed_slot_by_slot(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    model = StreamedModel(baseline(tmp_path / "source", tmp_path), CPU)
    hidden, head = states(model), model.structure.head
    assert head is not None
    actual = collect_head(model, hidden, head, EVERYTHING)
    total = InputStatistics(head.shape[1], EVERYTHING)
    for slot in range(SLOTS):
        part = InputStatistics(head.shape[1], EVERYTHING)
        for number in range(slot, BATCHES, SLOTS):
            part.update(model.model.model.norm(hidden[number]))
        total.add(part)
    assert actual is not None and torch.equal(actual.second_moment_II, total.second_moment_II)


@torch.no_grad()
def test_sites_that_share_an_input_in_one_slot_alone_are_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    model = StreamedModel(baseline(tmp_path / "source", tmp_path), CPU)
    sites = [site for site in model.structure.of_block(0) if site.module.endswith(("q_proj", "k_proj"))]
    model.load_block(0)
    q, k = (model.model.get_submodule(site.module) for site in sites)

    def run(number: int, x: Tensor) -> None:
        for module in (q, k):
            assert isinstance(module, nn.Linear)
            module(x.clone() if number else x)

    with pytest.raises(InputError, match=r"q_proj.*one tensor at times and several at others"):
        gather(model, states(model), sites, frozenset({"norms"}), run)
