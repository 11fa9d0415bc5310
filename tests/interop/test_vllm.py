"""vLLM on a CPU, in the environment that `make interop` builds where the machine has AVX-512: the same greedy text as ours."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.pipelines.export import exporting
from bitmend.pipelines.run import runner
from bitmend.pipelines.run.opening import load

from ..pipelines.runs import chosen

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
SCRIPT = Path(__file__).parent / "vllm_runs.py"
AVX_512 = "avx512f" in Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").is_file() else False
CLOSE = 0.05
"""Between the two best logits: a step that any rounding may decide."""

pytestmark = [
    pytest.mark.interop,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not AVX_512, reason="vLLM's 4-bit kernel for the CPU needs AVX-512, which this machine lacks"),
    pytest.mark.skipif(AVX_512 and not PYTHON.is_file(), reason=f"vLLM's environment {PYTHON.parents[1].name} is missing; `make interop` builds it"),
]
GRID: dict[str, Any] = {"quantize": {"method": "rtn", "bits": 4, "group_size": 32, "symmetric": True}}
TERM: dict[str, Any] = {"decompose": {"method": "lqer", "rank": 8}}
SECTIONS: dict[str, Any] = {"calibration": {"samples": 2, "seq_len": 64}, "evaluation": {"seq_len": 64, "windows": 2}}


@pytest.mark.parametrize(("form", "adapter"), [("compressed-tensors", False), ("gptq", False), ("compressed-tensors", True), ("gptq", True)])
def test_vllm_writes_what_we_write(form: str, adapter: bool, tmp_path: Path, small_model: Path, small_text: Path) -> None:
    runner.run(chosen(tmp_path, small_model, small_text, [GRID, TERM] if adapter else [GRID], **SECTIONS), tmp_path / "run", device="cpu")
    exporting.export(tmp_path / "run", form, tmp_path / "out", adapter=adapter)
    prompt = [5, 80, 300, 41, 7]
    base, lora = (tmp_path / "out" / "base", str(tmp_path / "out" / "adapter")) if adapter else (tmp_path / "out", None)
    (tmp_path / "job.json").write_text(json.dumps({"directory": str(base), "adapter": lora, "prompt": prompt, "new_tokens": 24}))
    done = subprocess.run([PYTHON, SCRIPT, tmp_path / "job.json", tmp_path / "said.json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    model, ids = load(tmp_path / "run"), prompt
    for token in json.loads((tmp_path / "said.json").read_text()):
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0, -1].float().topk(2)
        if float(best.values[0] - best.values[1]) < CLOSE:
            break
        assert token == int(best.indices[0]), f"token {len(ids) - len(prompt)}"
        ids = [*ids, token]
    assert len(ids) > len(prompt), "the first step was no close call"
