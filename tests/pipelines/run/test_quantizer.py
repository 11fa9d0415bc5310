"""Stage directories in plain transformers: the same logits as `load`, checked files, saved and loaded again, refused where that cannot be."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitmend.pipelines import formats
from bitmend.pipelines.errors import InputError, UsageError
from bitmend.pipelines.models.source import resolve_model
from bitmend.pipelines.planning.plan import predict
from bitmend.pipelines.run import quantizer
from bitmend.pipelines.run.evaluate import evaluate
from bitmend.pipelines.run.generate import generate
from bitmend.pipelines.run.opening import load
from bitmend.pipelines.stages.baseline import build_baseline
from bitmend.pipelines.store.artifact import open_artifact
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from ..families import save_tiny
from ..runs import CHAIN, chosen, stage_directory
from ..toy import STEPS, run, toy_text

BASELINE: dict[str, Any] = {"key": "k", "parent": None, "stage": {"name": "baseline", "method": None, "settings": {}}}


def logits(model: Any, vocabulary: int = 1024) -> Tensor:
    ids = torch.arange(3 * 24).view(3, 24) * 7 % (vocabulary - 5)
    with torch.inference_mode():
        return model(ids).logits


@pytest.fixture(scope="module")
def fused(finished: Path) -> Path:
    return stage_directory(finished, "fuse")


@pytest.fixture(scope="module")
def loaded(fused: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(fused)


def test_every_stage_gives_the_logits_of_load(finished: Path) -> None:
    for address in ("baseline", *(name for stage in CHAIN for name in stage)):
        directory = stage_directory(finished, address)
        model = AutoModelForCausalLM.from_pretrained(directory)
        assert torch.equal(logits(model), logits(load(directory))), address
    assert type(model.model.layers[0].mlp.down_proj).__name__ == "FusedLinear" and model.hf_quantizer.quantization_config.quant_method == "bitmend"
    assert open_artifact(directory).stored("model.layers.0.mlp.down_proj").low_rank is not None
    half = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, device_map="auto" if not torch.cuda.is_available() else "cpu")
    assert half.dtype == torch.bfloat16 and torch.equal(logits(half), logits(load(directory, dtype=torch.bfloat16)))
    assert half.get_memory_footprint() == load(directory, dtype=torch.bfloat16).get_memory_footprint()


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gemma3_text", "opt"])
def test_other_families(family: str, tmp_path: Path) -> None:
    plain = save_tiny(family, tmp_path / "plain")
    build_baseline(tmp_path / "plain", tmp_path / "a.partial", tmp_path / "a", BASELINE)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a", attn_implementation="eager")
    assert again.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(again, 97), logits(plain, 97), rtol=0, atol=1e-5)


def test_virtual_tokens_come_along(tmp_path: Path, small_model: Path, no_pages: None) -> None:
    stages = [{"recover": {**STEPS, "method": "prompt_tuning", "steps": 6}}]
    run(tmp_path, small_model, toy_text(tmp_path / "text.jsonl"), stages)
    directory = stage_directory(tmp_path / "run", "recover")
    assert open_artifact(directory).extra_modules
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(logits(model), logits(load(directory))) and not torch.equal(logits(model), logits(load(small_model)))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_saved_it_loads_again_both_ways(loaded: Any, fused: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(fused)
    loaded.save_pretrained(tmp_path / "saved", safe_serialization=True)
    tokenizer.save_pretrained(tmp_path / "saved")  # as everybody does, over the files that came along
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), load(tmp_path / "saved")):
        assert torch.equal(logits(again), logits(loaded))
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("a river").input_ids == tokenizer("a river").input_ids
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(load(tmp_path / "twice")), logits(loaded))
    with pytest.raises(UsageError, match="exists and is not empty"):
        loaded.save_pretrained(tmp_path / "saved")


def test_what_cannot_be_saved_is_refused_before_anything_is_written(loaded: Any, fused: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"save_pretrained: max_shard_size, push_to_hub: an artifact is copied as it is"):
        loaded.save_pretrained(tmp_path / "saved", push_to_hub=True, max_shard_size="1GB")
    model = AutoModelForCausalLM.from_pretrained(fused)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    with pytest.raises(InputError, match=r"model\.norm\.weight is not what .* holds \(1 parameters have changed\)"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_the_pipeline_writes_what_generate_writes(finished: Path, fused: Path) -> None:
    answer = pipeline("text-generation", model=str(fused), device=-1)("The city of", max_new_tokens=12, do_sample=False, return_full_text=False)
    assert answer[0]["generated_text"] == "".join(generate(finished, "The city of", max_new_tokens=12, device="cpu"))


def test_a_changed_file_is_named(fused: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(fused, tmp_path / "broken"))
    shard = next(broken.glob("block-00001.matrices.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match=r"block-00001\.matrices\.safetensors: sha256 is"):
        AutoModelForCausalLM.from_pretrained(broken)
    shard.unlink()
    with pytest.raises(InputError, match=r"block-00001\.matrices\.safetensors: is missing"):
        AutoModelForCausalLM.from_pretrained(broken)


def test_what_a_bound_model_cannot_do_is_a_usage_error(fused: Path) -> None:
    with pytest.raises(UsageError, match=r"device_map .*: an artifact's kernels are bound to one device"):
        AutoModelForCausalLM.from_pretrained(fused, device_map={"model": "cpu", "lm_head": "disk"})
    with pytest.raises(UsageError, match="holds a causal language model; AutoModelForCausalLM loads it, LlamaModel does not"):
        AutoModel.from_pretrained(fused)
    with pytest.raises(UsageError, match="leave use_kernels out"):
        AutoModelForCausalLM.from_pretrained(fused, use_kernels=True)
    with pytest.raises(InputError, match="is a stage of a run, no checkpoint to start from; `pipeline export` its run"):
        formats.read(fused)


@pytest.fixture
def on_the_hub(fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The id of an artifact that the Hub's cache holds, as it lays files out there."""
    from huggingface_hub import constants

    home, commit = tmp_path / "hub" / "models--bitmend-tests--artifact", "0123456789abcdef0123456789abcdef01234567"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots" / commit).mkdir(parents=True)
    (home / "blobs").mkdir()
    for number, file in enumerate(sorted(fused.iterdir())):
        shutil.copyfile(file, home / "blobs" / str(number))
        (home / "snapshots" / commit / file.name).symlink_to(Path("../../blobs") / str(number))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return "bitmend-tests/artifact"


