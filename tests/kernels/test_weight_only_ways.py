"""Every way of a weight-only product by itself: odd shapes and all grids against float64, memory that lies, equal runs; and the chooser."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bitmend.compress.weights import UniformWeight
from bitmend.kernels import candidates, choices, reference, torch_int4, tuning, weight_only_ways
from bitmend.kernels.candidates import APART, CANDIDATES, DEFAULTS, INT4, OLDER, SCRATCH, candidates_for, default_for, table_for
from bitmend.kernels.layout import TiledWeight, tile
from bitmend.kernels.linear import describe
from bitmend.kernels.tuning import Blocks
from bitmend.kernels.weight_only_ways import WAYS, Operands, dequantize

Maker = Callable[..., Any]
GEMV, SHARES, SPLIT = Blocks(16, 0, 4, 4, 1, "gemv"), Blocks(32, 0, 4, 1, 2, "gemv"), Blocks(32, 0, 4, 3, 2, "split")
TILE, TILES = Blocks(32, 32, 4, 3, 1, "tile", 1), Blocks(32, 16, 4, 3, 2, "tile")
EACH = {"gemv": GEMV, "gemv, shares": SHARES, "split": SPLIT, "tile": TILE, "tile, splits": TILES, "apart": Blocks(0, 0, way="apart")}
MOST_ROWS = {"gemv": 1, "gemv, shares": 3}


def grids(uniform: Maker, normal_float: Maker) -> dict[str, TiledWeight]:
    """Two tiles of codes in each, the second one padded in some."""
    plain = uniform(20, 128)
    free = UniformWeight.from_codes(plain.codes_OI(), plain.scales, plain.zeros_OG() + torch.rand(20, 2) - 0.5, 4, 64)
    actual = {"2": uniform(20, 192, 2), "3": uniform(20, 128, 3), "4": plain, "8": uniform(20, 64, 8), "free zeros": free,
             "symmetric": uniform(20, 128, 4, 64, True), "book": normal_float(20, 128), "one group, odd": uniform(20, 77, 4, -1)}  # fmt: skip
    return {name: tile(base, 16) for name, base in actual.items()}


def product_of(weight: TiledWeight, rows: int, dtype: torch.dtype, rank: int = 8) -> Operands:
    out, inputs = weight.shape
    x, up, down = torch.randn(rows, inputs), torch.randn(out, rank) / rank**0.5, torch.randn(rank, inputs) / inputs**0.5
    return Operands(x.to(dtype), weight, None, up.to(dtype), torch.randn(out), down.to(dtype), ((0, out, 0, rank),))


def truth(product: Operands, compute: torch.dtype = torch.float64) -> torch.Tensor:
    x, weight, h, up, bias, down, segments = (getattr(product, name) for name in ("x", "weight", "h", "up", "bias", "down", "segments"))
    return reference.weight_only_matmul_up(x.to(compute), weight, h, up, bias, down_RI=down, segments=segments, compute=compute)


def eager(product: Operands) -> torch.Tensor:
    assert product.down is not None and product.up is not None and product.bias is not None
    x, dtype = product.x, product.x.dtype
    return x @ product.weight.dense(dtype).t() + (x @ product.down.t()) @ product.up.t() + product.bias.to(dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("way", EACH)
@pytest.mark.parametrize("grid", ["2", "3", "4", "8", "symmetric", "free zeros", "book", "one group, odd"])
def test_every_way_on_every_grid(way: str, grid: str, uniform: Maker, normal_float: Maker, within_budget: Maker, device: str) -> None:
    rows = MOST_ROWS.get(way, 17)
    dtype = torch.float32 if grid == "4" else torch.float16
    product = product_of(grids(uniform, normal_float)[grid], rows, dtype)
    within_budget(WAYS[EACH[way].way](product, EACH[way]), eager(product), truth(product))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("way", EACH)
def test_segments_read_their_own_ranks_of_any_h(way: str, uniform: Maker) -> None:
    made = replace(product_of(tile(uniform(30, 64)), 2, torch.float32, 24), segments=((0, 9, 0, 8), (9, 6, 8, 0), (15, 15, 8, 16)))
    assert made.down is not None
    h = made.x @ made.down.t()
    for given in (made, replace(made, down=None, h=h), replace(made, down=None, h=torch.stack((h - 1, torch.ones_like(h))))):
        torch.testing.assert_close(WAYS[EACH[way].way](given, EACH[way]), truth(given, torch.float32), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", EACH)
def test_runs_agree_to_the_bit_whatever_the_strides(way: str, uniform: Maker) -> None:
    product = product_of(tile(uniform(20, 128), 16), 2, torch.float16)
    first = WAYS[EACH[way].way](product, EACH[way])
    assert product.down is not None
    scattered = replace(product, x=product.x.t().contiguous().t(), down=product.down.t().contiguous().t())
    assert torch.equal(first, WAYS[EACH[way].way](scattered, EACH[way])) and torch.equal(first, WAYS[EACH[way].way](product, EACH[way]))


def test_eight_rows_without_the_matrix_unit(uniform: Maker, within_budget: Maker) -> None:
    product = product_of(tile(uniform(9, 64)), 8, torch.float16)
    within_budget(WAYS["gemv"](product, GEMV), eager(product), truth(product))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_whole_dequantization_is_dense_bit_for_bit(
    dtype: torch.dtype, uniform: Maker, normal_float: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = Blocks(32, 0, 4, 1, 1, SCRATCH)
    for name, weight in grids(uniform, normal_float).items():
        assert torch.equal(dequantize(weight, dtype, 0, 20, blocks), weight.dense(dtype)), name
        assert torch.equal(dequantize(weight, dtype, 3, 17, blocks), weight.dense(dtype)[3:17]), name
    product = replace(product_of(tile(uniform(200, 64)), 2, dtype), up=None, down=None, segments=())
    whole = WAYS[SCRATCH](product, blocks)
    torch.testing.assert_close(whole.double(), truth(product), rtol=1e-2, atol=1e-2)
    monkeypatch.setattr(weight_only_ways, "SCRATCH_BYTES", 1)  # 128 outputs at a time
    torch.testing.assert_close(WAYS[SCRATCH](product, blocks), whole)


def test_shares_are_few_where_programs_are_many() -> None:
    assert weight_only_ways.splits_of(16, Blocks(16, 0, splits=8, way="gemv"), 64) == (4, 4)
    assert weight_only_ways.splits_of(16, Blocks(16, 0, splits=8, way="gemv"), 1792) == (1, 16)
    assert weight_only_ways.splits_of(3, Blocks(16, 0, splits=8, way="gemv"), 1) == (3, 1)


def test_defaults_are_candidates_and_come_first() -> None:
    for capability in DEFAULTS:
        for bucket in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096):
            for low_rank in (False, True):
                actual = candidates_for(bucket, capability, low_rank, int4=False)
                default = default_for(bucket, capability)
                assert actual[0] == (replace(default, **vars(candidates.AFTER)) if low_rank and default.way == SCRATCH else default)
                assert len(set(actual)) == len(actual) and INT4 not in {blocks.way for blocks in actual}
                assert (APART in {blocks.way for blocks in actual}) == low_rank, "two launches are measured as well as one"
                assert not low_rank or SCRATCH not in {blocks.way for blocks in actual}
                assert capability == OLDER or all(any(b == blocks for _, _, some in CANDIDATES for b in some) for blocks in actual if blocks.way != APART)
    assert candidates_for(1024, (9, 0), False, True)[0].way == SCRATCH != candidates_for(512, (9, 0), False, True)[0].way
    assert INT4 in {blocks.way for blocks in candidates_for(1, (9, 0), False, True)}


@pytest.mark.parametrize("card, table", [((7, 5), OLDER), ((8, 0), (8, 0)), ((8, 6), (8, 0)), ((8, 9), (8, 9)), ((9, 0), (9, 0)), ((12, 0), (9, 0))])
def test_an_unknown_card_takes_the_table_of_an_older_one(card: tuple[int, int], table: tuple[int, int]) -> None:
    assert table_for(card) == table


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> dict[str, float]:
    """A card with given times: way → milliseconds."""
    times: dict[str, float] = {}
    monkeypatch.setenv("BITMEND_CACHE", str(tmp_path))
    choices.forget()
    for name in ("_blocks", "_defaulted"):
        monkeypatch.setattr(tuning, name, {})
    monkeypatch.setattr(tuning, "can_time", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr("triton.testing.do_bench", lambda run, **_: times[run()])
    return times


CPU = torch.device("cpu")
THREE = tuple(Blocks(0, 0, way=way) for way in ("gemv", "tile", INT4))


def test_the_fastest_is_remembered(timed: dict[str, float]) -> None:
    timed |= {"gemv": 3.0, "tile": 2.0, INT4: 2.5}
    assert tuning.tuned("k", CPU, THREE, lambda blocks: blocks.way).way == "tile"
    timed["gemv"] = 1.0
    tuning._blocks.clear()
    choices.forget()
    assert tuning.tuned("k", CPU, THREE, lambda blocks: blocks.way).way == "tile", "from disk"
    assert describe(CPU)["choices"]["k"]["reason"] == "fastest of 3 at 2000.0 µs"


@pytest.mark.parametrize("theirs, way", [(1.0, INT4), (1.93, "tile")])
def test_what_costs_memory_must_be_faster_by_more(theirs: float, way: str, timed: dict[str, float]) -> None:
    timed |= {"gemv": 3.0, "tile": 2.0, INT4: theirs}
    assert tuning.tuned("k", CPU, THREE, lambda blocks: blocks.way, lambda blocks: 1.05 if blocks.way == INT4 else 1.0).way == way


def test_without_time_to_tune_the_default_is_taken_and_reported(timed: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.SWITCH, "0")
    assert tuning.tuned("k", CPU, THREE, lambda blocks: blocks.way).way == "gemv"
    assert describe(CPU)["choices"]["k"] == {"choice": vars(THREE[0]), "reason": "default, not measured: BITMEND_TUNE=0"}
    monkeypatch.setenv(tuning.SWITCH, "no")
    with pytest.raises(ValueError, match="BITMEND_TUNE is 'no'; expected 0"):
        tuning.tuned("k", CPU, THREE, lambda blocks: blocks.way)
    monkeypatch.delenv(tuning.SWITCH)
    timed |= {"gemv": 3.0, "tile": 2.0, INT4: 2.5}
    assert tuning.tuned("k", CPU, THREE, lambda blocks: blocks.way).way == "tile"
    assert describe(CPU)["choices"]["k"]["reason"].startswith("fastest"), "a default gives way to a measurement"


def test_while_a_graph_is_recorded_nothing_is_measured(timed: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.tuned("k", CPU, THREE, lambda blocks: blocks.way).way == "gemv"
    assert "a graph is being recorded" in tuning.defaulted(CPU)["k"]["reason"]


def test_the_low_rank_term_apart_is_measured_over_the_bases_own_choice(timed: dict[str, float], uniform: Maker, monkeypatch: Any) -> None:
    """Every way multiplies; what it takes is shown by the way it ran last, the term's own launches aside."""
    ran: list[str] = []

    def follow(way: str) -> Callable[[Operands, Blocks], torch.Tensor]:
        def run(product: Operands, blocks: Blocks) -> torch.Tensor:
            ran.append(way)
            return plain[way](product, blocks)

        return run

    plain = dict(WAYS)
    small = {"tile": TILE, "gemv": GEMV, "split": SPLIT}
    table = ((1, 4096, tuple(small.values())),)
    monkeypatch.setattr(candidates, "CANDIDATES", table)
    monkeypatch.setattr(weight_only_ways, "WAYS", {way: follow(way) for way in plain})
    monkeypatch.setattr(candidates, "DEFAULTS", {OLDER: ((4096, TILE),)})
    cost = {("tile",): 2.0, ("gemv",): 1.0, ("split",): 3.0}

    def bench(run: Callable[[], Any], **_: Any) -> float:
        run()  # which may measure the base alone
        ran.clear()
        run()
        return 0.5 if "apart" in ran else cost[(ran[-1],)]

    monkeypatch.setattr("triton.testing.do_bench", bench)
    product = product_of(tile(uniform(20, 64)), 2, torch.float32)
    ran.clear()
    y = weight_only_ways.multiply(product)
    assert ran[-2:] == ["apart", "gemv"], "the base alone has its own, faster choice"
    torch.testing.assert_close(y, truth(product, torch.float32), rtol=1e-5, atol=1e-5)


