"""Masks: exact counts, also among ties; N:M in every group; rows alone for Wanda; what a mask does to each kind of weight."""

import pytest
import torch
from bitmend.compress.grids import UniformGrid
from bitmend.compress.masks import MagnitudeConfig, WandaConfig, keep_highest, magnitude_mask, masked_base, parse_pattern, wanda_mask
from bitmend.compress.rounding import round_normal_float, round_uniform
from bitmend.compress.sparsity import by_depth, by_outliers, hold_mean, outlier_share, whole_columns
from bitmend.compress.weights import DenseWeight, UniformWeight
from hypothesis import given, settings
from hypothesis import strategies as st

patterns = st.sampled_from(["1:2", "2:4", "4:8", "1:4", "3:4", "2:8", "7:16"])


def scores(seed: int, rows: int, columns: int, coarse: bool) -> torch.Tensor:
    """Normal numbers, or, `coarse`, full of ties."""
    numbers = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return numbers.round() if coarse else numbers


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**20), rows=st.integers(1, 6), columns=st.integers(1, 70), share=st.floats(0, 1), coarse=st.booleans())
def test_exactly_the_lowest_go_ties_included(seed, rows, columns, share, coarse):
    score, dropped = scores(seed, rows, columns, coarse), round(columns * share)
    mask = keep_highest(score, dropped)
    assert bool(((~mask).sum(-1) == dropped).all())
    for row in range(rows):
        gone, kept = score[row][~mask[row]], score[row][mask[row]]
        assert not len(gone) or not len(kept) or gone.max() <= kept.min()


@pytest.mark.parametrize("columns", [8, 33, 400])
def test_among_equals_the_lower_index_goes_first(columns):
    score = torch.ones(3, columns)
    score[1, 0] = 2.0
    mask = keep_highest(score, 5)
    assert mask[0].tolist() == [False] * 5 + [True] * (columns - 5)
    assert mask[1].tolist() == [True] + [False] * 5 + [True] * (columns - 6)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), pattern=patterns, groups=st.integers(1, 9), coarse=st.booleans())
def test_n_of_m_holds_in_every_group(seed, pattern, groups, coarse):
    kept, of = parse_pattern(pattern) or (0, 0)
    weight = scores(seed, 5, groups * of, coarse)
    for mask in (magnitude_mask(weight, 1 - kept / of, pattern), wanda_mask(weight, torch.rand(groups * of), 1 - kept / of, pattern)):
        assert bool((mask.view(5, -1, of).sum(-1) == kept).all())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**20), sparsity=st.floats(0, 0.99), coarse=st.booleans())
def test_wanda_drops_the_same_count_in_each_row_and_magnitude_in_the_matrix(seed, sparsity, coarse):
    weight = scores(seed, 6, 50, coarse)
    wanda = wanda_mask(weight, torch.rand(50, generator=torch.Generator().manual_seed(seed)), sparsity)
    assert bool(((~wanda).sum(-1) == round(50 * sparsity)).all())
    assert int((~magnitude_mask(weight, sparsity)).sum()) == round(300 * sparsity)


def test_wanda_ranks_by_weight_times_norm():
    weight, norm = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([10.0, 1.0, 1.0, 0.1])
    assert wanda_mask(weight, norm, 0.5).tolist() == [[True, False, True, False]]
    assert magnitude_mask(weight, 0.5).tolist() == [[False, False, True, True]]


def test_what_an_earlier_mask_dropped_goes_first():
    weight = torch.tensor([[9.0, 8.0, 1.0, 2.0]])
    allowed = torch.tensor([[False, True, True, True]])
    assert magnitude_mask(weight, 0.5, allowed_OI=allowed).tolist() == [[False, True, False, True]]
    assert wanda_mask(weight, torch.ones(4), 0.5, "2:4", allowed).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_kind_of_base_becomes_exactly_0_where_masked_and_keeps_the_rest(symmetric):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    mask = torch.rand(6, 64, generator=torch.Generator().manual_seed(2)) < 0.5
    for base in (DenseWeight(weight.bfloat16()), round_uniform(weight, UniformGrid(3, 32, symmetric)), round_normal_float(weight, 3, 32)):
        actual = masked_base(base, mask)
        assert type(actual) is type(base)
        assert torch.equal(actual.dense(), base.dense().where(mask, 0))
    scattered = torch.randperm(64, generator=torch.Generator().manual_seed(3)) // 32
    zeros = None if symmetric else torch.randint(1, 8, (6, 2))
    base = UniformWeight.from_codes(torch.randint(0, 8, (6, 64)), torch.rand(6, 2), zeros, 3, 32, scattered)
    assert torch.equal(masked_base(base, mask).dense(), base.dense().where(mask, 0))


