"""fuse with `integer_scales`: a second rounding that is measured where it is made, of matrices with rounded inputs alone, and off by default."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.integer_scales import exact_levels, reach
from bitmend.compress.weights import UniformWeight
from bitmend.pipelines.run import runner
from bitmend.pipelines.store.artifact import Artifact

from ..runs import chosen

pytestmark = pytest.mark.usefixtures("no_pages")

FEW: dict[str, Any] = {"calibration": {"samples": 2, "seq_len": 32}, "evaluation": {"seq_len": 64, "windows": 4}}
QUANTIZE: dict[str, Any] = {
    "quantize": {
        "method": "rtn", "bits": 4, "group_size": 32, "activations": {"bits": 8, "group_size": -1},
        "overrides": {"layers.0.*down": {"bits": 8}, "layers.1.*o_proj": {"activations": None}},
    }
}  # fmt: skip


def two_levels(artifact: Artifact) -> set[str]:
    """Names of the matrices whose scales are exactly whole numbers times one float an output."""
    actual = set()
    for name in artifact.linears:
        base = artifact.stored(name).base
        assert isinstance(base, UniformWeight)
        size = base.in_features // base.groups
        if base.bits <= 4 and exact_levels(base.scales, reach(base.codes_OI(), base.zeros_OG(), size)) is not None:
            actual.add(name)
    return actual


def test_the_second_rounding_is_measured_where_it_is_made(tmp_path: Path, small_model: Path, small_text: Path) -> None:
    perplexity = {}
    for integer_scales in (False, True):
        fuse = {"fuse": {"backend": "reference", "integer_scales": integer_scales}}
        made = runner.run(chosen(tmp_path, small_model, small_text, [QUANTIZE, fuse], **FEW), tmp_path / "run", device="cpu")
        perplexity[integer_scales] = made.stages[-1].perplexity
        before, after = (runner.last_artifact(tmp_path / "run", stage) for stage in ("quantize", "fuse"))
        blocks = {name for name in before.linears if ".layers." in name}
        wide, plain = ({name for name in blocks if part in name} for part in ("layers.0.mlp.down_proj", "layers.1.self_attn.o_proj"))
        assert len(wide) == len(plain) == 1 and not two_levels(before)
        if not integer_scales:
            assert perplexity[False] == pytest.approx(made.stages[-2].perplexity, rel=1e-3)
            assert not two_levels(after) and not any("whole numbers" in note for note in made.stages[-1].notes)
            continue
        assert two_levels(after) == blocks - wide - plain
        for name in wide | plain:
            assert torch.equal(after.stored(name).base.dense(), before.stored(name).base.dense())
        notes = made.stages[-1].notes
        assert notes[0].startswith(f"scales of {len(blocks) - 2} matrices are whole numbers times one float an output, which moved their weights by ")
        assert notes[1].startswith(f"{wide.pop()}: its scales stay as they are: 8 bits")
    assert perplexity[True] != perplexity[False] and perplexity[True] == pytest.approx(perplexity[False], rel=0.1)
