"""The table of GGUF files: our grids and llama.cpp's own quantizer with an importance matrix, tensor by tensor in the same types.

llama.cpp chooses the types and rounds; ours takes those types as grids of GPTQ, and may train their super-scales. Both are then read by llama.cpp, which
measures the perplexity over our windows. A budget of the same bits may choose other types. It runs in an environment of its own (`make interop`) and shares nothing with us but files.
"""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGUFReader

from ...reports import published
from ...reports.json_values import text
from ..doctor import cpu_name
from ..errors import InputError
from ..evaluation.speed import tokens_per_second
from ..export.exporting import export
from ..formats.gguf_families import GgufModel
from ..models.source import load_config
from ..recipes import recipe
from ..run import runner
from ..run.opening import last_artifact, load
from ..stages.inputs import Inputs
from .reference_rows import DEMO, SETTINGS, SMALL

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "gguf"
WIDE = "wide"
WIDE_STEPS = 1500
MODELS = (SMALL, WIDE, DEMO)
TYPES = ("Q2_K", "Q3_K_M", "Q4_K_M")
TRAINED = {"method": "scales", "steps": 40, "batch_size": 1, "accumulation": 2, "eval_every": 10, "loss": "both"}
BY_BUDGET = "GPTQ, types by budget"
METHODS: Mapping[str, list[dict[str, object]]] = {"GPTQ": [], "GPTQ, scales trained": [{"recover": TRAINED}], BY_BUDGET: []}
COLUMNS = (
    ("model", "model", "text"), ("type", "type", "text"), ("name", "rounded by", "text"), ("perplexity", "perplexity in llama.cpp", "perplexity"),
    ("own_perplexity", "in ours", "perplexity"), ("file_bytes", "bytes", "bytes"), ("llama_tokens_per_second", "llama.cpp tokens/s", "number"),
    ("tokens_per_second", "`pipeline generate` tokens/s", "number"), ("types", "types", "text"),
)  # fmt: skip
_RUNS, _TRAIN = Path("tests/interop/llama_cpp_runs.py"), Path("tests/small_model/train.py")
_NEW_TOKENS = 64


def publish(directory: Path) -> list[Path]:
    """Measure what is not there yet, then write the table. InputError outside of the repository, or without llama.cpp's environment."""
    _interpreter()
    kept = published.PublishedRows(directory / f"{NAME}.jsonl", ("model", "type", "name"), {"settings": SETTINGS, "trained": TRAINED})
    written: list[Path] = []
    for model in MODELS:
        if kept.missing(_identities(model)):
            _measure(model, directory, kept)
        written = _write(kept)  # a model's rows stand before the next one takes its hours
    return written


def _identities(model: str) -> list[Mapping[str, object]]:
    rows = [("F32", "nothing"), *((kind, name) for kind in TYPES for name in ("llama.cpp", *METHODS))]
    return [{"model": model, "type": kind, "name": name} for kind, name in rows]


def _write(kept: published.PublishedRows) -> list[Path]:
    rows = [row for model in MODELS for kind in ("F32", *TYPES) for row in kept if (row["model"], row["type"]) == (model, kind)]
    shown = [{key: value for key, value in row.items() if key != "protocol"} for row in rows]
    notes = [
        "llama.cpp: llama_model_quantize with the mean squares of the inputs over the calibration text (32 × 512 tokens of the demo's, 64 × 128 of the tests' for small and wide). "
        "Ours: GPTQ on the same text, every tensor in the type that llama.cpp gave it, so the tensors take the same bytes; trained: the super-scales, 40 steps; types by budget: each tensor's type chosen by --budget, at most as many "
        "bits over the matrices as in llama.cpp's file.",
        f"wide: a Llama of 4 blocks, width 256, MLP 512, by `tests/small_model/train.py --width 256 --steps {WIDE_STEPS}`. small is 128 wide, "
        "the demo model 576, no multiples of 256: there llama.cpp falls back to the types listed, and so do we.",
        "The two perplexities of a row differ because llama.cpp rounds what enters a quantized matrix to 8 bits. Tokens/s: one thread each, greedy.",
        f"Made by `make publish TABLE={NAME}`: {len(rows)} of {len(MODELS) * len(_identities(SMALL))} rows; {cpu_name()}, 2 cores shared with other work.",
    ]
    protocols = {text(row["model"]): row["protocol"] for row in rows}
    return published.write(NAME, shown, COLUMNS, protocols, title="GGUF: our grids and llama.cpp's quantizer", notes=notes)


