"""Memory that runs out, on the card and on the host: one line with the stage, the numbers and settings that want less; nothing is lost."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitmend.pipelines.cli import explain
from bitmend.pipelines.devices.compute import Compute
from bitmend.pipelines.devices.shortage import shortage
from bitmend.pipelines.errors import OutOfMemoryError
from bitmend.pipelines.recipes.recipe import resolve
from bitmend.pipelines.run import runner

from .pretended import pretended_cuda

STAGES = "[{quantize: {method: rtn}}, {recover: {method: lora, rank: 2, steps: 2, batch_size: 32, seq_len: 128, eval_every: 2}}]"


def test_a_step_that_does_not_fit_the_card(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    """recover is stopped by its activations, what was before it stays, and with the advice taken the same run ends."""
    path, place = tmp_path / "small.yaml", tmp_path / "run"
    path.write_text(
        f"{{stages: {STAGES}, calibration: {{samples: 2, seq_len: 64}}, evaluation: {{seq_len: 64, windows: 2}}, dtype: float32}}"
    )
    options = {"model": str(small_model), "data": str(small_text)}
    with pretended_cuda(total_memory=40 << 20), pytest.raises(OutOfMemoryError) as caught:
        runner.run(resolve(str(path), options=options), place, device="cuda", page=False)
    code, line = explain(caught.value)
    assert code == 5 and line.startswith("recover: out of device memory: ") and "of 0.0 GB are free" in line
    assert "--set recover.batch_size=16, --set recover.accumulation=2 (the same updates)" in line and "what is finished is kept" in line
    made = sorted(entry.name for entry in (place / "stages").iterdir() if "quantize" in entry.name)
    assert len(made) == 2, "the stage before and its metrics"
    sets = ["recover.batch_size=2", "recover.gradient_checkpointing=true"]
    with pretended_cuda(total_memory=40 << 20):
        record = runner.run(resolve(str(path), options=options, sets=sets), place, device="cuda", page=False)
    assert record.stages[-1].stage == "recover"


@pytest.mark.parametrize("error, expected", [
    (MemoryError(), "quantize: out of memory: an allocation failed"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000000000 bytes."),
     "quantize: out of memory: 8.00 GB more were needed"),
])  # fmt: skip
def test_the_host_runs_out(error: Exception, expected: str) -> None:
    spec = SimpleNamespace(name="quantize", config=SimpleNamespace(batch_size=8))
    with (
        pytest.raises(OutOfMemoryError, match="--set quantize.batch_size=4") as caught,
        shortage("quantize", spec, Compute(torch.device("cpu"))),
    ):
        raise error
    assert str(caught.value).startswith(expected) and "GB are free" in str(caught.value)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), shortage("quantize", None, Compute(torch.device("cpu"))):
        raise RuntimeError("shapes do not match")
