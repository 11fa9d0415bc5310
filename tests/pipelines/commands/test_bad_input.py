"""Whatever is wrong: one line that says what and what to do, the right exit code, no traceback, and nothing lost."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.pipelines.errors import InputError, OutOfMemoryError, UsageError
from bitmend.pipelines.run import runner
from bitmend.pipelines.stages.inputs import Inputs
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ..families import save_speaking
from ..runs import Processes, chosen, hashes, write_recipe

pytestmark = pytest.mark.usefixtures("no_pages")

Damage = Callable[[Path], object]


def weights(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def config(model: Path, **changes: Any) -> None:
    actual = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(actual | changes))


def as_pickle(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def as_bert(model: Path) -> None:
    """A model of blocks whose tokens see each other."""
    kind: Any = CONFIG_MAPPING["bert"]
    made = kind(vocab_size=1024, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(made).save_pretrained(model)


def as_images(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2}))


def nan_in(name: str) -> Damage:
    return lambda model: weights(model, lambda t: t[name].view(-1)[7].fill_(float("nan")))


def overflow(model: Path) -> None:
    weights(model, lambda t: t["model.layers.1.mlp.down_proj.weight"].mul_(3e38).clamp_(-3e38, 3e38))


def drop(model: Path) -> None:
    weights(model, lambda t: t.pop("model.layers.2.mlp.up_proj.weight"))


def indexed(name: str) -> Damage:
    """An index names a file that lies elsewhere."""

    def change(model: Path) -> None:
        weights = load_file(model / "model.safetensors")
        shutil.copy(model / "model.safetensors", model.parent / "outside.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def linked(model: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "elsewhere.safetensors")
    (model / "model.safetensors").symlink_to(model.parent / "elsewhere.safetensors")


def few_embeddings(model: Path) -> None:
    """A tokenizer that knows more tokens than the model."""
    config(model, vocab_size=600)
    name = "model.embed_tokens.weight"
    weights(model, lambda t: t.update({name: t[name][:600].contiguous()}))


def as_bytes(model: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weights(model, lambda t: t.update({name: t[name].to(torch.int8)}))


MODELS: dict[str, tuple[Damage, int, str]] = {
    "no such directory": (shutil.rmtree, 3, r"no such model directory; give a directory with config\.json, a \.gguf file"),
    "no config": (lambda m: (m / "config.json").unlink(), 3, r"no config\.json, so this is not a Hugging Face model directory"),
    "a config that is none": (lambda m: (m / "config.json").write_text("{"), 3, r"cannot read config\.json"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), 3, r"no \.safetensors file"),
    "pickle only": (as_pickle, 3, r"pytorch_model\.bin is a pickle file, which is never opened: convert it to safetensors"),
    "cut short": (lambda m: os.truncate(m / "model.safetensors", 500_000), 3, r"model\.safetensors: not a readable safetensors file"),
    "not a header": (lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 4000), 3, r"not a readable safetensors file"),
    "an empty file": (lambda m: (m / "model.safetensors").write_bytes(b""), 3, r"not a readable safetensors file"),
    "wrong shapes": (lambda m: config(m, intermediate_size=192), 3, r"mlp\.\w+_proj\.weight has shape .* config\.json says"),
    "a missing tensor": (drop, 3, r"no tensor for model\.layers\.2\.mlp\.up_proj\.weight \(1 missing\)"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), 3, r"tokenizer"),
    "an encoder": (as_bert, 3, r"BertLMHeadModel: its tokens see those after them, so this is not a causal language model"),
    "an image model": (as_images, 3, r"model type 'vit'"),
    "an unknown architecture": (lambda m: config(m, model_type="frobnicator"), 3, r"frobnicator"),
    "a tokenizer larger than the embedding": (few_embeddings, 3, r"makes token \d+, and the model has embeddings for 600 tokens"),
    "weights in int8": (as_bytes, 3, r"layers\.0\.mlp\.up_proj\.weight is stored as I8, and config\.json says nothing of a quantization"),
    "an index that leads out": (indexed("../outside.safetensors"), 3, r"names '\.\./outside\.safetensors', which is no plain file name"),
    "an absolute index": (indexed("/nowhere/model.safetensors"), 3, r"names '/nowhere/model\.safetensors', which is no plain file name"),
    "a link that leads out": (linked, 3, r"model\.safetensors: a link to \S+elsewhere\.safetensors, out of its directory"),
    "NaN in a block": (
        nan_in("model.layers.2.self_attn.k_proj.weight"), 3, r"model\.layers\.2\.self_attn\.k_proj\.weight holds NaN or Inf; repair",
    ),
    "NaN in the embedding": (nan_in("model.embed_tokens.weight"), 3, r"model\.embed_tokens\.weight holds NaN or Inf; repair the checkpoint"),
    "NaN in the last norm": (nan_in("model.norm.weight"), 3, r"model\.norm\.weight holds NaN or Inf; repair the checkpoint"),
    "activations that overflow": (overflow, 3, r"model\.layers\.1 puts out NaN or Inf although its weights are finite"),
}  # fmt: skip


SEEN_IN_NUMBERS = ("a missing tensor", "an encoder", *(case for case in MODELS if "NaN" in case or "overflow" in case))
"""What only reading the weights, or running them, shows: no dry run does."""


def one_line(commands: Processes, arguments: list[str], log: Path) -> tuple[int, str]:
    """Exit code and the error's line."""
    code = commands.run(arguments, log)
    text = log.read_text()
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    return code, lines[0]


