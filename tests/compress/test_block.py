"""Processes that share the windows of a block train what one process trains, bit for bit, each with its own windows alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from bitmend.compress.block import BlockProblem, BlockShare
from bitmend.compress.methods import DECOMPOSE, QUANTIZE
from bitmend.compress.statistics import InputStatistics, LayerStatistics
from bitmend.compress.weights import DenseWeight, StoredWeight, to_tensors
from torch import Tensor

SLOTS = [[0, 8, 9], [1, 10], [2], [3], [4], [5], [6], [7]]
Solved = tuple[dict[str, StoredWeight], dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Some:
    """The windows of one process."""

    rows: Mapping[int, Tensor]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, wanted: Tensor) -> Tensor:
        return torch.stack([self.rows[number] for number in wanted.tolist()])


def solved(method: Any, settings: Mapping[str, Any], share: BlockShare) -> Solved:
    """A two-layer perceptron that keeps the windows of its own slots."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"up": (32, 16), "gate": (32, 16), "down": (16, 32), "unused": (16, 16)}
    targets = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inputs_NTD = torch.randn(11, 5, 16, generator=generator)

    def forward(matrices: dict[str, Tensor], x: Tensor) -> Tensor:
        return x + (torch.nn.functional.silu(x @ matrices["gate"].T) * (x @ matrices["up"].T)) @ matrices["down"].T

    own = sorted(number for slot, numbers in enumerate(share.slots) if slot % share.size == share.rank for number in numbers)
    both = inputs_NTD, forward(targets, inputs_NTD)
    needs = frozenset({"second_moment", "samples", "absmax"})
    seen = {width: InputStatistics(width, needs) for width in (16, 32)}
    seen[16].update(inputs_NTD)
    seen[32].update(torch.nn.functional.silu(inputs_NTD @ targets["gate"].T) * (inputs_NTD @ targets["up"].T))
    problem = BlockProblem(
        {name: StoredWeight(DenseWeight(target)) for name, target in targets.items()}, targets, forward,
        *(Some({number: states[number] for number in own}) for states in both),
        {name: LayerStatistics(seen[shape[1]]) for name, shape in shapes.items()}, 5, (("up", "gate"), ("down", "unused")),
        lambda batches: Some(dict(zip(own, torch.cat(list(batches)), strict=True))), share=share,
    )  # fmt: skip
    with torch.no_grad():
        return method.function(problem, dict.fromkeys(targets, method.config(**settings)))


def spread(size: int) -> Callable[[Any], list[int]]:
    return lambda costs: [number % size for number in range(len(costs))]


CASES = [
    (QUANTIZE["learned_rounding"], {"bits": 2, "group_size": 8, "steps": 6, "batch_size": 5, "outliers": 0.02}),
    (QUANTIZE["learned_rounding"], {"bits": 3, "group_size": 8, "steps": 12, "batch_size": 11, "target": "compressed", "start": "rtn"}),
    (QUANTIZE["block_training"], {"bits": 2, "group_size": 8, "steps": 5, "batch_size": 3, "window": "sub_block"}),
    (DECOMPOSE["svdquant"], {"rank": 2, "group_size": 8, "activation_group_size": 8, "smoothing_steps": 2, "iterations": 2}),
]


@pytest.mark.parametrize(("method", "settings"), CASES)
def test_the_bits_do_not_depend_on_the_number_of_processes(method: Any, settings: dict[str, Any], side_by_side: Any) -> None:
    def work(thread: Any) -> Solved:
        share = BlockShare(SLOTS, thread.rank, thread.size, thread.gathered, thread.ordered_sum, spread(thread.size))
        return solved(method, settings, share)

    records, metrics = solved(method, settings, BlockShare(SLOTS))
    assert "steps" not in settings or metrics["up"]["best_step"] > 0, "something was trained"
    for size in (2, 8):
        for own_records, own_metrics in side_by_side(size, work):
            assert own_metrics == metrics and own_records.keys() == records.keys()
            for name, record in records.items():
                mine = to_tensors(own_records[name])
                assert all(torch.equal(mine[part], tensor) for part, tensor in to_tensors(record).items())


def test_every_process_takes_part_in_every_round_in_which_any_has_a_slot() -> None:
    filled = [True, False, False, False, False, True, True]
    turns = [list(BlockShare((), rank, 2).turns(filled)) for rank in range(2)]
    assert turns == [[0, None, 6], [None, 5, None]]
    assert list(BlockShare().turns(filled)) == [0, 5, 6]
