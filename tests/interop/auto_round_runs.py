"""Run by the environment that `make rivals` makes: AutoRound quantizes a dense model and writes a GPTQ checkpoint. Knows nothing of ours
but the files.

    python auto_round_runs.py JOB.json SAID.json    {"dense", "calibration", "output", "bits", "group_size", "iterations", "batch_size"}
"""

# pyright: reportMissingImports=false
import json
import resource
import sys
import time
from typing import Any


def quantize(job: dict[str, Any]) -> dict[str, Any]:
    """Asymmetric, its own rates, in the precision that it takes by itself."""
    import auto_round
    import torch
    from auto_round import AutoRound
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = load_file(job["calibration"])["ids"]
    model = AutoModelForCausalLM.from_pretrained(job["dense"], dtype=torch.float32)
    windows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    began = time.perf_counter()
    AutoRound(
        model, AutoTokenizer.from_pretrained(job["dense"]), bits=job["bits"], group_size=job["group_size"], sym=False,
        iters=job["iterations"], nsamples=len(ids), seqlen=ids.shape[1], batch_size=job["batch_size"], device_map="cpu",
        dataset=torch.utils.data.DataLoader(windows, batch_size=job["batch_size"]), enable_torch_compile=False,
    ).quantize_and_save(job["output"], format="auto_gptq")  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"version": auto_round.__version__, "seconds": time.perf_counter() - began, "peak_bytes": peak}


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        said = quantize(json.load(file))
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(said, file)
