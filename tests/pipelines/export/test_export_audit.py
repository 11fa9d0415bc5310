"""What an export may not lose is looked for in what was written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.packing import pack_codes
from bitmend.compress.weights import DenseWeight, StoredWeight, UniformWeight
from bitmend.pipelines import formats
from bitmend.pipelines.errors import QualityError
from bitmend.pipelines.export import exporting
from bitmend.pipelines.export.audit import difference
from bitmend.pipelines.formats.checkpoint import Checkpoint, Lazy

NAME = "model.layers.0.mlp.up_proj"


def filled(record: StoredWeight) -> StoredWeight:
    """A weight under the mask is no longer 0."""
    mask = record.mask_OI()
    assert mask is not None
    dense = record.base_dense()
    dense[tuple((~mask).nonzero()[0])] = 0.5
    return StoredWeight(DenseWeight(dense))


def moved(record: StoredWeight) -> StoredWeight:
    """A kept weight has another code."""
    assert isinstance(record.base, UniformWeight)
    mask, codes = record.mask_OI(), record.base.codes_OI().long()
    assert mask is not None
    at = tuple(mask.nonzero()[0])
    codes[at] = (codes[at] + 1) % (1 << record.base.bits)
    return replace(record, base=replace(record.base, codes=pack_codes(codes, record.base.bits)))


@pytest.mark.parametrize(
    ("stage", "name", "damage", "words"),
    [
        ("prune", "dense", filled, "1 of the 9728 weights that the mask holds at 0 are not 0"),
        ("quantize", "gptq", moved, "1 codes changed"),
    ],
)
def test_an_export_that_loses_is_found(
    stage: str, name: str, damage: Any, words: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = formats.write

    def damaging(format_: str, checkpoint: Checkpoint, output: Path, adapter: bool) -> list[str]:
        linears = {n: lambda n=n: damage(checkpoint.linears[n]) if n == NAME else checkpoint.linears[n] for n in checkpoint.linears}
        return plain(format_, replace(checkpoint, linears=Lazy(linears)), output, adapter)

    monkeypatch.setattr(formats, "write", damaging)
    with pytest.raises(QualityError, match=f"{NAME}: {words}; do not use it"):
        exporting.export(finished, name, tmp_path / "out", stage=stage)


def test_what_differs(finished: Path) -> None:
    from bitmend.pipelines.run import runner

    record = runner.last_artifact(finished, "quantize").stored(NAME)
    assert difference(record, record) is None and difference(record, record.dense()) is None
    coarse = replace(record.base, bits=2, codes=pack_codes(torch.zeros(record.shape, dtype=torch.long), 2))  # type: ignore[arg-type]
    assert difference(record.with_mask(None), StoredWeight(coarse)) == "its grid of 3 bits and 4 groups became 2 bits and 4"
