"""Processes that train together say so when they no longer hold the same values."""

import pytest
import torch
from bitmend.recover.peers import Peers, ReplicasDiffer


def test_values_that_drifted_apart_are_an_error() -> None:
    values = {"a": torch.arange(3.0), "b": torch.zeros(())}
    Peers(0, 3, lambda mine: [mine] * 3).check(values)
    with pytest.raises(ReplicasDiffer, match="rank 2 has trained other values than rank 0"):
        Peers(0, 3, lambda mine: [mine, mine, "another"]).check(values)
    seen: list[str] = []
    for tensors in (values, values | {"b": torch.tensor(-0.0)}):
        Peers(0, 2, lambda mine: seen.append(mine) or [mine] * 2).check(tensors)
    assert seen[0] != seen[1], "to the last bit"


def test_units_go_round() -> None:
    assert [list(Peers(rank, 3).rounds(5)) for rank in range(3)] == [[0, 3], [1, 4], [2, None]]
    assert list(Peers().rounds(3)) == [0, 1, 2]
