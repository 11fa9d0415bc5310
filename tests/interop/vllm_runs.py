"""Run by the environment that build_vllm.sh makes: vLLM generates greedily from a directory, with an adapter or without. Knows nothing of ours
but the files.

    python vllm_runs.py JOB.json SAID.json    {"directory", "adapter" or null, "prompt": token ids, "new_tokens"}
"""

# pyright: reportMissingImports=false
import json
import sys
from typing import Any


def generate(job: dict[str, Any]) -> list[int]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    adapter = job["adapter"]
    model = LLM(model=job["directory"], dtype="bfloat16", enforce_eager=True, enable_lora=adapter is not None, max_model_len=128, gpu_memory_utilization=0.2)
    asked = SamplingParams(temperature=0.0, max_tokens=job["new_tokens"], ignore_eos=True)
    request = None if adapter is None else LoRARequest("adapter", 1, adapter)
    (answer,) = model.generate({"prompt_token_ids": job["prompt"]}, asked, lora_request=request)
    return list(answer.outputs[0].token_ids)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        said = generate(json.load(file))
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(said, file)
