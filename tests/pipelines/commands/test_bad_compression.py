"""What compression and import cannot use, from the command line: one line that names the layer or the file, the exit code, nothing lost."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress import feedback
from bitmend.pipelines import cli
from bitmend.pipelines.export import exporting
from bitmend.pipelines.run import runner
from safetensors.torch import load_file

from ..runs import Processes, write_recipe
from .test_bad_input import config, one_line, weights

pytestmark = pytest.mark.usefixtures("no_pages")

FEW: dict[str, Any] = {"calibration": {"samples": 2, "seq_len": 32}, "evaluation": {"seq_len": 32, "windows": 1}}


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    for file in target.iterdir():
        file.chmod(0o644)
    return target


def run_of(place: Path, model: Path, text: Path, stages: list[dict[str, Any]]) -> list[str]:
    recipe = write_recipe(place / "r.yaml", stages, **FEW)
    return ["run", str(recipe), "-m", str(model), "--data", str(text), "-o", str(place / "run"), "--device", "cpu"]


GPTQ = {"quantize": {"method": "gptq", "group_size": 32}}


def test_damping_that_never_succeeds(
    small_model: Path, small_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedback, "_factor", lambda *_: None)
    assert cli.main(run_of(tmp_path, small_model, small_text, [{"prune": {"method": "magnitude"}}, GPTQ])) == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(r"model\.layers\.0\.self_attn\.q_proj: second moment has no Cholesky factor even with damp 10", line), line
    assert [row["state"] for row in runner.status(tmp_path / "run")["stages"]] == ["done", "done", "partial"]


def too_large(model: Path) -> None:
    """The function stays what it was; the squares of what enters o_proj are past float32."""

    def scale(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.v_proj.weight"].mul_(1e22)
        tensors["model.layers.1.self_attn.o_proj.weight"].mul_(1e-22)

    weights(model, scale)


@pytest.mark.parametrize("stage", [GPTQ, {"prune": {"method": "wanda"}}, {"prune": {"method": "magnitude", "allocation": "outliers"}}])
def test_statistics_that_overflow_name_the_layer(
    stage: dict[str, Any], commands: Processes, small_model: Path, small_text: Path, tmp_path: Path
) -> None:
    too_large(copied(small_model, tmp_path / "model"))
    code, line = one_line(commands, run_of(tmp_path, tmp_path / "model", small_text, [stage]), tmp_path / "log")
    words = r"model\.layers\.1\.self_attn\.o_proj: (square_sum of )?its inputs holds? NaN or Inf; the layer below it overflows"
    assert code == 3 and re.search(words, line), line


def test_a_dead_layer_is_compressed_and_reported(commands: Processes, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    """Nothing ever enters the attention of one block."""
    model = copied(small_model, tmp_path / "model")
    weights(model, lambda t: t["model.layers.1.input_layernorm.weight"].zero_())
    stages = [{"prune": {"method": "sparsegpt"}}, GPTQ, {"decompose": {"method": "qera_exact", "rank": 2}}]
    assert commands.run(run_of(tmp_path, model, small_text, stages), tmp_path / "log") == 0, (tmp_path / "log").read_text()
    made = runner.record(tmp_path / "run")
    for stage in made.stages[1:3]:
        dead = {layer.name for layer in stage.layers if layer.metrics.get("dead_layer") == 1.0}
        assert dead == {f"model.layers.1.self_attn.{leaf}_proj" for leaf in "qkvo"}
    zero = {layer.name for layer in made.stages[3].layers if layer.metrics.get("statistics_zero") == 1.0}
    assert zero == {f"model.layers.1.self_attn.{leaf}_proj" for leaf in "qkvo"}
    assert made.stages[-1].perplexity is not None and made.stages[-1].perplexity < 1000


@pytest.fixture(scope="module")
def gptq(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gptq") / "model"
    exporting.export(finished, "gptq", directory, stage="quantize")
    return directory


def says(**entries: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        actual = json.loads((model / "config.json").read_text())
        config(model, quantization_config={**actual["quantization_config"], **entries})

    return change


def cut(name: str, rows: int) -> Callable[[Path], None]:
    return lambda model: weights(model, lambda t: t.update({name: t[name][:rows].contiguous()}))


def as_pickle(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def dropped(name: str) -> Callable[[Path], None]:
    return lambda model: weights(model, lambda t: t.pop(name))


Q = "model.layers.0.self_attn.q_proj"
IMPORTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a format nobody knows": (says(quant_method="awq"), r"quant_method 'awq' is not known; read are dense, gptq"),
    "a version nobody knows": (says(checkpoint_format="gptq_v9"), r"gptq checkpoint_format 'gptq_v9' is not known"),
    "bits that are none": (says(bits=5), r"5 bits; GPTQ checkpoints of 2, 3, 4, 8 bits are read"),
    "other bits than the file's": (says(bits=8), r"qweight holds 3 bits for each of \d+ inputs; config\.json says 8"),
    "eight-bit bitsandbytes": (says(quant_method="bitsandbytes", load_in_4bit=False), r"only bitsandbytes' 4-bit checkpoints are read"),
    "a group too few": (cut(f"{Q}.scales", 3), rf"{Q}\.qzeros has shape \[4, \d+\]; 128 × 128 weights of 3 bits need \[3, \d+\]"),
    "a row too few": (cut(f"{Q}.qweight", 11), rf"{Q}\.qweight has 11 rows of 32 bits for 128 inputs"),
    "a part that is missing": (dropped(f"{Q}.qzeros"), rf"{Q}\.qweight is there, {Q}\.qzeros is not"),
    "a norm that is missing": (dropped("model.layers.2.input_layernorm.weight"), r"model\.layers\.2\.input_layernorm\.weight"),
    "another width": (lambda m: config(m, intermediate_size=512), r"mlp\.\w+_proj.* by config\.json it is"),
    "a truncated file": (lambda m: os.truncate(m / "model.safetensors", 200_000), r"model\.safetensors is no whole safetensors file"),
    "an empty file": (lambda m: (m / "model.safetensors").write_bytes(b""), r"model\.safetensors is no whole safetensors file"),
    "pickle only": (as_pickle, r"pytorch_model\.bin"),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPORTS)
def test_imports(case: str, commands: Processes, gptq: Path, small_text: Path, tmp_path: Path) -> None:
    damage, words = IMPORTS[case]
    model = copied(gptq, tmp_path / "model")
    damage(model)
    evaluated = ["eval", str(model), "--eval", str(small_text), "--seq-len", "32", "--windows", "1", "--device", "cpu"]
    code, line = one_line(commands, evaluated, tmp_path / "log")
    assert code == 3 and re.search(words, line), line
    assert "pickle" in line or case != "pickle only"


def test_a_pickle_next_to_the_weights_is_never_opened(commands: Processes, gptq: Path, small_text: Path, tmp_path: Path) -> None:
    """One that would leave a file behind if it were."""
    model = copied(gptq, tmp_path / "model")
    bomb = f"cos\nsystem\n(S'touch {tmp_path / 'opened'}'\ntR.".encode()
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin"):
        (model / name).write_bytes(bomb)
    evaluated = ["eval", str(model), "--eval", str(small_text), "--seq-len", "32", "--windows", "1", "--device", "cpu", "--json"]
    assert commands.run(evaluated, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert not (tmp_path / "opened").exists()
