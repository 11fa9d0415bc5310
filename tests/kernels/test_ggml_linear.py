"""Matrices in ggml's block types on the kernels: as uniform grids where an operator has them, by name elsewhere."""

import pytest
import torch
from bitmend.compress.ggml_grids import round_ggml
from bitmend.compress.ggml_types import GGML_TYPES
from bitmend.compress.weights import GgmlWeight, StoredWeight
from bitmend.kernels.linear import bind, bind_group

from .test_linear import assert_close, by_definition

W = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)) * 0.05
X = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", ["auto", "cpu-int4", "cpu-int8", "dense", "reference"])
@pytest.mark.parametrize("name", GGML_TYPES)
def test_every_type_comes_out_as_its_definition_says(name, backend):
    stored = StoredWeight(round_ggml(W, name))
    truth = by_definition(stored, None, X)
    if backend.startswith("cpu") and not _holds(name, backend):
        with pytest.raises(ValueError, match="cannot hold this weight|no packed operator|groups of a multiple of 32|integer zero points"):
            bind(stored, backend=backend)
        return
    bound = bind(stored, backend=backend)
    assert_close(bound(X), truth)
    assert backend == "auto" or bound.backend == backend


def _holds(name: str, backend: str) -> bool:
    """torch's int4 operator reads four bits at most in groups of 32; bytes need a zero point that is an integer."""
    layout = GGML_TYPES[name]
    return layout.bits <= 4 and layout.group_size % 32 == 0 if backend == "cpu-int4" else not layout.minima


@pytest.mark.parametrize("name", ["q4_k", "q3_k"])
def test_matrices_of_one_input_are_one_product(name):
    members = [(StoredWeight(round_ggml(W[rows], name)), None) for rows in (slice(0, 64), slice(64, 96))]
    bound = bind_group(members, backend="dense")
    for y, (stored, _) in zip(bound(X), members, strict=True):
        assert_close(y, by_definition(stored, None, X))


def test_the_uniform_form_has_the_same_values_where_a_scale_is_0_too():
    small = torch.randint(0, 16, (4, 1, 32), generator=torch.Generator().manual_seed(2))
    small[:, :, 3] = 0
    codes = torch.randint(0, 4, (4, 256), generator=torch.Generator().manual_seed(3))
    base = GgmlWeight.from_codes(codes, torch.rand(4, 1) * 0.01, torch.rand(4, 1) * 0.01, small, "q2_k")
    assert torch.allclose(base.uniform().dense(), base.dense(), atol=1e-6)
    assert bool((base.scales_OG() == 0).any()) and bool(base.uniform().dense().isfinite().all())