def test_floating_zero_points_cannot_hold_a_mask():
    base = UniformWeight.from_codes(torch.ones(2, 8, dtype=torch.long), torch.ones(2, 1), torch.full((2, 1), 0.3), 4, 8)
    with pytest.raises(ValueError, match="floating zero points has no code for 0"):
        masked_base(base, torch.ones(2, 8, dtype=torch.bool))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"pattern": "2/4"}, 'choose "unstructured" or "N:M"'),
        ({"pattern": "4:4"}, 'choose "unstructured" or "N:M"'),
        ({"pattern": "1:4"}, "keeps 1 of 4, a sparsity of 0.75, not 0.5; set one to match"),
        ({"pattern": "2:4", "allocation": "depth"}, "needs pattern 'unstructured'"),
    ],
)
def test_contradictions_are_refused(settings_, message):
    for config in (MagnitudeConfig, WandaConfig):
        with pytest.raises(ValueError, match=message):
            config(**settings_)


def test_a_pattern_must_divide():
    with pytest.raises(ValueError, match="in_features 10 is not a multiple of 4; pattern 2:4 cannot be met"):
        magnitude_mask(torch.randn(2, 10), 0.5, "2:4")


@settings(max_examples=80, deadline=None)
@given(
    offsets=st.lists(st.floats(-0.5, 0.5), min_size=1, max_size=30),
    mean=st.floats(0, 0.99),
    sizes=st.lists(st.integers(1, 10**7), min_size=30, max_size=30),
)
def test_the_mean_over_all_weights_is_kept(offsets, mean, sizes):
    sizes = sizes[: len(offsets)]
    actual = hold_mean(offsets, mean, sizes)
    assert all(0 <= value <= 0.99 for value in actual)
    assert sum(v * s for v, s in zip(actual, sizes, strict=True)) / sum(sizes) == pytest.approx(mean, abs=1e-9)


def test_depth_rises_and_outliers_are_spared():
    depth = by_depth(5, 0.5, 0.1)
    assert depth == pytest.approx([0.4, 0.45, 0.5, 0.55, 0.6])
    assert by_depth(1, 0.3) == pytest.approx([0.3])
    actual = by_outliers([0.01, 0.03, 0.02], 0.5, 0.08)
    assert actual[0] > actual[2] > actual[1]
    assert max(actual) - min(actual) == pytest.approx(0.16)
    assert by_outliers([0.2, 0.2], 0.5) == pytest.approx([0.5, 0.5])
    with pytest.raises(ValueError, match=r"mean sparsity 1\.5 must lie in"):
        by_depth(2, 1.5)
    with pytest.raises(ValueError, match="2 layers and 1 sizes"):
        hold_mean([0.0, 0.0], 0.5, [3])


def test_outlier_share_counts_what_stands_out():
    weight = torch.ones(4, 25)
    weight[0, 0] = 1000.0
    assert outlier_share([(weight, torch.ones(25))]) == pytest.approx(1 / 100)
    norm = torch.ones(25)
    norm[0] = 1e6
    assert outlier_share([(torch.ones(4, 25), norm)]) == pytest.approx(4 / 100)


def test_all_matrices_of_a_block_are_held_against_one_mean():
    quiet, loud = torch.ones(4, 25), torch.full((2, 50), 100.0)
    assert outlier_share([(quiet, torch.ones(25))]) == outlier_share([(loud, torch.ones(50))]) == 0
    assert outlier_share([(quiet, torch.ones(25)), (loud[:1, :5], torch.ones(5))]) == pytest.approx(5 / 105)


@settings(max_examples=80, deadline=None)
@given(matrices=st.lists(st.tuples(st.floats(0.2, 0.8), st.integers(4, 60)), min_size=1, max_size=12), rows=st.integers(1, 40))
def test_whole_columns_owe_at_most_half_a_column_in_the_end(matrices, rows):
    actual = whole_columns([sparsity for sparsity, _ in matrices], [(rows, columns) for _, columns in matrices])
    assert all(0 <= value < 1 and abs(value * c - round(value * c)) < 1e-9 for value, (_, c) in zip(actual, matrices, strict=True))
    owed = sum((sparsity - value) * rows * c for value, (sparsity, c) in zip(actual, matrices, strict=True))
    assert abs(owed) <= rows / 2 + 1e-6


def test_whole_columns_of_matrices_that_divide_are_what_was_asked_for():
    assert whole_columns([0.5, 0.25], [(3, 8), (5, 4)]) == [0.5, 0.25]
    assert whole_columns([0.5] * 4, [(2, 5)] * 4) == [0.4, 0.6, 0.4, 0.6]
