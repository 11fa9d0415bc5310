"""Run by the environment that build.sh makes: auto-gptq loads or quantizes a checkpoint, and its logits go into a file.

    python auto_gptq_runs.py logits JOBS.json      [{"directory", "tokens", "output"}, …]
    python auto_gptq_runs.py quantize JOBS.json    [{"directory", "output", "bits", "group_size", "sym", "desc_act", "static_groups"}, …]

Several jobs a run, since importing takes longer than a tiny model. Knows nothing of ours but the files.
"""

# pyright: reportMissingImports=false
import json
import sys
from typing import Any


def load(directory: str) -> Any:
    """The quantized model in float32: scales are float16 in the file, the arithmetic is not."""
    import torch
    from auto_gptq import AutoGPTQForCausalLM

    model = AutoGPTQForCausalLM.from_quantized(
        directory, device="cpu", use_triton=False, disable_exllama=True, disable_exllamav2=True, use_marlin=False,
        inject_fused_attention=False, inject_fused_mlp=False, torch_dtype=torch.float32,
    )  # fmt: skip
    model = model.model.float()
    for module in model.modules():
        if hasattr(module, "scales") and isinstance(module.scales, torch.Tensor):
            module.scales = module.scales.float()
    return model.eval()


def logits(jobs: list[dict[str, Any]]) -> None:
    import torch
    from safetensors.torch import save_file

    for job in jobs:
        tokens = torch.tensor(job["tokens"])
        with torch.no_grad():
            save_file({"logits": load(job["directory"])(tokens).logits.float().contiguous()}, job["output"])


def quantize(jobs: list[dict[str, Any]]) -> None:
    """auto-gptq insists on a GPU in three places and needs it in none of them for a model this small."""
    import auto_gptq.modeling._base
    import torch
    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.modeling.auto import GPTQ_CAUSAL_LM_MODEL_MAP
    from transformers import AutoModelForCausalLM

    auto_gptq.modeling._base.CUDA_0 = torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    for job in jobs:
        settings = {name: job[name] for name in ("bits", "group_size", "sym", "desc_act", "static_groups")}
        plain = AutoModelForCausalLM.from_pretrained(job["directory"], torch_dtype=torch.float32)
        model = GPTQ_CAUSAL_LM_MODEL_MAP[plain.config.model_type](plain, False, BaseQuantizeConfig(**settings))
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(3, plain.config.vocab_size, (8, 1, 32), generator=generator)
        model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows], cache_examples_on_gpu=False)
        model.save_quantized(job["output"], use_safetensors=True)


if __name__ == "__main__":
    with open(sys.argv[2], encoding="utf-8") as file:
        work = json.load(file)
    {"logits": logits, "quantize": quantize}[sys.argv[1]](work)
