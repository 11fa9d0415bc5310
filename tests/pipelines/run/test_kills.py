"""Every kind of chain killed at a few operations, then the same command: bit for bit what a run makes that nobody disturbed."""

import hashlib
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from ..families import save_speaking
from ..runs import Processes, hashes, write_recipe

FEW: dict[str, Any] = {"calibration": {"samples": 4, "seq_len": 32}, "evaluation": {"seq_len": 32, "windows": 2}}
GRID: dict[str, Any] = {"bits": 3, "group_size": 32}
TRAINED: dict[str, Any] = {"steps": 3, "batch_size": 2, "seq_len": 32}
RTN: dict[str, Any] = {"quantize": {"method": "rtn", **GRID}}
FIT: dict[str, Any] = {"recover": {"method": "reconstruct", "rank": 2, "samples": 4, **TRAINED}}
LORA: dict[str, Any] = {"recover": {"method": "lora", "rank": 2, "eval_every": 3, **TRAINED}}
CHAINS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "learned_rounding": ("small", [{"quantize": {"method": "learned_rounding", **GRID, **TRAINED}}]),
    "block_training": ("small", [{"quantize": {"method": "block_training", **GRID, **TRAINED}}]),
    "reconstruct": ("small", [RTN, FIT]),
    "experts": (
        "mixtral",
        [{"quantize": {"method": "gptq", **GRID}}, {"decompose": {"method": "qera_approx", "rank": 2}}, LORA, {"fuse": {}}],
    ),
    "gemma": (
        "gemma3_text",
        [{"prune": {"method": "wanda", "sparsity": 0.3}}, {"quantize": {"method": "gptq", **GRID}}, LORA, {"fuse": {}}],
    ),
}
KILLS = 3


@pytest.fixture(scope="module")
def models(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small model, and one random one each of two other families, with its tokenizer."""
    place = tmp_path_factory.mktemp("models")
    made = {"small": small_model}
    for family, changes in (("mixtral", {"num_hidden_layers": 2}), ("gemma3_text", {})):
        save_speaking(family, place / family, small_model, **changes)
        made[family] = place / family
    return made


def ends_at_same_bits(
    commands: Processes, arguments: list[str], output: Path, place: Path, kills: int, draw: random.Random, anew: bool = False
) -> None:
    """`arguments` undisturbed, counting its operations in the directory of `output`; then killed at `kills` of them, each time going on from
    there (or, with `anew`, with nothing under that name), and at last to its end."""
    log, watched = place / "log", str(output.parent if anew else output)
    assert commands.run(arguments, log, fault=(None, 0, watched)) == 0, log.read_text()
    operations, undisturbed = int(log.read_text().splitlines()[-1]), contents(output)
    assert undisturbed and operations > kills
    _remove(output)
    left = operations
    for number in range(kills):
        step = draw.randrange(1, max(left * 2 // 3, 2))
        code = commands.run(arguments, log, fault=("kill", step, watched))
        assert code == -signal.SIGKILL, f"operation {step} of {operations}, kill {number + 1}: {code}\n{log.read_text()}"
        if anew:
            assert not output.exists(), f"a half {output.name} stands there after a kill at operation {step}"
        left -= 0 if anew else step
    assert commands.run(arguments, log) == 0, log.read_text()
    assert contents(output) == undisturbed, f"other bits after {kills} kills"
    assert anew or not list(output.rglob("*.partial")), "nothing unfinished is left"


def contents(output: Path) -> dict[str, str]:
    """Hashes: of a run's finished stages, of all files of another directory, of a file."""
    if output.is_file():
        return {output.name: hashlib.sha256(output.read_bytes()).hexdigest()}
    if (output / "run.json").is_file():
        return hashes(output)
    return {str(p.relative_to(output)): hashlib.sha256(p.read_bytes()).hexdigest() for p in output.rglob("*") if p.is_file()}


def _remove(output: Path) -> None:
    output.unlink() if output.is_file() else shutil.rmtree(output)


@pytest.mark.parametrize("name", [name if name == "learned_rounding" else pytest.param(name, marks=pytest.mark.slow) for name in CHAINS])
def test_chains(name: str, commands: Processes, models: dict[str, Path], small_text: Path, tmp_path: Path) -> None:
    model, stages = CHAINS[name]
    recipe = write_recipe(tmp_path / "r.yaml", stages, **FEW)
    arguments = ["run", str(recipe), "-m", str(models[model]), "--data", str(small_text), "-o", str(tmp_path / "run"), "--device", "cpu"]
    ends_at_same_bits(commands, arguments, tmp_path / "run", tmp_path, KILLS, random.Random(name))


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 8])
def test_sweep(kills: int, commands: Processes, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    """Killed within a point and between points."""
    recipe = write_recipe(tmp_path / "r.yaml", [RTN, {"decompose": {"method": "zeroquant_v2", "rank": 2}}], **FEW)
    arguments = ["sweep", str(recipe), "-m", str(small_model), "--data", str(small_text), "-o", str(tmp_path / "run"), "--device", "cpu"]
    arguments += ["--over", "decompose.rank=2,4"]
    ends_at_same_bits(commands, arguments, tmp_path / "run", tmp_path, kills, random.Random("sweep"))
    assert len([name for name in hashes(tmp_path / "run") if name.endswith("artifact.json")]) == 1 + 1 + 2


@pytest.mark.parametrize("form", ["gptq-v2", *(pytest.param(form, marks=pytest.mark.slow) for form in ("compressed-tensors", "dense"))])
def test_export(form: str, commands: Processes, finished: Path, tmp_path: Path) -> None:
    """No half directory under its name; repeated, the same bytes, and nothing else."""
    arguments = ["export", str(finished), "--format", form, "--stage", "quantize", "-o", str(tmp_path / "out" / "model")]
    (tmp_path / "out").mkdir()
    draw = random.Random(form)
    ends_at_same_bits(commands, arguments, tmp_path / "out" / "model", tmp_path, KILLS, draw, anew=True)
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "model"]


@pytest.mark.parametrize("form", ["json", *(pytest.param(form, marks=pytest.mark.slow) for form in ("html", "csv"))])
def test_report_export(form: str, commands: Processes, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / f"report.{form}"
    arguments = ["report", "export", str(finished), "--format", form, "-o", str(output)]
    ends_at_same_bits(commands, arguments, output, tmp_path, 1, random.Random(form), anew=True)