def _measure(model: str, directory: Path, kept: published.PublishedRows) -> None:
    place = directory / f"{NAME}-{model}"
    place.mkdir(parents=True, exist_ok=True)
    options = _options(model, place)
    record = runner.run(_recipe([], model, options), place / "run", until_stage="baseline", page=False)
    inputs = Inputs(_recipe([], model, options), last_artifact(place / "run", "baseline").directory)
    ids_NT = inputs.evaluation().ids
    np.save(place / "windows.npy", ids_NT.numpy())
    protocol = {"protocol": record.protocol.to_json()}

    def row(kind: str, name: str, file: Path, **more: object) -> None:
        if {"model": model, "type": kind, "name": name} not in kept:
            kept.append({"model": model, "type": kind, "name": name, **_in_llama_cpp(file, place, ids_NT), **protocol, **more})

    dense = place / "dense.gguf"
    if not dense.is_file():
        export(place / "run", "gguf", dense, stage="baseline")
    row("F32", "nothing", dense, own_perplexity=record.stages[0].perplexity)
    if not (place / "imatrix.npz").is_file():
        np.savez(place / "imatrix.npz", **_mean_squares(inputs))  # type: ignore[arg-type]
    theirs_of = {kind: place / f"llama.cpp-{kind}.gguf" for kind in TYPES}
    for kind, theirs in theirs_of.items():
        if not theirs.is_file():
            asked = {"model": str(dense), "output": f"{theirs}.partial", "type": kind, "imatrix": str(place / "imatrix.npz")}
            _run("quantize", asked, place)
            Path(f"{theirs}.partial").rename(theirs)
        row(kind, "llama.cpp", theirs, types=_said_types(theirs))
    for name, stages in METHODS.items():
        for kind, theirs in theirs_of.items():
            if {"model": model, "type": kind, "name": name} not in kept:
                file = place / f"{name}-{kind}.gguf"
                quantize, more = _as_grids(theirs, inputs.model), {}
                if name == BY_BUDGET:
                    quantize, more = {"method": "gptq", "grid": "q4_k", "include_embeddings": True}, _budget_of(theirs)
                made = runner.run(_recipe([{"quantize": quantize}, *stages], model, options, more), place / "run", page=False)
                if not file.is_file():
                    export(place / "run", "gguf", file)
                speed = tokens_per_second(load(place / "run"), ids_NT[:1, :16], _NEW_TOKENS)
                row(kind, name, file, own_perplexity=made.stages[-1].perplexity, tokens_per_second=speed, types=_said_types(file))


def _options(model: str, place: Path) -> dict[str, object]:
    if model == DEMO:
        return {"model": DEMO, "profile": DEMO}
    trained = _TRAIN.parent / "model" if model == SMALL else place / "model"
    if not (trained / "config.json").is_file():
        subprocess.run([sys.executable, "-P", _TRAIN, "--width", "256", "--steps", str(WIDE_STEPS), "--output", trained], check=True)
    return {"model": str(trained), "data": str(_TRAIN.parent / "text.jsonl"), "profile": "standard"}


def _recipe(
    stages: Sequence[Mapping[str, object]], model: str, options: Mapping[str, object], more: Mapping[str, object] | None = None
) -> recipe.Recipe:
    document = {
        "name": NAME,
        **SETTINGS[DEMO if model == DEMO else SMALL],
        **(more or {}),
        "stages": stages or [{"prune": {"method": "none"}}],
    }
    seq_len = document["calibration"]["seq_len"]
    for stage in document["stages"]:
        if "recover" in stage:
            stage["recover"] = {**stage["recover"], "seq_len": seq_len}
    return recipe.resolve(document, options=options)


