"""What each of the four forms takes on disk, against the bytes of its tensors."""

import pytest
import torch
from bitmend.compress.base_weights import DenseWeight, GgmlWeight, NormalFloatWeight, UniformWeight, bits_of
from bitmend.compress.ggml_grids import round_ggml
from bitmend.compress.rounding import Nf4Config, RtnConfig, nf4, rtn
from bitmend.compress.statistics import InputStatistics, LayerStatistics
from bitmend.compress.weights import StoredWeight, to_tensors
from torch import Tensor


def matrix() -> Tensor:
    return torch.randn(8, 256, generator=torch.Generator().manual_seed(0))


def test_bits_of_counts_what_is_there() -> None:
    assert bits_of() == bits_of(None) == 0
    assert bits_of(torch.zeros(3, dtype=torch.float16), None, torch.zeros(2, dtype=torch.uint8)) == 3 * 16 + 2 * 8


@pytest.mark.parametrize("kind", [DenseWeight, UniformWeight, NormalFloatWeight, GgmlWeight])
def test_stored_bits_are_those_of_the_tensors(kind: type) -> None:
    dense, statistics = StoredWeight(DenseWeight(matrix())), LayerStatistics(InputStatistics(256, frozenset()))
    made = {
        DenseWeight: lambda: dense.base,
        UniformWeight: lambda: rtn(dense, matrix(), statistics, RtnConfig())[0].base,
        NormalFloatWeight: lambda: nf4(dense, matrix(), statistics, Nf4Config())[0].base,
        GgmlWeight: lambda: round_ggml(matrix(), "q4_k"),
    }[kind]()
    assert isinstance(made, kind) and made.shape == (8, 256) and made.dense().shape == (8, 256)
    assert made.stored_bits() == sum(t.numel() * t.element_size() * 8 for t in to_tensors(made).values())
