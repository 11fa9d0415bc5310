"""Blocks that share a mean sparsity: the mean is what was set, every method takes part, overrides win, a resumed run is the same."""

import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.sparsity import by_outliers, outlier_share
from bitmend.pipelines.errors import UsageError
from bitmend.pipelines.models.loading import whole_model
from bitmend.pipelines.recipes.recipe import resolve
from bitmend.pipelines.run import runner
from bitmend.pipelines.run.opening import opened
from bitmend.pipelines.stages.inputs import Inputs
from bitmend.reports.record import StageRecord

from ..runs import Processes, chosen, hashes, stage_directory, write_recipe

pytestmark = pytest.mark.usefixtures("no_pages")

FEW = {"calibration": {"samples": 2, "seq_len": 64}, "evaluation": {"seq_len": 32, "windows": 1}}


def pruned(place: Path, model: Path, text: Path, **settings: Any) -> StageRecord:
    return runner.run(chosen(place, model, text, [{"prune": settings}], **FEW), place / "run").stages[-1]


def of_blocks(stage: StageRecord, leaf: str) -> list[float]:
    return [layer.sparsity or 0.0 for layer in stage.layers if layer.name.endswith(leaf)]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("allocation", ["depth", "outliers"])
def test_the_mean_is_what_was_asked_for(method: str, allocation: str, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    stage = pruned(tmp_path, small_model, small_text, method=method, sparsity=0.45, allocation=allocation, spread=0.15)
    assert stage.sparsity == pytest.approx(0.45, abs=64 / 589_824), "to half a column of the last matrix"
    shares = of_blocks(stage, "down_proj")
    assert max(shares) - min(shares) > 0.14
    assert stage.metrics["block_sparsity"] == pytest.approx(shares, abs=0.01), "alike within a block"
    if allocation == "depth":
        assert shares == pytest.approx([0.3, 0.4, 0.5, 0.6], abs=0.01)


def keep(inputs: dict[str, torch.Tensor], name: str, module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
    inputs[name] = args[0].flatten(0, 1)


def test_outliers_are_those_of_the_dense_models_inputs(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    """By hand, on the whole model: OWL pools all matrices of a block, before anything is pruned."""
    recipe = chosen(tmp_path, small_model, small_text, [{"prune": {"method": "magnitude", "allocation": "outliers"}}], **FEW)
    stage = runner.run(recipe, tmp_path / "run").stages[-1]
    with opened(str(small_model)) as artifact:
        model = whole_model(artifact, torch.device("cpu"), torch.float32).model
    inputs: dict[str, torch.Tensor] = {}
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in name}
    for name, module in linears.items():
        module.register_forward_pre_hook(partial(keep, inputs, name))
    with torch.no_grad():
        model(Inputs(recipe, small_model).calibration())
    shares = [
        outlier_share([(m.weight.detach(), inputs[n].norm(dim=0)) for n, m in linears.items() if n.startswith(f"model.layers.{index}.")])
        for index in range(4)
    ]
    assert len(set(shares)) == 4
    assert stage.metrics["block_sparsity"] == pytest.approx(by_outliers(shares, 0.5, 0.08), abs=2e-3)


def test_overrides_win_and_the_others_share_the_mean(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    own = {"o_proj": {"sparsity": 0.1}, "layers.1.mlp.up": {"pattern": "2:4", "sparsity": 0.5, "allocation": "uniform"}}
    stage = pruned(tmp_path, small_model, small_text, method="wanda", sparsity=0.4, allocation="depth", overrides=own)
    assert of_blocks(stage, "o_proj") == pytest.approx([0.1] * 4, abs=0.005)
    assert of_blocks(stage, "layers.1.mlp.up_proj") == [0.5]
    sizes = {"q_proj": 128 * 128, "k_proj": 64 * 128, "v_proj": 64 * 128}
    shared = [x for x in stage.layers if "o_proj" not in x.name and "layers.1.mlp.up" not in x.name]
    weights = [sizes.get(x.name.rpartition(".")[2], 128 * 256) for x in shared]
    mean = sum((x.sparsity or 0) * w for x, w in zip(shared, weights, strict=True)) / sum(weights)
    assert mean == pytest.approx(0.4, abs=64 / sum(weights) + 1e-9)


REFUSED = {
    "a pattern": ({"pattern": "2:4", "allocation": "depth"}, "pattern 2:4 fixes the sparsity of every matrix; allocation 'depth' needs"),
    "a rule for some": ({"overrides": {"q_proj": {"allocation": "depth"}}}, "one mean is shared among all blocks; set prune.allocation"),
    "a spread of nothing": ({"spread": 0.1}, "spread 0.1 has nothing to spread under allocation 'uniform'"),
    "a spread beyond all": ({"allocation": "depth", "spread": 1.5}, r"prune\.spread: expected \[0, 1\) or null, got 1\.5"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_refusals(case: str, method: str, tmp_path: Path) -> None:
    settings, words = REFUSED[case]
    with pytest.raises(UsageError, match=words):
        resolve(str(write_recipe(tmp_path / "r.yaml", [{"prune": {"method": method, "sparsity": 0.5, **settings}}])))


def test_killed_and_gone_on_with(commands: Processes, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    stages = [{"prune": {"method": "sparsegpt", "allocation": "outliers"}}]
    recipe = write_recipe(tmp_path / "r.yaml", stages, **FEW)
    arguments = ["run", str(recipe), "-m", str(small_model), "--data", str(small_text), "--device", "cpu", "-o"]
    end = {"signal": signal.SIGKILL, "path": "block-00002.part.json", "step": 1}
    assert commands.run([*arguments, str(tmp_path / "run")], tmp_path / "log", end) == -signal.SIGKILL
    kept = stage_directory(tmp_path / "run", "prune").with_suffix(".partial") / "outliers.json"
    assert kept.is_file(), "the dense pass is not run again"
    assert commands.run([*arguments, str(tmp_path / "run")], tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert commands.run([*arguments, str(tmp_path / "other")], tmp_path / "log") == 0
    assert hashes(tmp_path / "run") == hashes(tmp_path / "other") and len(hashes(tmp_path / "run")) > 8
    assert not list(tmp_path.glob("run/stages/*/outliers.json")), "no part of the artifact"
