"""Sums in the order of the units, and what ranks tell one another: the same on any number of processes."""

from pathlib import Path

import pytest

from ..runs import Processes

SUMS = """
import torch
from bitmend.pipelines.ranks import exchange, joining

mine = joining.join()
exchange.PIECE = 1000  # several pieces, the last one short
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64):
    units = [(torch.rand(37, 61, generator=torch.Generator().manual_seed(u)) * 1000).to(dtype) for u in range(11)]
    wanted = units[0].clone()
    for u in (1, 2, 3, 5, 6, 7, 8, 9, 10):
        wanted += units[u]
    summed = exchange.OrderedSum(mine, units[0])
    for begin in range(0, 11, mine.size):
        u = begin + mine.rank
        assert u >= 11 or mine.owns(u)
        summed.add(units[u] if u < 11 and u != 4 else None)  # unit 4 has nothing to say
    assert torch.equal(summed.total(), wanted), dtype
assert torch.equal(exchange.OrderedSum(mine, torch.ones(3)).total(), torch.zeros(3))
assert mine.in_order({u: str(u) for u in range(10) if mine.owns(u)}) == {u: str(u) for u in range(10)}
assert mine.agree(mine.rank == mine.size - 1) and not mine.agree(False)
assert mine.broadcast(mine.rank, mine.size - 1) == mine.size - 1 and mine.gathered(mine.rank) == list(range(mine.size))
assert list(mine.streamed([torch.tensor(u) for u in range(5) if mine.owns(u)], 5)) == ([*range(5)] if mine.leads else [])
joining.leave()
"""


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_sums_have_the_same_bits_on_any_number_of_ranks(commands: Processes, tmp_path: Path, size: int) -> None:
    log = tmp_path / "log"
    assert commands.ranks(size, log, code=SUMS) == [0] * size, [Path(f"{log}.{r}").read_text() for r in range(size)]