@pytest.mark.parametrize("case", MODELS)
def test_models(case: str, commands: Processes, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    damage, expected, words = MODELS[case]
    model = tmp_path / "model"
    shutil.copytree(small_model, model)
    for file in model.iterdir():
        file.chmod(0o644)
    damage(model)
    recipe = write_recipe(tmp_path / "r.yaml", [{"quantize": {"method": "rtn", "group_size": 32}}])
    arguments = ["run", str(recipe), "-m", str(model), "--data", str(small_text), "-o", str(tmp_path / "run")]
    if case not in SEEN_IN_NUMBERS:
        code, line = one_line(commands, [*arguments, "--dry-run"], tmp_path / "dry")
        assert code == expected and re.search(words, line), f"a dry run says so, too: {line}"
    code, line = one_line(commands, arguments, tmp_path / "log")
    assert code == expected, line
    assert re.search(words, line), line
    assert str(tmp_path) in line or "layers" in line or "Model" in line or "model" in line


SETTINGS: dict[str, tuple[list[str], int, str]] = {
    "a group size that does not divide": (["--set", "quantize.group_size=48"], 2, r"quantize: model\.layers\.0\.\S+: .*128.*48"),
    "a pattern that does not divide": (["--set", "prune.pattern=3:6", "--set", "prune.sparsity=0.5"], 2, r"prune: .*in_features 128 is not a multiple of the 6"),
    "a rank above the matrix": (["--set", "decompose.rank=100"], 2, r"rank 100 is above the smaller dimension 64"),
    "windows beyond the model": (["--set", "evaluation.seq_len=1024"], 2, r"evaluation\.seq_len 1024 is above the 512 positions of this model"),
    "an unknown method": (["--set", "quantize.method=gtpq"], 2, r"unknown method 'gtpq'; did you mean 'gptq'\?"),
    "an unknown key": (["--set", "quantize.bit=3"], 2, r"unknown setting of quantize gptq 'bit'; did you mean 'bits'\?"),
    "an unknown section": (["--set", "evaluate.windows=3"], 2, r"unknown key 'evaluate'; did you mean 'evaluation'\?"),
    "an impossible value": (["--set", "quantize.bits=7"], 2, r"quantize.*7"),
    "a budget nothing can meet": (["--budget", "1bpw"], 2, r"--budget 1bpw is infeasible: the smallest that the choices of `allocation` can store is 3\.\d+bpw"),
    "a budget nothing spends": (["--budget", "3bpw", "--set", "quantize.method=none"], 2, r"--budget 3bpw: .*this recipe's quantize: none"),
    "a choice that is none": (["--budget", "4bpw", "--set", "allocation.bit=3"], 2, r"allocation: unknown key 'bit'; did you mean 'bits'\?"),
    "a method that cannot serve": (["--set", "recover.method=full"], 2, r"recover: full cannot serve this model: the weights are quantized"),
    "an unknown stage": (["--until", "quantise"], 2, r"did you mean 'quantize'\?"),
    "a text that is not there": (["--eval", "/no/such/file.txt"], 3, r"/no/such/file\.txt"),
    "no device": (["--device", "cuda"], 2, r"--device cuda: this torch sees no CUDA device; use --device cpu"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(case: str, commands: Processes, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    if case == "no device" and torch.cuda.is_available():
        pytest.skip("there is one")
    extra, expected, words = SETTINGS[case]
    arguments = [
        "run",
        str(write_recipe(tmp_path / "r.yaml")),
        "-m",
        str(small_model),
        "--data",
        str(small_text),
        "-o",
        str(tmp_path / "run"),
    ]
    code, line = one_line(commands, arguments + extra, tmp_path / "log")
    assert code == expected, line
    assert re.search(words, line), line
    assert not list(tmp_path.glob("run/stages/*")), "refused before any work"


def test_text_shorter_than_a_window(commands: Processes, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short for a window.")
    recipe = write_recipe(tmp_path / "r.yaml")
    arguments = ["run", str(recipe), "-m", str(small_model), "--data", str(small_text), "-o", str(tmp_path / "run")]
    for option in ("--eval", "--calibration", "--train"):
        code, line = one_line(commands, [*arguments, option, str(tmp_path / "short.txt")], tmp_path / "log")
        assert code == 3 and "short.txt" in line, line
        assert re.search(r"\d+ tokens are fewer than one window of 64; give a longer text or set seq_len to at most \d+", line) or (
            option == "--train" and "give it a source of its own" in line
        ), line
        assert not list(tmp_path.glob("run/stages/*")), "refused before any work"


def test_refusals_leave_a_finished_run_alone(
    commands: Processes, finished: Path, small_model: Path, small_text: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = hashes(run)
    kept = {name: (run / name).read_bytes() for name in ("run.json", "recipe.resolved.yaml", "record.json", "report.html")}
    arguments = ["run", str(write_recipe(tmp_path / "r.yaml")), "-m", str(small_model), "--data", str(small_text), "-o", str(run)]
    for extra in (["--set", "quantize.group_size=48"], ["--set", "evaluation.seq_len=9999"], ["--from", "melt"], ["-m", "/no/such"]):
        code, _ = one_line(commands, arguments + extra, tmp_path / "log")
        assert code in (2, 3)
    assert hashes(run) == before and kept == {name: (run / name).read_bytes() for name in kept}


@pytest.mark.parametrize(("words", "break_it"), [
    ("written with run schema 9", lambda run: (run / "run.json").write_text('{"schema": 9}')),
    ("holds 'notes.txt' but no run.json", lambda run: ((run / "run.json").unlink(missing_ok=True), (run / "notes.txt").write_text("mine"))),
])  # fmt: skip
def test_directories_that_are_not_its_own(
    words: str, break_it: Damage, commands: Processes, small_model: Path, small_text: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    break_it(run)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    arguments = ["run", str(write_recipe(tmp_path / "r.yaml")), "-m", str(small_model), "--data", str(small_text), "-o", str(run)]
    code, line = one_line(commands, arguments, tmp_path / "log")
    assert code == 3 and words in line
    assert before == {p.name: p.read_bytes() for p in run.iterdir()}


@pytest.mark.parametrize(("call", "count"), [("fsync", 1), ("fsync", 12), ("replace", 30), ("fsync", 55), ("link", 1)])
def test_a_full_disk_loses_nothing(
    call: str, count: int, small_model: Path, small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    """From the count-th writing on there is no space; once there is some, the same command gives what it always gives."""
    recipe, left, plain = chosen(tmp_path, small_model, small_text), [count], getattr(os, call)

    def full(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OutOfMemoryError, match="no disk space left; free some and run the same command again") as caught:
            runner.run(recipe, tmp_path / "run", until_stage="quantize")
    assert caught.value.exit_code == 5 and "\n" not in str(caught.value)
    runner.run(recipe, tmp_path / "run", until_stage="quantize")
    assert hashes(tmp_path / "run", "012") == hashes(finished, "012")


def test_no_memory(small_model: Path, small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitmend.pipelines import stages

    def exhausted(*arguments: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(stages, "perform", exhausted)
    with pytest.raises(OutOfMemoryError, match=r"out of memory.*calibration\.samples"):
        runner.run(chosen(tmp_path, small_model, small_text), tmp_path / "run")
    assert runner.status(tmp_path / "run")["stages"][0]["state"] == "done"


def test_nan_that_only_calibration_meets(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    """The embedding of a token that evaluation never sees is NaN: the layer whose inputs it spoils is named."""
    save_speaking("llama", tmp_path / "model", small_model, tie_word_embeddings=False)
    recipe = chosen(tmp_path, tmp_path / "model", small_text, [{"quantize": {"method": "gptq", "group_size": 16}}])
    inputs = Inputs(recipe, tmp_path / "model")
    unseen = sorted(set(inputs.calibration().unique().tolist()) - set(inputs.evaluation().ids.unique().tolist()))
    weights(tmp_path / "model", lambda t: t["model.embed_tokens.weight"][unseen[0]].fill_(float("nan")))
    with pytest.raises(InputError, match=r"model\.layers\.0\.self_attn\.\w+: .* of its inputs holds NaN or Inf"):
        runner.run(recipe, tmp_path / "run")
    assert [row["state"] for row in runner.status(tmp_path / "run")["stages"]] == ["done", "partial"]


def test_text_too_short_for_the_widest_matrix(commands: Processes, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    """Fewer tokens than inputs: it goes through, a number that would do is named before any work and in the report, nothing becomes NaN."""
    chain = [{"quantize": {"method": "gptq", "group_size": 32, "ignore": "down_proj"}}, {"decompose": {"method": "qera_exact", "rank": 4}}]
    recipe = write_recipe(tmp_path / "r.yaml", chain, calibration={"samples": 2, "seq_len": 40}, evaluation={"seq_len": 32, "windows": 1})
    arguments = ["run", str(recipe), "-m", str(small_model), "--data", str(small_text), "-o", str(tmp_path / "run"), "--device", "cpu"]
    assert commands.run(arguments, tmp_path / "log") == 0
    text, (_, quantize, decompose) = (tmp_path / "log").read_text(), runner.record(tmp_path / "run").stages
    for width, enough, stage in ((128, 4, quantize), (256, 7, decompose)):
        words = rf"80 calibration tokens are fewer than the {width} inputs of model\.layers\.0\.\S+: .*--set calibration\.samples={enough} would do"
        assert re.search(rf"WARNING.*{words}", text) and any(re.search(words, note) for note in stage.notes)
    for layer in decompose.layers:
        assert layer.metrics["tokens_short_of"] == (256 if "down_proj" in layer.name else 128) and layer.metrics["moment_singular"] == 1
        assert layer.relative_output_error is not None and layer.relative_output_error == layer.relative_output_error
    assert decompose.perplexity is not None and decompose.perplexity < 100


@pytest.mark.parametrize("extra", [["--set", "decompose.method=lq_lora"], ["--budget", "4bpw"]])
def test_a_loss_that_feels_no_matrix(extra: list[str], commands: Processes, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    """The last norm is 0, so every logit is, and no gradient comes back: Fisher information of 0."""
    shutil.copytree(small_model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").chmod(0o644)
    weights(tmp_path / "model", lambda t: t["model.norm.weight"].zero_())
    chain = [{"quantize": {"method": "rtn", "group_size": 32}}, {"decompose": {"rank": 2}}]
    arguments = ["run", str(write_recipe(tmp_path / "r.yaml", chain)), "-m", str(tmp_path / "model"), "--data", str(small_text)]
    code, line = one_line(commands, [*arguments, "-o", str(tmp_path / "run"), "--device", "cpu", *extra], tmp_path / "log")
    assert code == 3 and "Fisher information is 0 everywhere: the loss does not depend on any matrix" in line


def test_training_that_diverges_keeps_what_was_before(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    chain = [
        {"quantize": {"method": "rtn", "bits": 4, "group_size": 32}},
        {"recover": {"method": "scales", "steps": 4, "batch_size": 1, "seq_len": 32, "learning_rate": 10}},
    ]
    with pytest.raises((InputError, UsageError)) as caught:
        runner.run(chosen(tmp_path, small_model, small_text, chain), tmp_path / "run")
    assert "recover: model.layers.0" in str(caught.value) and "try a smaller recover.learning_rate" in str(caught.value)
    runner.last_artifact(tmp_path / "run", "quantize").verify()
