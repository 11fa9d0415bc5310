"""llama.cpp, in the environment that `make interop` builds, reads our GGUF files: the same tokens, the same text, the same perplexity."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitmend.compress.weights import LowRank
from bitmend.pipelines import formats
from gguf import GGUFReader

from ..pipelines.formats.gguf_models import GGUF_MODELS, made
from ..pipelines.formats.gguf_tokenizers import GGUF_TOKENIZERS, TEXTS, save_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-llama" / "bin" / "python"
SCRIPT = Path(__file__).parent / "llama_cpp_runs.py"
CLOSE = 0.05
"""Two logits that differ by less may change places: llama.cpp rounds what enters a quantized matrix to 8 bits, we do not."""

pytestmark = [
    pytest.mark.interop,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PYTHON.is_file(), reason=f"llama.cpp's environment {PYTHON.parents[1].name} is missing; `make interop` builds it"),
]


def run(verb: str, place: Path, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
    given = [{**job, "said": str(place / f"said-{i}.json")} for i, job in enumerate(jobs)]
    (place / "jobs.json").write_text(json.dumps(given))
    done = subprocess.run([PYTHON, SCRIPT, verb, place / "jobs.json"], capture_output=True, text=True, cwd=place, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(job["said"]).read_text()) for job in given]


def nll(model: Any, ids_NT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        log_p = torch.log_softmax(model.eval()(ids_NT).logits[:, :-1].double(), -1)
    return -log_p.gather(-1, ids_NT[:, 1:].unsqueeze(-1)).squeeze(-1).mean(1)


@pytest.fixture(scope="module")
def windows(small_text: Path, small_model: Path) -> torch.Tensor:
    """int64 [4, 64]: text that the small model's tokenizer made tokens of."""
    from transformers import AutoTokenizer

    text = json.loads(small_text.read_text().splitlines()[0])["text"]
    return torch.tensor(AutoTokenizer.from_pretrained(small_model)(text).input_ids[: 4 * 64]).view(4, 64)


def with_terms(checkpoint: Any) -> Any:
    generator = torch.Generator().manual_seed(7)

    def term(name: str, record: Any) -> Any:
        (rows, columns), rank = record.shape, 2 if "k_proj" in name else 3
        up, down = torch.randn(rows, rank, generator=generator) * 0.2, torch.randn(rank, columns, generator=generator) * 0.2
        return replace(record, low_rank=LowRank(up, down))

    return checkpoint.with_linears({name: term(name, checkpoint.linears[name]) for name in checkpoint.linears})


