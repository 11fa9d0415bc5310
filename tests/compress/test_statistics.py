"""Statistics: a stream in pieces equals one look at everything; only what a method needs is there; bad numbers are named."""

import pytest
import torch
from bitmend.compress.statistics import NEEDS, InputStatistics

INPUT_NEEDS = NEEDS - {"fisher"}


def stream(features: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, features, generator=generator) * torch.rand(features, generator=generator)
    return x, x + 0.1 * torch.randn(60, features, generator=generator)


@pytest.mark.parametrize("features", [1, 96, 300, 520])
def test_pieces_add_up_to_the_definition(features):
    x, dense = stream(features)
    actual = InputStatistics(features, INPUT_NEEDS, max_samples=25)
    for part, other in zip(x.split([10, 0, 33, 17]), dense.split([10, 0, 33, 17]), strict=True):
        actual.update(part.view(1, -1, features), other.view(1, -1, features))
    exact, exact_dense = x.double(), dense.double()
    assert actual.tokens == 60
    assert torch.allclose(actual.second_moment_II.double(), exact.T @ exact / 60, atol=1e-6)
    assert torch.equal(actual.second_moment_II, actual.second_moment_II.T)
    assert torch.allclose(actual.cross_moment_II.double(), exact_dense.T @ exact / 60, atol=1e-6)
    assert torch.allclose(actual.norm_I.double(), exact.norm(dim=0), rtol=1e-5)
    assert torch.equal(actual.absmax_I, x.abs().amax(0))
    assert torch.allclose(actual.absmean_I.double(), exact.abs().mean(0), rtol=1e-5)
    assert actual.samples_TI is not None
    assert torch.equal(actual.samples_TI, x[:25])


def test_statistics_added_are_the_sums_of_their_parts_in_order_and_the_first_samples():
    x, dense = stream(300)
    parts = []
    for part, other in zip(x.split(15), dense.split(15), strict=True):
        parts.append(InputStatistics(300, INPUT_NEEDS, max_samples=25))
        parts[-1].update(part, other)
    total = InputStatistics(300, INPUT_NEEDS, max_samples=25)
    total.factors["old"] = 1
    for part in (InputStatistics(300, INPUT_NEEDS, max_samples=25), *parts):
        total.add(part)
    assert total.tokens == 60 and not total.factors
    for name in ("abs_sum_I", "moment_sum_II", "cross_sum_II"):
        first, *others = (getattr(part, name) for part in parts)
        for other in others:
            first = first + other
        assert torch.equal(getattr(total, name), first), name
    assert torch.equal(total.absmax_I, x.abs().amax(0))
    assert total.samples_TI is not None and torch.equal(total.samples_TI, x[:25])
    assert parts[0].moment_sum_II is not None and torch.allclose(parts[0].moment_sum_II.triu(), (x[:15].T @ x[:15]).triu(), atol=1e-5), "left as it was"
    with pytest.raises(ValueError, match=r"\(4, \[\], 512\).*cannot be added to those of \(300"):
        total.add(InputStatistics(4, frozenset()))


def test_norms_are_the_same_with_and_without_the_moment():
    x, _ = stream(70)
    plain, full = InputStatistics(70, frozenset()), InputStatistics(70, frozenset({"second_moment"}))
    plain.update(x)
    full.update(x)
    assert torch.allclose(plain.norm_I, full.norm_I, rtol=1e-6)


def test_half_precision_inputs_are_summed_in_float32():
    x, _ = stream(16)
    half, full = InputStatistics(16, frozenset({"second_moment"})), InputStatistics(16, frozenset({"second_moment"}))
    half.update(x.bfloat16())
    full.update(x.bfloat16().float())
    assert torch.equal(half.second_moment_II, full.second_moment_II)


@pytest.mark.parametrize("name", ["second_moment", "cross_moment", "absmax", "absmean"])
def test_what_was_not_asked_for_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} was not collected; a method names it in its needs"):
        getattr(InputStatistics(4, frozenset({"norms"})), f"{name}_II" if "moment" in name else f"{name}_I")


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match=r"unknown statistics \['kurtosis'\]; known are"):
        InputStatistics(4, frozenset({"kurtosis"}))
    with pytest.raises(ValueError, match="cross_moment needs the dense model's inputs"):
        InputStatistics(4, frozenset({"cross_moment"})).update(torch.ones(1, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("needs", [frozenset(), frozenset({"second_moment"}), INPUT_NEEDS])
def test_bad_numbers_are_named(bad, needs):
    actual = InputStatistics(8, needs)
    actual.update(torch.ones(3, 8), torch.ones(3, 8))
    assert actual.non_finite() is None
    actual.update(torch.full((1, 8), bad), torch.ones(1, 8))
    assert actual.non_finite() == "square_sum"


def test_an_update_forgets_what_was_derived():
    actual = InputStatistics(4, frozenset())
    actual.factors["anything"] = object()
    actual.update(torch.ones(1, 4))
    assert not actual.factors


def test_no_tokens_means_zeros_and_not_nan():
    actual = InputStatistics(4, INPUT_NEEDS)
    for tensor in (actual.norm_I, actual.absmean_I, actual.absmax_I, actual.second_moment_II, actual.cross_moment_II):
        assert bool((tensor == 0).all())


def test_no_memory_is_taken_before_a_token_arrives() -> None:
    """A mixture's idle experts: zeros when somebody asks, nothing until then."""
    idle = InputStatistics(6, frozenset({"second_moment", "cross_moment", "absmax", "absmean"}))
    idle.update(torch.zeros(0, 6), torch.zeros(0, 6))
    assert not any(isinstance(value, torch.Tensor) for value in vars(idle).values())
    assert idle.tokens == 0 and idle.non_finite() is None
    for actual, shape in (
        (idle.norm_I, (6,)), (idle.absmax_I, (6,)), (idle.absmean_I, (6,)), (idle.second_moment_II, (6, 6)), (idle.cross_moment_II, (6, 6))
    ):  # fmt: skip
        assert actual.shape == shape and actual.dtype == torch.float32 and not actual.any()
    with pytest.raises(ValueError, match="absmax was not collected"):
        _ = InputStatistics(6, frozenset({"norms"})).absmax_I
