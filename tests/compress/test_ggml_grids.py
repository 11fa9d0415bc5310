"""Grids of ggml's types: the search never loses against none, uses its weights, keeps zeros, and knows no neighbours."""

import gguf
import pytest
import torch
from bitmend.compress.ggml_grids import nearest_codes, round_ggml, with_codes
from bitmend.compress.ggml_types import GGML_TYPES, as_settings, type_for
from bitmend.compress.masks import MagnitudeConfig, magnitude
from bitmend.compress.methods import DECOMPOSE
from bitmend.compress.requantize import requantize
from bitmend.compress.rounding import RtnConfig, rtn
from bitmend.compress.statistics import InputStatistics, LayerStatistics
from bitmend.compress.weights import DenseWeight, GgmlWeight, StoredWeight, to_tensors

from .test_gptq import layer

NONE = LayerStatistics(InputStatistics(512, frozenset()))
SIGNED = [name for name, layout in GGML_TYPES.items() if not layout.minima]


def matrix(rows: int = 12, columns: int = 512, seed: int = 0) -> torch.Tensor:
    """Columns of uneven size and a few outliers, as trained weights have them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05 * (0.5 + torch.rand(columns, generator=generator))
    return weight * torch.where(torch.rand(rows, columns, generator=generator) < 0.01, 5.0, 1.0)


def config(name: str, **changes) -> RtnConfig:
    return RtnConfig(**(as_settings(name) | {"grid": name} | changes))


def lost(weight, record, importance=1.0) -> float:
    return float(((weight - record.dense()).square() * importance).sum())


@pytest.mark.parametrize("name", GGML_TYPES)
def test_a_search_pays_and_weighs_as_it_is_told(name):
    weight, importance = matrix(), torch.rand(512, generator=torch.Generator().manual_seed(1)) ** 3
    plain, searched, weighted = round_ggml(weight, name, search=False), round_ggml(weight, name), round_ggml(weight, name, importance)
    assert lost(weight, searched) < 0.95 * lost(weight, plain)
    assert lost(weight, weighted, importance) < lost(weight, searched, importance)
    assert lost(weight, searched) < lost(weight, weighted)
    assert torch.equal(nearest_codes(weight, searched), searched.codes_OI()), "the codes are the nearest ones"


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_no_worse_than_ggufs_own_rounding(name):
    kind, weight = gguf.GGMLQuantizationType[name.upper()], matrix()
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))
    assert lost(weight, round_ggml(weight, name)) < float((weight - theirs).square().sum())


@pytest.mark.parametrize("name", GGML_TYPES)
def test_zeros_and_extremes_are_representable(name):
    weight = matrix()
    weight[0], weight[1], weight[2, :256] = 0.0, weight[1] * 1e-9, 0.0
    weight[3], weight[4], weight[5] = 0.25, -0.25, weight[5] * 1e5
    record = round_ggml(weight, name)
    assert bool(torch.isfinite(record.dense()).all()) and bool((record.scales_OG() != 0).all())
    assert not record.dense()[0].any() and not record.dense()[2, :256].any()
    assert torch.allclose(record.dense()[3:5], weight[3:5], atol=0.02)
    if record.symmetric:
        holes = matrix().where(matrix(seed=3) > 0, 0)
        assert not round_ggml(holes, name).dense()[holes == 0].any()


@pytest.mark.parametrize("name", ["q5_1", "q2_k", "q6_k"])
def test_a_row_does_not_hang_on_its_neighbours(name, monkeypatch):
    weight = matrix(rows=21)
    whole = round_ggml(weight, name)
    for rows in (slice(0, 1), slice(4, 11)):
        alone = round_ggml(weight[rows], name)
        assert all(torch.equal(part, to_tensors(whole)[key][rows]) for key, part in to_tensors(alone).items())
    monkeypatch.setattr("bitmend.compress.ggml_grids._PIECE", 1024)
    assert torch.equal(round_ggml(weight, name).dense(), whole.dense())


@pytest.mark.parametrize("columns, actual", [(512, "q4_k"), (576, "q5_0")])
def test_rows_that_are_no_multiple_of_256_get_llama_cpps_fallback(columns, actual):
    weight = matrix(columns=columns)
    record, _ = rtn(StoredWeight(DenseWeight(weight)), weight, NONE, config("q4_k"))
    assert isinstance(record.base, GgmlWeight) and record.base.type == actual == type_for("q4_k", columns)
    assert record.bits_per_weight() == GGML_TYPES[actual].block_bits / GGML_TYPES[actual].columns


def test_rows_that_no_block_divides_are_refused():
    with pytest.raises(ValueError, match="in_features 80 does not fit: a block of q6_k has 256 columns and of q8_0, which takes its place, 32"):
        type_for("q6_k", 80)
    with pytest.raises(ValueError, match="in_features 80 does not fit: a block of q4_1 has 32 columns; set grid: uniform"):
        type_for("q4_1", 80)


@pytest.mark.parametrize("name", GGML_TYPES)
def test_a_mask_survives_where_0_is_on_the_grid_and_is_refused_elsewhere(name):
    weight = matrix()
    pruned, _ = magnitude(StoredWeight(DenseWeight(weight)), weight, NONE, MagnitudeConfig(sparsity=0.5))
    dense, _ = rtn(StoredWeight(DenseWeight(weight)), weight, NONE, config(name))
    if name not in SIGNED:
        with pytest.raises(ValueError, match=f"{name} has no code for 0, since it has minima, .*: q4_0, q5_0, q8_0, q3_k, q6_k"):
            rtn(pruned, weight, NONE, config(name))
        with pytest.raises(ValueError, match=f"the minima of {name} leave no code for 0"):
            magnitude(dense, weight, NONE, MagnitudeConfig(sparsity=0.5))
        return
    for record in (rtn(pruned, weight, NONE, config(name))[0], magnitude(dense, weight, NONE, MagnitudeConfig(sparsity=0.5))[0]):
        mask = record.mask_OI()
        assert mask is not None and 0.4 < record.sparsity() < 0.6
        assert not record.base.dense()[~mask].any(), "the zeros are in the codes"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bits": 4}, "bits 4 contradicts grid q3_k, whose bits is 3: leave bits out, or set grid: uniform"),
        ({"group_size": 64}, "group_size 64 contradicts grid q3_k"),
        ({"symmetric": False}, "symmetric False contradicts grid q3_k"),
        ({"symmetric": False, "float_zeros": True}, "symmetric False contradicts"),
    ],
)
def test_settings_that_contradict_the_grid_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config("q3_k", **changes)


@pytest.mark.parametrize("name", ["q3_k", "q4_k"])
def test_requantized_on_the_same_grid(name):
    weight = matrix()
    record, _ = rtn(StoredWeight(DenseWeight(weight)), weight, NONE, config(name))
    again = requantize(record, weight, NONE, "rtn", "power")
    assert torch.equal(again.dense(), record.dense())
    other = with_codes(record.base, torch.zeros_like(record.base.codes_OI()))
    assert torch.equal(requantize(StoredWeight(other), weight, NONE, "rtn", "power").dense(), record.dense())


@pytest.mark.parametrize("method", ["loftq", "qera_exact", "caldera", "cloq", "best"])
def test_decompositions_stay_on_the_grid_and_lose_less(method):
    case = layer(rows=24, columns=256, dtype=torch.float32)
    start, _ = rtn(StoredWeight(DenseWeight(case.weight_OI)), case.weight_OI, case.statistics, config("q2_k"))
    row = DECOMPOSE[method]
    settings = row.defaults | {"rank": 4} | ({"iterations": 2} if "iterations" in row.defaults else {})
    actual, _ = row.function(start, case.weight_OI, case.statistics, row.config(**settings))
    assert isinstance(actual.base, GgmlWeight) and actual.base.type == "q2_k" and actual.low_rank is not None
    assert case.error(actual.dense()) < case.error(start.dense())