@pytest.mark.parametrize("adapter", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("name", GGUF_MODELS)
def test_every_family_computes_the_same(
    name: str, adapter: bool, case: Any, on_grid: Any, small_model: Path, windows: torch.Tensor, tmp_path: Path
) -> None:
    """Perplexity within 0.5 % of ours (0.02 nats where a random model is far above 1000), window by window."""
    actual = made(name, case, on_grid, small_model)
    checkpoint = with_terms(actual.checkpoint) if adapter else actual.checkpoint
    state = {f"{n}.weight": checkpoint.linears[n].dense() for n in checkpoint.linears}
    actual.model.load_state_dict(state, strict=False)
    formats.write("gguf", checkpoint, tmp_path / "m", adapter)
    np.save(tmp_path / "ids.npy", windows.numpy())
    job = {"model": str(tmp_path / "m/model.gguf"), "windows": str(tmp_path / "ids.npy")}
    (said,) = run("score", tmp_path, job | ({"adapter": str(tmp_path / "m/adapter.gguf")} if adapter else {}))
    mine = nll(actual.model, windows)
    assert abs(float(torch.tensor(said["nll"]).double().mean() - mine.mean())) < 0.02
    torch.testing.assert_close(torch.tensor(said["nll"]).double(), mine, rtol=0, atol=0.06)


@pytest.mark.parametrize("name", GGUF_TOKENIZERS)
def test_llama_cpp_makes_the_same_tokens(name: str, case: Any, on_grid: Any, small_text: Path, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(name, small_text, tmp_path / "tokenizer")
    actual = made("llama", case, on_grid, tmp_path / "tokenizer", vocab_size=700)
    notes = formats.write("gguf", actual.checkpoint, tmp_path / "m.gguf")
    short = [text for text in TEXTS if not ((text.startswith(" ") or "> " in text) and any("begins with a space" in note for note in notes))]
    long = [json.loads(line)["text"] for line in small_text.read_text().splitlines()[20:23]]
    (said,) = run("tokenize", tmp_path, {"model": str(tmp_path / "m.gguf"), "texts": short + long})
    for text, theirs in zip(short + long, said["ids"], strict=True):
        assert theirs == tokenizer(text).input_ids, text


@pytest.fixture(scope="module")
def exported(small_model: Path, small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run, GGUF file) of the trained small model on 4 bits, its embeddings on 8."""
    from bitmend.pipelines.export import exporting
    from bitmend.pipelines.run import runner

    from ..pipelines.runs import chosen

    place = tmp_path_factory.mktemp("llama")
    grid = {"bits": 4, "group_size": 32, "symmetric": True, "include_embeddings": True, "embedding_bits": 8}
    recipe = chosen(place, small_model, small_text, [{"quantize": {"method": "gptq", **grid}}], evaluation={"seq_len": 128, "windows": 12})
    runner.run(recipe, place / "run", page=False)
    exporting.export(place / "run", "gguf", place / "m.gguf")
    return place / "run", place / "m.gguf"


def test_perplexity_over_our_windows_is_ours(exported: tuple[Path, Path], tmp_path: Path) -> None:
    from bitmend.pipelines.recipes.recipe import resolve
    from bitmend.pipelines.run import runner
    from bitmend.pipelines.run.opening import last_artifact
    from bitmend.pipelines.stages.inputs import Inputs
    from bitmend.pipelines.store.rundir import RunDirectory

    directory, file = exported
    recipe = resolve(RunDirectory(directory).checked_recipe())
    np.save(tmp_path / "ids.npy", Inputs(recipe, last_artifact(directory).directory).evaluation().ids.numpy())
    (said,) = run("score", tmp_path, {"model": str(file), "windows": str(tmp_path / "ids.npy")})
    ours = runner.record(directory).stages[-1].perplexity
    assert math.exp(sum(said["nll"]) / len(said["nll"])) == pytest.approx(ours, rel=0.005)


def test_greedy_text_is_ours(exported: tuple[Path, Path], tmp_path: Path) -> None:
    """Until a step at which the two best logits are close; most of the text comes before it."""
    from bitmend.pipelines.run.opening import load
    from transformers import AutoTokenizer

    directory, file = exported
    stage = next((directory / "stages").glob("*quantize*[!.metrics]"))
    model, tokenizer = load(directory), AutoTokenizer.from_pretrained(stage)
    prompts = ["The history of the city", "In 1945 the", "Music is", "The first season of"]
    jobs = [{"model": str(file), "ids": tokenizer(prompt).input_ids, "new_tokens": 24} for prompt in prompts]
    same = 0
    for job, said in zip(jobs, run("generate", tmp_path, *jobs), strict=True):
        settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
        ours = model.generate(torch.tensor([job["ids"]]), **settings)[0, len(job["ids"]) :].tolist()
        for mine, theirs, gap in zip(ours, said["ids"], said["gaps"], strict=True):
            if gap < CLOSE:
                break
            assert mine == theirs
            same += 1
    assert same > 24


def test_generate_with_the_extra_writes_the_kernels_text(exported: tuple[Path, Path], tmp_path: Path) -> None:
    """`pipeline generate --engine llama.cpp`, with the package of llama.cpp's environment in ours."""
    from bitmend.pipelines.run.generate import generate

    directory, _ = exported
    installed = next((PYTHON.parents[1] / "lib").glob("python*/site-packages"))
    if installed.parent.name != f"python{sys.version_info.major}.{sys.version_info.minor}":
        pytest.skip(f"llama.cpp's environment has {installed.parent.name}, ours another one")
    for name in ("llama_cpp", "diskcache"):
        (tmp_path / name).symlink_to(installed / name)
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    asked = [sys.executable, "-P", "-m", "bitmend.pipelines.cli", "generate", str(directory), "Music is", "--max-new-tokens", "16"]
    environment = {**os.environ, "PYTHONPATH": paths, "BITMEND_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([*asked, "--engine", "llama.cpp", "-q"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ours = "".join(generate(directory, "Music is", max_new_tokens=16, device="cpu"))
    assert done.stdout.strip()[:8] == ours.strip()[:8]


def test_llama_cpp_quantizes_what_we_wrote(exported: tuple[Path, Path], small_model: Path, case: Any, tmp_path: Path) -> None:
    """Its quantizer takes our float32 file and our importance matrix; the types are its own choice."""
    from bitmend.compress.weights import DenseWeight

    actual = made("llama", case, lambda weight, **_: DenseWeight(weight), small_model, hidden_size=256, intermediate_size=256, head_dim=64)
    formats.write("gguf", actual.checkpoint, tmp_path / "f.gguf")
    names = [t.name for t in GGUFReader(tmp_path / "f.gguf").tensors if len(t.shape) == 2 and t.name.startswith("blk.")]
    np.savez(tmp_path / "i.npz", **{name: np.ones(256, np.float32) for name in names})
    job = {"model": str(tmp_path / "f.gguf"), "output": str(tmp_path / "q.gguf"), "type": "Q2_K", "imatrix": str(tmp_path / "i.npz")}
    run("quantize", tmp_path, job)
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "q.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q2_K" and kinds["blk.0.attn_v.weight"] == "Q3_K"


def test_the_check_would_see_rows_in_another_order(
    case: Any, on_grid: Any, small_model: Path, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitmend.pipelines.formats.gguf_families import GgufModel

    actual = made("llama", case, on_grid, small_model)
    monkeypatch.setattr(GgufModel, "rows", lambda self, name: None)
    formats.write("gguf", actual.checkpoint, tmp_path / "m.gguf")
    np.save(tmp_path / "ids.npy", windows.numpy())
    (said,) = run("score", tmp_path, {"model": str(tmp_path / "m.gguf"), "windows": str(tmp_path / "ids.npy")})
    assert (torch.tensor(said["nll"]).double() - nll(actual.model, windows)).abs().max() > 0.12


