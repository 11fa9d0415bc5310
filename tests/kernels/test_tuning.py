"""The chooser over all that it has to tell apart: rows' buckets, ranks, grids and inputs' groups, on a card whose times are made up."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bitmend.compress.integer_scales import with_integer_scales
from bitmend.kernels import choices, lowbit_matmul_up, tuning, weight_only_ways
from bitmend.kernels.candidates import APART, INT4, candidates_for
from bitmend.kernels.launch import row_bucket
from bitmend.kernels.layout import TiledWeight, tile
from bitmend.kernels.lowbit_matmul_up import LEVELS, WIDENED
from bitmend.kernels.tuning import Blocks
from bitmend.kernels.weight_only_ways import WAYS, Operands, choose

Maker = Callable[..., Any]
CARD = (9, 0)
ENDS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 512, 513, 1024, 1025, 2048, 4096, 4097)
"""The most rows of every bucket, and the fewest of the next."""
TERM = 0.1
LOSES = 1.05


def cost(blocks: Blocks, *what: Any) -> float:
    """Milliseconds from 1 to 3, of each candidate for each product as if drawn; a different candidate leads nearly everywhere."""
    return 1 + 2 * int.from_bytes(hashlib.sha256(repr((blocks, what)).encode()).digest()[:4], "big") / 2**32


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> list[str]:
    """The keys that are measured, one after another. A run of a candidate says what it would take by appending to `spent`."""
    monkeypatch.setenv("BITMEND_CACHE", str(tmp_path))
    choices.forget()
    for name in ("_blocks", "_defaulted"):
        monkeypatch.setattr(tuning, name, {})
    for module in (tuning, weight_only_ways, lowbit_matmul_up):
        monkeypatch.setattr(module, "can_time", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CARD)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    asked: list[str] = []

    def remembered(device: torch.device, key: str, measure: Callable[[], Any]) -> Any:
        asked.append(key)
        return measure()

    def bench(run: Callable[[], Any], **_: Any) -> float:
        run()  # which may measure the base alone
        spent.clear()
        run()
        return sum(spent)

    spent.clear()
    monkeypatch.setattr(tuning, "remembered", remembered)
    monkeypatch.setattr("triton.testing.do_bench", bench)
    return asked


spent: list[float] = []


def drawn(product: Operands, blocks: Blocks) -> None:
    if blocks.way == APART:
        weight_only_ways.multiply(replace(product, h=None, up=None, down=None, segments=()))
        spent.append(TERM)
    else:
        weight = product.weight
        spent.append(cost(blocks, row_bucket(len(product.x), 1), product.ranks, weight.bits, weight.book is not None, weight.zeros is None))


def test_weight_only_products_never_lose_more_than_a_twentieth(
    measurements: list[str], monkeypatch: pytest.MonkeyPatch, uniform: Maker, normal_float: Maker
) -> None:
    monkeypatch.setattr(weight_only_ways, "WAYS", dict.fromkeys(WAYS, drawn))
    monkeypatch.setattr(weight_only_ways, "carries_int4", lambda x, weight: weight.bits == 4 and weight.book is None)
    grids = {"4": tile(uniform(20, 64)), "4, symmetric": tile(uniform(20, 64, 4, 64, True)), "3": tile(uniform(20, 64, 3)), "book": tile(normal_float(20, 64))}
    taken: dict[tuple[str, int, int], Blocks] = {}
    for grid, weight in grids.items():
        for rank in (0, 32):
            for rows in ENDS:
                actual, best = _chosen(weight, rank, rows)
                place = (grid, rank, row_bucket(rows, 1))
                assert actual[1] <= LOSES * best, (place, actual, best)
                assert taken.setdefault(place, actual[0]) == actual[0], "one choice a bucket"
    buckets = {bucket for _, _, bucket in taken}
    assert len(measurements) == len(set(measurements)) == len(taken) == len(grids) * 2 * len(buckets)
    assert len({blocks.way for blocks in taken.values()}) == len(WAYS), "every way leads somewhere"
    for position in range(3):  # the grid, the rank, the bucket: each alone moves the choice
        others: dict[Any, set[Blocks]] = {}
        for place, blocks in taken.items():
            others.setdefault(place[:position] + place[position + 1 :], set()).add(blocks)
        assert any(len(some) > 1 for some in others.values()), position


def _chosen(weight: TiledWeight, rank: int, rows: int) -> tuple[tuple[Blocks, float], float]:
    """((what is chosen, what it takes), what the best candidate takes)."""
    up, down = (torch.zeros(20, rank), torch.zeros(rank, 64)) if rank else (None, None)
    product = Operands(torch.zeros(rows, 64), weight, None, up, None, down, ((0, 20, 0, rank),) if rank else ())
    bucket, takes = row_bucket(rows, 1), {}
    chosen = choose(product)
    for blocks in (chosen, *candidates_for(bucket, CARD, bool(rank), weight_only_ways.carries_int4(product.x, weight))):
        spent.clear()
        drawn(product, blocks)
        takes[blocks] = sum(spent)
    assert chosen in candidates_for(bucket, CARD, bool(rank), True) and (rank or chosen.way != APART) and not (rank and chosen.way == INT4)
    return (chosen, takes[chosen]), min(takes.values())


def test_integer_products_are_told_apart_by_rows_rank_grid_and_the_inputs_groups(
    measurements: list[str], monkeypatch: pytest.MonkeyPatch, uniform: Maker
) -> None:
    def run(codes: Any, scales: Any, weight: TiledWeight, h: Any, up: Any, bias: Any, group_size: int, segments: Any, dtype: Any, blocks: Blocks) -> Blocks:
        spent.append(cost(blocks, row_bucket(len(codes)), 0 if h is None else h.shape[-1], weight.two_levels is None, group_size))
        return blocks

    monkeypatch.setattr(lowbit_matmul_up, "launch", run)
    taken: dict[tuple[Any, ...], Any] = {}
    base = uniform(20, 128)
    for weight in (tile(base), tile(with_integer_scales(base))):
        for rank in (0, 32):
            h, up = (torch.zeros(1, 1, rank), torch.zeros(20, rank)) if rank else (None, None)
            for group_size in (64, 128):
                for rows in ENDS:
                    scales = torch.zeros(rows, 128 // group_size)
                    blocks: Any = lowbit_matmul_up._launch(
                        torch.zeros(rows, 128, dtype=torch.int8), scales, weight, h, up, None, group_size, (), torch.float32
                    )
                    place = (weight.two_levels is None, rank, group_size, row_bucket(rows))
                    what = (place[3], rank, place[0], group_size)
                    some = lowbit_matmul_up.candidates_for(weight, place[3], group_size == 128, CARD)
                    assert cost(blocks, *what) == min(cost(other, *what) for other in some) and taken.setdefault(place, blocks) == blocks
                    assert blocks.way != LEVELS or not place[0], "of float scales no whole numbers are made"
    assert len(measurements) == len(set(measurements)) == len(taken)
    assert {blocks.way for place, blocks in taken.items() if not place[0]} == {"", LEVELS, WIDENED.way}
