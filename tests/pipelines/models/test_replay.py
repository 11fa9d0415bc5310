"""A block that runs again while its matrices change gives the bits of plain runs, and computes once what no change reaches."""

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.weights import DenseWeight, StoredWeight
from bitmend.pipelines.models.blocks import StreamedModel
from bitmend.pipelines.models.collecting import Alongside, collect, input_groups
from bitmend.pipelines.models.hidden import HiddenStates, Room
from bitmend.pipelines.models.replay import Replay
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..families import FAMILIES, save_tiny
from .test_blocks import CPU, baseline

BATCHES = 5


def opened(family: str, place: Path) -> StreamedModel:
    save_tiny(family, place / "source")
    return StreamedModel(baseline(place / "source", place), CPU)


def walked(model: StreamedModel, room: Room | None) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The second moments that each group of the first block sees when those before it have been halved, and the block's outputs behind all of that;
    replayed where a room is given."""
    ids = torch.randint(3, 97, (BATCHES, 2, 24), generator=torch.Generator().manual_seed(1))
    hidden, moments = HiddenStates.of((model.embed(some) for some in ids), Room(CPU)), dict[str, Tensor]()
    model.load_block(0)
    groups = input_groups(model, 0, model.structure.of_block(0), hidden[0])
    with nullcontext() if room is None else Replay.of(model, 0, groups, room) as replay:
        for group in groups:
            statistics = collect(model, 0, hidden, group, frozenset({"second_moment"}), alongside=Alongside(replay=replay))
            moments |= {name: s.second_moment_II for name, s in statistics.items() if s.tokens}
            for site in group:
                model.put(site, StoredWeight(DenseWeight(model.matrix(site) / 2)))
            if replay is not None:
                replay.solved += 1
        for place, batch in enumerate(hidden):
            with nullcontext() if replay is None else replay.at(place, last=True):
                hidden.put(place, model.run_block(0, batch))
        assert replay is None or not any(part.entering or part.leaving for part in replay.parts), "nothing is kept behind the last run"
    model.unload_block(0)
    return moments, list(hidden)


def equal(one: tuple[dict[str, Tensor], list[Tensor]], other: tuple[dict[str, Tensor], list[Tensor]]) -> bool:
    assert one[0].keys() == other[0].keys() and len(one[1]) == BATCHES
    return all(torch.equal(one[0][name], other[0][name]) for name in one[0]) and all(map(torch.equal, one[1], other[1]))


class Products(TorchFunctionMode):
    """How often each matrix of the first block multiplies."""

    def __init__(self, model: StreamedModel) -> None:
        super().__init__()
        self.model, self.calls = model, Counter[str]()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            by_weight = {id(self.model.model.get_submodule(site.module).weight): site.name for site in self.model.structure.of_block(0)}
            self.calls[by_weight[id(args[1])].rpartition(".")[2].removesuffix("_proj")] += 1
        return func(*args, **(kwargs or {}))


def products(model: StreamedModel, room: Room | None) -> Counter[str]:
    with Products(model) as mode:
        walked(model, room)
    return mode.calls


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bits_are_those_of_plain_runs(family: str, tmp_path: Path) -> None:
    """Wherever what is kept has room, for some batches alone too."""
    model = opened(family, tmp_path)
    plain = walked(model, None)
    for bytes_ in (float("inf"), 60_000, 0):
        assert equal(walked(model, Room(CPU, bytes_, 0, tmp_path)), plain), bytes_
    assert all("forward" not in vars(module) for module in model.layers[0].modules()) and not list(tmp_path.glob("hidden-*"))


@torch.no_grad()
def test_what_no_change_reaches_is_computed_once(tmp_path: Path) -> None:
    """But for the first batch, which runs to the end for every group, and once to find them."""
    model = opened("llama", tmp_path)
    model.embed(torch.zeros(2, 24, dtype=torch.long))  # runs a block to see what it returns
    once = {"q": 2, "k": 2, "v": 2, "o": 3, "gate": 4, "up": 4, "down": 5}
    assert products(model, Room(CPU)) == {leaf: more + BATCHES for leaf, more in once.items()}
    again = {"q": 2 + 4 * BATCHES, "k": 2 + 4 * BATCHES, "v": 2 + 4 * BATCHES, "o": 3 + 3 * BATCHES}
    assert products(model, Room(CPU, 0, 0, tmp_path)).items() >= again.items(), "where there is no room"


@torch.no_grad()
def test_a_block_that_writes_into_what_is_kept(tmp_path: Path) -> None:
    model = opened("llama", tmp_path)
    attention = model.layers[0].self_attn
    assert isinstance(attention, nn.Module)
    attention.register_forward_hook(lambda module, args, out: (out[0].mul_(2), *out[1:]))
    assert equal(walked(model, Room(CPU)), walked(model, None))


@torch.no_grad()
def test_a_module_that_runs_twice_is_left_alone(tmp_path: Path) -> None:
    model = opened("llama", tmp_path)
    mlp = model.layers[0].mlp
    assert isinstance(mlp, nn.Module)
    model.layers[0].register_forward_hook(lambda module, args, out: out + mlp(out))
    assert equal(walked(model, Room(CPU)), walked(model, None))
