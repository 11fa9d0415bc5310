"""Scales solved anew against least squares over the very inputs, row by row; codes, zeros, masks and bytes stay."""

from dataclasses import replace

import pytest
import torch
from bitmend.compress.gptq import GptqConfig, gptq
from bitmend.compress.refit import refit_scales
from bitmend.compress.statistics import InputStatistics, LayerStatistics
from bitmend.compress.weights import DenseWeight, StoredWeight, UniformWeight
from torch import Tensor

ROWS, COLUMNS, SIZE = 6, 96, 32


class Case:
    """x as the compressed model gives it, x′ as the dense one does."""

    def __init__(self, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        mix = torch.eye(COLUMNS) + 0.2 * torch.randn(COLUMNS, COLUMNS, generator=draw)
        self.x_TI = torch.randn(500, COLUMNS, generator=draw) @ mix
        self.dense_TI = self.x_TI + 0.3 * torch.randn(500, COLUMNS, generator=draw)
        self.weight_OI = 0.05 * torch.randn(ROWS, COLUMNS, generator=draw)
        self.mask_OI = torch.rand(ROWS, COLUMNS, generator=draw) < 0.6
        inputs = InputStatistics(COLUMNS, frozenset({"second_moment", "cross_moment"}))
        inputs.update(self.x_TI, self.dense_TI)
        self.statistics = LayerStatistics(inputs)

    def record(self, **settings: object) -> UniformWeight:
        start = StoredWeight(DenseWeight(self.weight_OI))
        base = gptq(start, self.weight_OI, self.statistics, GptqConfig(**{"bits": 3, "group_size": SIZE} | settings))[0].base
        assert isinstance(base, UniformWeight)
        return base

    def wanted(self, lean: float) -> Tensor:
        """[T, O]: what the matrix gives for inputs between x and x′."""
        return ((1 - lean) * self.x_TI + lean * self.dense_TI) @ self.weight_OI.T

    def refit(self, base: UniformWeight, lean: float, mask_OI: Tensor | None = None) -> UniformWeight:
        inputs = self.statistics.inputs
        cross_II = (1 - lean) * inputs.second_moment_II + lean * inputs.cross_moment_II
        return refit_scales(base, self.weight_OI, inputs.second_moment_II, cross_II, mask_OI)


def twin(case: Case, base: UniformWeight, lean: float, mask_OI: Tensor | None = None) -> Tensor:
    """Least squares on 500 rows of inputs, one output at a time."""
    columns = torch.arange(COLUMNS) // SIZE if base.group_index is None else base.group_index.long()
    levels = (base.codes_OI().float() - base.zeros_OG()[:, columns]).double()
    if mask_OI is not None:
        levels *= mask_OI
    actual = []
    for row, wanted in zip(levels, case.wanted(lean).double().T, strict=True):
        parts = torch.stack([(case.x_TI.double() * row * (columns == g)).sum(1) for g in range(base.groups)], 1)
        actual.append(torch.linalg.lstsq(parts, wanted.unsqueeze(1)).solution.squeeze(1))
    return torch.stack(actual)


@pytest.mark.parametrize("lean", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("settings", [{}, {"symmetric": True}, {"float_zeros": True}, {"act_order": "full"}, {"bits": 2}])
def test_the_scales_are_those_of_least_squares_and_all_else_stays(settings: dict[str, object], lean: float) -> None:
    case = Case()
    base = case.record(**settings)
    actual = case.refit(base, lean)
    assert torch.allclose(actual.scales.double(), twin(case, base, lean), rtol=2e-3)
    assert not torch.equal(actual.scales, base.scales)
    assert torch.equal(actual.codes, base.codes) and torch.equal(actual.zeros_OG(), base.zeros_OG())
    assert actual.stored_bits() == base.stored_bits() and actual.scales.dtype == base.scales.dtype


def test_a_masked_weight_has_no_say() -> None:
    case = Case()
    base = case.record()
    actual = case.refit(base, 0.5, case.mask_OI)
    assert torch.allclose(actual.scales.double(), twin(case, base, 0.5, case.mask_OI), rtol=2e-3)


def test_gptq_with_refit_errs_less_toward_what_it_leans_to() -> None:
    case = Case()
    plain = case.record()
    for lean in (0.0, 0.5, 1.0):
        refitted = case.record(refit=lean)
        assert torch.equal(refitted.codes, plain.codes)
        errors = [float((case.x_TI @ b.dense().T - case.wanted(lean)).square().mean()) for b in (plain, refitted)]
        assert errors[1] < errors[0]


def test_the_error_that_is_reported_is_that_of_the_record() -> None:
    case, start = Case(), StoredWeight(DenseWeight(Case().weight_OI))
    record, metrics = gptq(start, case.weight_OI, case.statistics, GptqConfig(bits=3, group_size=SIZE, refit=0.0))
    error = float(((case.weight_OI - record.dense()) @ case.x_TI.T).square().sum()) / len(case.x_TI)
    assert metrics["squared_error"] == pytest.approx(error, rel=1e-3)


def test_with_smoothed_inputs_the_base_is_fitted_to_what_it_sees() -> None:
    case = Case()
    smooth = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(3)) + 0.5
    start = StoredWeight(DenseWeight(case.weight_OI * smooth), smooth=smooth)
    config = GptqConfig(bits=3, group_size=SIZE)
    errors = []
    for chosen in (config, replace(config, refit=1.0)):
        record, _ = gptq(start, case.weight_OI, case.statistics, chosen)
        errors.append(float((case.x_TI @ record.dense().T - case.wanted(1.0)).square().mean()))
    assert errors[1] < errors[0]


def test_a_scale_that_nothing_depends_on_stays() -> None:
    case = Case()
    case.x_TI[:, :SIZE] = 0  # the first group is dead
    inputs = InputStatistics(COLUMNS, frozenset({"second_moment", "cross_moment"}))
    inputs.update(case.x_TI, case.dense_TI)
    case.statistics = LayerStatistics(inputs)
    base = case.record()
    actual = case.refit(base, 1.0)
    assert torch.equal(actual.scales[:, 0], base.scales[:, 0])
    assert bool(torch.isfinite(actual.scales).all()) and not torch.equal(actual.scales[:, 1:], base.scales[:, 1:])