def _as_grids(file: Path, model: Path) -> dict[str, object]:
    """A quantize stage that puts every matrix on the grid of the type that it has in the file."""
    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in GGUFReader(file).tensors}
    known = GgufModel.of(json.loads((model / "config.json").read_text()))
    from ..models.structure import inspect, skeleton

    sites = inspect(skeleton(load_config(model))).sites
    grids = {site.name: types[known.name(f"{site.name}.weight")] for site in sites}
    common = Counter(grids.values()).most_common(1)[0][0]
    others = {kind: [re.escape(name) for name, own in grids.items() if own == kind] for kind in set(grids.values()) - {common}}
    overrides = {f"^({'|'.join(names)})$": {"grid": kind} for kind, names in sorted(others.items())}
    bits = {"q6_k": 6, "q8_0": 8}[types["token_embd.weight"]]
    return {"method": "gptq", "grid": common, "overrides": overrides, "include_embeddings": True, "embedding_bits": bits}


def _budget_of(file: Path) -> dict[str, object]:
    """The bits that a file's matrices take, as a budget for ours, whose embeddings may have any."""
    matrices = [tensor for tensor in GGUFReader(file).tensors if len(tensor.shape) == 2]
    bits = 8 * sum(int(tensor.n_bytes) for tensor in matrices) / sum(int(tensor.n_elements) for tensor in matrices)
    return {"budget": f"{math.floor(bits * 1000) / 1000}bpw", "allocation": {"embedding_bits": [2, 3, 4, 5, 6, 8]}}


@torch.no_grad()
def _mean_squares(inputs: Inputs) -> dict[str, np.ndarray]:
    """GGUF tensor → E[x²] of every column of its input over the calibration text, which is what llama.cpp's own imatrix holds."""
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(_weights(inputs.model), dtype=torch.float32).eval()
    known, sums, ids_NT = GgufModel.of(model.config.to_dict()), {}, inputs.calibration()

    def watch(name: str) -> Any:
        def see(_: object, given: tuple[torch.Tensor, ...]) -> None:
            square_I = given[0].double().flatten(0, -2).square().sum(0)
            sums[name] = sums.get(name, 0) + square_I

        return see

    for name, module in model.model.named_modules(prefix="model"):
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watch(known.name(f"{name}.weight")))
    for ids_T in ids_NT:
        model(ids_T.unsqueeze(0))
    return {name: (total / ids_NT.numel()).float().numpy() for name, total in sums.items()}


def _weights(artifact: Path) -> Path:
    """A baseline artifact refers to the weights of a local model."""
    return Path(json.loads((artifact / "artifact.json").read_text()).get("source") or artifact)


def _in_llama_cpp(file: Path, place: Path, ids_NT: torch.Tensor) -> dict[str, Any]:
    nll = _run("score", {"model": str(file), "windows": str(place / "windows.npy")}, place)["nll"]
    answer = _run("generate", {"model": str(file), "ids": ids_NT[0, :16].tolist(), "new_tokens": _NEW_TOKENS}, place)
    rate = _NEW_TOKENS / answer["seconds"]
    return {"perplexity": math.exp(math.fsum(nll) / len(nll)), "file_bytes": file.stat().st_size, "llama_tokens_per_second": rate}


def _said_types(file: Path) -> str:
    counts = Counter(tensor.tensor_type.name for tensor in GGUFReader(file).tensors if len(tensor.shape) == 2)
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def _run(verb: str, job: Mapping[str, object], place: Path) -> dict[str, Any]:
    """One job of tests/interop/llama_cpp_runs.py. InputError with its last words when it fails."""
    (place / "jobs.json").write_text(json.dumps([{**job, "said": str(place / "said.json")}]))
    done = subprocess.run([_interpreter(), "-P", _RUNS, verb, place / "jobs.json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"llama.cpp ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return json.loads((place / "said.json").read_text())


def _interpreter() -> Path:
    python = Path(os.environ.get("VENV_LLAMA", ".venv-llama")) / "bin" / "python"
    if not python.is_file() or not _RUNS.is_file():
        raise InputError(
            f"{python if _RUNS.is_file() else _RUNS}: no such file; run this from the root of the repository, `make interop` builds llama.cpp"
        )
    return python