def test_torchs_operator_carries_the_grid(uniform: Maker, within_budget: Maker) -> None:
    """By its twin on the CPU, which reads the same scales and zeros."""
    for symmetric in (False, True):
        weight = tile(uniform(64, 256, 4, 64, symmetric))
        assert weight.int4_refusal == "" and torch_int4.availability(CPU) == ""
        held = len(weight.tensors())
        product = replace(product_of(weight, 3, torch.bfloat16), up=None, down=None, segments=())
        assert product.bias is not None
        within_budget(
            WAYS[INT4](product, candidates.OWN),
            product.x @ weight.dense(torch.bfloat16).t() + product.bias.bfloat16(),
            truth(product),
        )
        assert len(weight.tensors()) == held + 2, "what it keeps is counted"


def test_what_torchs_operator_cannot_carry_is_named(uniform: Maker, normal_float: Maker) -> None:
    far = UniformWeight.from_codes(torch.randint(14, 16, (64, 256)), torch.rand(64, 4) + 0.5, torch.full((64, 4), 15.3), 4, 64)
    for base, why in (
        (uniform(64, 256, 3), "no uniform grid of 4 bits"), (normal_float(64, 256), "no uniform grid"), (uniform(64, 192), "inputs by 128"),
        (uniform(60, 256), "outputs by 8"), (uniform(64, 256, 4, 16), "groups of 16"), (far, "bfloat16 scales and zeros err"),
    ):  # fmt: skip
        assert why in tile(base).int4_refusal