def test_an_artifact_of_the_hub_is_evaluated_and_is_nothing_to_start_from(on_the_hub: str, fused: Path, small_text: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"eval_source": str(small_text), "seq_len": 64, "windows": 2, "device": "cpu"}
    outside = shutil.copytree(fused, tmp_path / "outside")
    assert evaluate(on_the_hub, **asked)["perplexity"] == evaluate(str(outside), **asked)["perplexity"]
    recipe = chosen(tmp_path, small_text, small_text, [{"quantize": {"method": "rtn"}}]).model_copy(update={"model": on_the_hub})
    with pytest.raises(InputError, match=r"models--bitmend-tests--artifact.*: is a stage of a run, no checkpoint to start from; `pipeline export`"):
        predict(recipe)
    again = AutoModelForCausalLM.from_pretrained(resolve_model(on_the_hub))
    assert torch.equal(logits(again), logits(load(fused)))


def test_transformers_wants_an_artifact_of_the_hub_as_a_directory(on_the_hub: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"bitmend-tests/artifact: an artifact loads from a directory; .*snapshot_download\('bitmend-tests/artifact'\)"):
        AutoModelForCausalLM.from_pretrained(on_the_hub, cache_dir=str(tmp_path / "hub"), local_files_only=True)


def test_a_transformers_that_takes_no_quantizers() -> None:
    with pytest.warns(UserWarning, match=r"takes no quantizers of others.*pip install 'transformers>=5\.17'"):
        quantizer.register(SimpleNamespace(register_quantization_config=print))


LATE = """
import sys, transformers
try:
    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
except FileNotFoundError as error:
    print(error)
import bitmend
print(type(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.down_proj).__name__)
"""


def test_without_the_import_it_is_reported_and_afterwards_it_works(fused: Path) -> None:
    done = subprocess.run([sys.executable, "-P", "-c", LATE, str(fused)], capture_output=True, text=True, timeout=300)
    first, second = done.stdout.splitlines()
    assert first.endswith("import_bitmend_first.safetensors") and second == "FusedLinear", done.stderr
