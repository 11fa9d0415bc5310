"""Columns rounded all at once leave what a loop over them leaves."""

import pytest
import torch
from bitmend.compress.settling import settle_columns_


def by_columns(weight_SO, unit_SS, scale_SO, zero_SO, low_SO, high_SO):
    """(values when each column's turn came, levels, errors), one column after the other in float64."""
    held, levels, errors = weight_SO.clone(), torch.zeros_like(weight_SO), torch.zeros_like(weight_SO)
    for i in range(len(held)):
        code = (held[i] / scale_SO[i] + zero_SO[i]).round().clamp(low_SO[i], high_SO[i])
        levels[i] = code - zero_SO[i]
        errors[i] = held[i] - levels[i] * scale_SO[i]
        held[i + 1 :] -= unit_SS[i, i + 1 :].unsqueeze(1) * errors[i]
    return held, levels, errors


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("columns", [1, 7, 24])
def test_settled_columns_are_those_of_the_loop(columns, masked):
    generator = torch.Generator().manual_seed(columns)
    weight, top = torch.randn(columns, 40, generator=generator, dtype=torch.float64), 7
    unit = torch.eye(columns, dtype=torch.float64) + 0.3 * torch.randn(columns, columns, generator=generator, dtype=torch.float64).triu(1)
    scale = 0.2 + torch.rand(columns, 40, generator=generator, dtype=torch.float64)
    zero = torch.full_like(scale, 3.0)
    keep = torch.rand(columns, 40, generator=generator) > 0.4 if masked else torch.ones(columns, 40, dtype=torch.bool)
    low, high = torch.where(keep, 0.0, zero), torch.where(keep, float(top), zero)
    held, levels, errors = by_columns(weight, unit, scale, zero, low, high)
    got, got_levels, got_errors = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
    settle_columns_(got, got_levels, got_errors, unit, top, scale, zero, *((low, high) if masked else ()))
    assert torch.equal(got_levels, levels)
    assert torch.allclose(got, held, atol=1e-10) and torch.allclose(got_errors, errors, atol=1e-10)
