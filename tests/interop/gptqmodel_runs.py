"""Run by the environment that `make rivals` makes: GPTQModel quantizes a dense model and writes a GPTQ checkpoint. Knows nothing of ours
but the files.

    python gptqmodel_runs.py JOB.json SAID.json    {"dense", "calibration", "output", "bits", "group_size", "batch_size"}
"""

# pyright: reportMissingImports=false
import json
import os
import resource
import sys
import time
from typing import Any


def quantize(job: dict[str, Any]) -> dict[str, Any]:
    """Asymmetric, all else its own choice, the dtype that it computes in included."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores its own choice is one, which it then refuses
    import gptqmodel
    from gptqmodel import GPTQModel, QuantizeConfig
    from safetensors.torch import load_file

    ids = load_file(job["calibration"])["ids"]
    windows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    began = time.perf_counter()
    model = GPTQModel.load(job["dense"], QuantizeConfig(bits=job["bits"], group_size=job["group_size"], sym=False, device="cpu"))
    dtype = str(next(model.model.parameters()).dtype).removeprefix("torch.")
    model.quantize(windows, batch_size=job["batch_size"])
    model.save(job["output"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"version": gptqmodel.__version__, "seconds": time.perf_counter() - began, "peak_bytes": peak, "dtype": dtype}


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        said = quantize(json.load(file))
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(said, file)
