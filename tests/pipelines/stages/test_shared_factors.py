"""Shared right factors through the whole pipeline: stored and counted once, read back, trained as one, bound as one product, exported apart."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.sharing import holder_of
from bitmend.pipelines.export.exporting import export
from bitmend.pipelines.models.loading import whole_model
from bitmend.pipelines.planning.plan import predict
from bitmend.pipelines.run import runner
from bitmend.pipelines.run.opening import last_artifact
from bitmend.pipelines.store.artifact import Artifact

from ..runs import chosen

STAGES: list[dict[str, Any]] = [
    {"quantize": {"method": "rtn", "bits": 3, "group_size": 32}},
    {"decompose": {"method": "qera_exact", "rank": 8, "shared": True}},
    {"recover": {"method": "lora", "steps": 12, "batch_size": 2, "seq_len": 64, "learning_rate": 2e-3, "warmup": 2, "eval_every": 6}},
    {"fuse": {"backend": "auto"}},
]


def holders(artifact: Artifact) -> dict[str, str | None]:
    """Linear of the first block → whose right factor it reads."""
    first = {name: holder_of(described) for name, described in artifact.linears.items() if ".0." in name}
    return {name.rpartition(".")[2]: None if holder is None else holder.rpartition(".")[2] for name, holder in first.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_model: Path, small_text: Path) -> Path:
    place = tmp_path_factory.mktemp("shared")
    recipe = chosen(
        place, small_model, small_text, STAGES, calibration={"samples": 8, "seq_len": 64}, evaluation={"seq_len": 64, "windows": 4}
    )
    expected = predict(recipe)
    made = runner.run(recipe, place / "run")
    for row, stage in zip(expected["stages"], made.stages, strict=True):
        assert row["total_bytes"] == pytest.approx(stage.total_bytes, rel=0.01), row
        if stage.bits_per_weight is not None:
            assert row["bits_per_weight"] == pytest.approx(stage.bits_per_weight, rel=0.002), row
    return place / "run"


SHARED = {
    "q_proj": None,
    "k_proj": "q_proj",
    "v_proj": "q_proj",
    "o_proj": None,
    "gate_proj": None,
    "up_proj": "gate_proj",
    "down_proj": None,
}


def test_one_tensor_is_on_disk_and_all_read_it(run: Path) -> None:
    artifact = last_artifact(run, "decompose")
    assert holders(artifact) == SHARED
    q, k = (f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj"))
    assert f"{q}.low_rank.down" in artifact.index and f"{k}.low_rank.down" not in artifact.index
    terms = artifact.stored(q).low_rank, artifact.stored(k).low_rank
    assert terms[0] is not None and terms[1] is not None
    assert torch.equal(terms[0].factors()[1], terms[1].factors()[1])
    # the record's bits are the files': every tensor of a block, once
    stored = sum(artifact.stored(name).stored_bits() for name in artifact.linears)
    assert stored == sum(
        8 * artifact.stored_bytes(name) for name in artifact.index if any(name.startswith(f"{n}.") for n in artifact.linears)
    )


def test_recovery_trains_it_as_one(run: Path) -> None:
    before, after = (last_artifact(run, stage) for stage in ("decompose", "recover"))
    assert holders(after) == SHARED
    q, k = (f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj"))
    assert not torch.equal(after.tensor(f"{q}.low_rank.down"), before.tensor(f"{q}.low_rank.down"))
    assert not torch.equal(after.tensor(f"{k}.low_rank.up"), before.tensor(f"{k}.low_rank.up"))
    made = runner.record(run).stages
    assert made[3].total_bytes == made[2].total_bytes


def test_kernels_project_once(run: Path) -> None:
    fused, plain = (whole_model(last_artifact(run, stage), torch.device("cpu"), torch.float32).model for stage in ("fuse", "recover"))
    ids = torch.arange(40).view(1, 40)
    with torch.no_grad():
        assert torch.allclose(fused(ids).logits, plain(ids).logits, atol=2e-2)


def test_an_adapter_holds_a_factor_for_each_and_says_so(run: Path, tmp_path: Path) -> None:
    report = export(run, "dense", tmp_path / "out", stage="recover", adapter=True)
    assert any("12 linears share another's right factor here; a PEFT adapter stores one for each" in note for note in report["notes"]), (
        report
    )
