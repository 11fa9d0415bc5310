"""The compressed model writes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.pipelines.errors import InputError, UsageError
from bitmend.pipelines.models.decoding import decode, graphable
from bitmend.pipelines.run import runner
from bitmend.pipelines.run.evaluate import evaluate
from bitmend.pipelines.run.generate import generate
from bitmend.pipelines.run.opening import load
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..families import tiny_model
from ..runs import Processes, stage_directory

PROMPT = "The city of"


def test_the_baseline_writes_what_transformers_writes(finished: Path, small_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    model: Any = AutoModelForCausalLM.from_pretrained(small_model)
    with torch.no_grad():
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    pieces = list(generate(stage_directory(finished, "baseline"), PROMPT, max_new_tokens=12, device="cpu"))
    assert "".join(pieces) == tokenizer.decode(expected, skip_special_tokens=True)
    assert len(pieces) > 1, "it comes piece by piece"


def test_a_fused_run_writes_and_repeats_itself(finished: Path) -> None:
    first, again = ("".join(generate(finished, PROMPT, max_new_tokens=16, device="cpu")) for _ in range(2))
    assert first == again and len(first.strip()) > 10


def test_more_tokens_than_positions(finished: Path, small_text: Path) -> None:
    with pytest.raises(
        UsageError, match=r"--max-new-tokens 600 and a prompt of \d tokens: 60\d tokens are above the 512 positions of this model"
    ):
        list(generate(finished, PROMPT, max_new_tokens=600, device="cpu"))
    with pytest.raises(UsageError, match=r"--seq-len: 513 tokens are above the 512 positions of this model; ask for at most 512"):
        evaluate(str(finished), eval_source=str(small_text), seq_len=513, windows=1, device="cpu")


def test_sampling_follows_its_seed(finished: Path) -> None:
    def written(seed: int) -> str:
        return "".join(generate(finished, PROMPT, max_new_tokens=16, temperature=1.5, seed=seed, device="cpu"))

    assert written(1) == written(1) != written(2)


def test_the_loaded_model_is_the_measured_one(finished: Path) -> None:
    model = load(finished)
    tokenizer = AutoTokenizer.from_pretrained(stage_directory(finished, "fuse"))
    ids = tokenizer("A short text to be scored by the model as it runs.", return_tensors="pt").input_ids
    dense = load(stage_directory(finished, "recover"))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-3, atol=1e-2)
    artifact = runner.last_artifact(finished)
    kinds = {type(model.get_submodule(name)).__name__ for name in artifact.linears}
    assert "Linear" not in kinds, "it runs on the kernels"


@pytest.mark.parametrize("warm", [False, True])
def test_one_recorded_token_after_another_is_what_generate_writes(finished: Path, warm: bool) -> None:
    """The loop of the CUDA graph, its recording replaced: by nothing, or by one that runs the step as warming up does."""
    model = load(finished)
    ids = AutoTokenizer.from_pretrained(stage_directory(finished, "fuse"))(PROMPT, return_tensors="pt").input_ids
    recorded = []

    def record(step: Any) -> Any:
        recorded.append(1)
        if warm:
            step()
        return step

    assert graphable(model, 32) is None
    with torch.inference_mode():
        tokens = list(decode(model, ids, 12, lambda logits: int(logits.argmax()), record))
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert tokens == expected.tolist() and len(recorded) == 1


def test_decoding_ends_with_the_models_end(finished: Path) -> None:
    model = load(finished)
    ids = torch.tensor([[1, 2, 3]])
    first, second, *_ = decode(model, ids, 8, lambda logits: int(logits.argmax()), lambda step: step)
    model.generation_config.eos_token_id = [second, -1] if second != first else first
    assert len(list(decode(model, ids, 8, lambda logits: int(logits.argmax()), lambda step: step))) == (2 if second != first else 1)


def test_a_cache_that_counts_in_python_takes_no_graph() -> None:
    assert "StaticSlidingWindowLayer" in str(graphable(tiny_model("gemma3_text"), 32))
    assert graphable(tiny_model("gpt2"), 32) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_the_graph_writes_what_generate_writes(finished: Path) -> None:
    model = load(finished, "cuda")
    ids = torch.tensor([[1, 2, 3]], device="cuda")
    with torch.inference_mode():
        tokens = list(decode(model, ids, 12, lambda logits: int(logits.argmax())))
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0, 3:]
    assert tokens == expected.tolist()


def test_what_is_no_run_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        list(generate(tmp_path, PROMPT, device="cpu"))


def test_the_command(commands: Processes, finished: Path, tmp_path: Path) -> None:
    assert commands.run(["generate", str(finished), PROMPT, "--max-new-tokens", "8", "-q"], tmp_path / "log") == 0
    expected = "".join(generate(finished, PROMPT, max_new_tokens=8, device="cpu"))
    assert (tmp_path / "log").read_text().strip() == expected.strip()
