import pytest
import torch
from bitmend.compress import precision
from bitmend.compress.precision import has_short_units, matmuls, summed
from torch.testing import assert_close

CPU = torch.device("cpu")


@pytest.fixture
def asked(monkeypatch):
    """The precision of every product that `summed` makes, whatever units this machine has."""
    monkeypatch.setattr(precision, "has_short_units", lambda device: True)
    seen: list[str] = []

    class Seen(torch.Tensor):
        def __matmul__(self, other):
            seen.append(torch.get_float32_matmul_precision())
            return super().__matmul__(other)

    return seen, torch.ones(2, 3).as_subclass(Seen)


@pytest.mark.parametrize(("chosen", "expected"), [("auto", "medium"), ("highest", "highest"), ("high", "high"), ("medium", "medium")])
def test_what_is_summed_is_short_only_where_it_was_left_open(asked, chosen, expected):
    seen, left = asked
    with matmuls(chosen):
        assert torch.get_float32_matmul_precision() == ("highest" if chosen == "auto" else chosen)
        summed(left, torch.ones(3, 2))
        with matmuls("highest"):  # a teacher, within an update
            summed(left, torch.ones(3, 2))
        summed(left, torch.ones(3, 2))
    summed(left, torch.ones(3, 2))
    assert seen == [expected, "highest", expected, "highest"]


def test_a_machine_without_the_units_multiplies_in_float32(asked, monkeypatch):
    seen, left = asked
    monkeypatch.setattr(precision, "has_short_units", lambda device: False)
    with matmuls("auto"):
        summed(left, torch.ones(3, 2))
    assert seen == ["highest"]


def test_an_error_within_leaves_the_precision_as_it_was():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError, match="within"), matmuls("auto"):
        raise RuntimeError("within")
    assert torch.get_float32_matmul_precision() == before and not precision._sums_are_short


def test_group_sums_of_a_short_product_are_those_of_float32():
    draw = torch.Generator().manual_seed(0)
    gradient, x = torch.randn(512, 64, generator=draw), torch.randn(512, 128, generator=draw)
    with matmuls("auto"):
        actual = summed(gradient.T, x).view(64, 2, 64).sum(-1)
    exact = (gradient.T.double() @ x.double()).view(64, 2, 64).sum(-1)
    assert_close(actual, exact.float(), rtol=0, atol=float(exact.std()) * (2e-2 if has_short_units(CPU) else 1e-5))
