"""Blocks of ggml: what `gguf` reads of our bytes is what our records say, and bytes of others come back as they were."""

import math
import re

import numpy as np
import pytest
import torch
from bitmend.compress.ggml_types import GGML_TYPES
from bitmend.compress.weights import GgmlWeight, StoredWeight
from bitmend.pipelines.formats.ggml_blocks import bytes_per_row, pack, unpack
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf import quants as reference


def gguf_type(name: str) -> GGMLQuantizationType:
    return GGMLQuantizationType[name.upper()]


def drawn(name: str, rows: int = 5, blocks: int = 3, seed: int = 0) -> GgmlWeight:
    """Every part of a record at random over its whole range."""
    layout, generator = GGML_TYPES[name], torch.Generator().manual_seed(seed)

    def integers(bits: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)

    codes = integers(layout.bits, rows, blocks * layout.columns)
    minima = torch.randn(rows, blocks, generator=generator) if layout.minima else None
    small = integers(layout.scale_bits, rows, blocks, layout.small_codes) if layout.small_codes else None
    return GgmlWeight.from_codes(codes, torch.randn(rows, blocks, generator=generator) * 0.01, minima, small, name)


@pytest.mark.parametrize("name", GGML_TYPES)
def test_gguf_reads_our_bytes_as_the_record_says(name):
    record = drawn(name)
    read = reference.dequantize(pack(record).numpy(), gguf_type(name))
    assert read.dtype == np.float32
    assert np.array_equal(read.view(np.uint32), record.dense().numpy().view(np.uint32))


@pytest.mark.parametrize("name", GGML_TYPES)
def test_any_bytes_come_back(name):
    """Of a file somebody else wrote: every byte of codes and small codes is one of ours, and the floats are finite."""
    layout, columns = GGML_TYPES[name], 3 * GGML_TYPES[name].columns
    blocks = torch.randint(0, 256, (4, bytes_per_row(name, columns)), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    with np.errstate(all="ignore"):
        read = reference.dequantize(blocks.numpy(), gguf_type(name))
    record = unpack(blocks, name, (4, columns))
    assert torch.equal(pack(record), blocks)
    assert np.array_equal(np.isfinite(read), torch.isfinite(record.dense()).numpy())
    assert np.array_equal(read[np.isfinite(read)], record.dense().numpy()[np.isfinite(read)])
    assert record.shape == (4, columns) and record.groups == columns // layout.group_size


@pytest.mark.parametrize("name", GGML_TYPES)
def test_a_record_takes_the_bytes_of_the_file(name):
    columns, size = GGML_QUANT_SIZES[gguf_type(name)]
    record = drawn(name, rows=7, blocks=1)
    assert pack(record).shape == (7, size) and columns == record.in_features
    assert StoredWeight(record).bits_per_weight() == size * 8 / columns == GGML_TYPES[name].block_bits / columns
    assert math.prod(record.codes.shape) * 4 < pack(record).numel()


def test_what_is_no_whole_number_of_blocks_is_refused():
    with pytest.raises(ValueError, match=re.escape("in_features 576 is not a multiple of the 256 columns of a block of q4_k")):
        bytes_per_row("q4_k", 576)
    with pytest.raises(ValueError, match=re.escape("q4_k of 2 × 256 takes 288 bytes, got 287 of torch.uint8")):
        unpack(torch.zeros(287, dtype=torch.uint8), "q4_k", (2, 256))
    with pytest.raises(ValueError, match=r"q6_k of 1 × 256: needs .*'small codes': \(1, 1, 16\)"):
        GgmlWeight.from_codes(torch.zeros(1, 256, dtype=torch.uint8), torch.ones(1, 1), None, None, "q6_k")
