"""Matrices of a block compressed in the order of their calls: matrices of one input form a group, each group sees what came before."""

import signal
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.metrics import output_error
from bitmend.pipelines.errors import UsageError
from bitmend.pipelines.models.blocks import StreamedModel
from bitmend.pipelines.models.collecting import collecting, input_groups
from bitmend.pipelines.recipes.recipe import resolve
from bitmend.pipelines.run import runner
from bitmend.pipelines.stages.baseline import build_baseline
from bitmend.pipelines.stages.inputs import Inputs
from safetensors.torch import load_file

from ..families import save_speaking, save_tiny
from ..runs import Processes, chosen, hashes, stage_directory, write_recipe

pytestmark = pytest.mark.usefixtures("no_pages")

CPU = torch.device("cpu")
GROUPS = {
    "llama": [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}],
    "phi3": [{"qkv_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}],
    "gpt2": [{"c_attn"}, {"c_proj"}, {"c_fc"}, {"c_proj"}],
    "gpt_neox": [{"query_key_value"}, {"dense"}, {"dense_h_to_4h"}, {"dense_4h_to_h"}],
    "opt": [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}],
    "mixtral": [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}],
}
MANY: dict[str, Any] = {"calibration": {"samples": 4, "seq_len": 32}, "evaluation": {"seq_len": 32, "windows": 1}}


@pytest.mark.parametrize("family", GROUPS)
def test_groups_of_every_family(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "source")
    made = build_baseline(tmp_path / "source", tmp_path / "b.partial", tmp_path / "b", {"key": "k", "parent": None, "stage": {}})
    model = StreamedModel(made, CPU)
    hidden = model.embed(torch.arange(5, 29).view(2, 12))
    model.load_block(1)
    sites = model.structure.of_block(1)
    actual = input_groups(model, 1, sites, hidden)
    leaves = [{(s.parameter if s.expert is not None else s.name.rpartition(".")[2]) for s in group} for group in actual]
    assert leaves == GROUPS[family]
    assert sorted(s.name for group in actual for s in group) == sorted(s.name for s in sites), "each once, idle experts included"
    assert all(not module._forward_pre_hooks for module in model.model.modules())


STAGES: dict[str, dict[str, Any]] = {
    "prune": {"prune": {"method": "sparsegpt", "sparsity": 0.5}},
    "quantize": {"quantize": {"method": "gptq", "bits": 2, "group_size": 32}},
    "decompose": {"decompose": {"method": "qera_exact", "rank": 4}},
}
BEFORE = {"decompose": [{"quantize": {"method": "rtn", "bits": 2, "group_size": 32}}]}


def run(place: Path, model: Path, text: Path, name: str, **settings: Any) -> Path:
    place.mkdir()
    ((stage, common),) = STAGES[name].items()
    recipe = chosen(place, model, text, [*BEFORE.get(name, []), {stage: {**common, **settings}}], **MANY)
    runner.run(recipe, place / "run")
    return place / "run"


@pytest.mark.parametrize("name", STAGES)
def test_one_group_is_the_plain_path(name: str, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    """Only q, k and v are left: nothing comes before them."""
    ignore = ["o_proj", "mlp"]
    plain = run(tmp_path / "plain", small_model, small_text, name, ignore=ignore)
    sequential = run(tmp_path / "sequential", small_model, small_text, name, ignore=ignore, true_sequential=True)
    one, other = (sorted(h for n, h in hashes(r).items() if n.endswith("safetensors")) for r in (plain, sequential))
    assert one == other and len(one) > 8


@pytest.mark.parametrize("name", STAGES)
def test_later_groups_see_what_the_earlier_became(name: str, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    """What is reported of o_proj is measured on inputs that pass through the finished q, k and v, here put in place by hand."""
    sequential = run(tmp_path / "s", small_model, small_text, name, true_sequential=True)
    made = runner.last_artifact(sequential)
    plain = runner.last_artifact(run(tmp_path / "p", small_model, small_text, name))
    block, o_proj = "model.layers.0.self_attn", "model.layers.0.self_attn.o_proj"
    assert made.stored(f"{block}.q_proj").dense().equal(plain.stored(f"{block}.q_proj").dense())
    assert not made.stored(o_proj).dense().equal(plain.stored(o_proj).dense())
    parent = runner.last_artifact(sequential, "quantize" if name == "decompose" else "baseline")
    ids = Inputs(resolve(str(sequential / "recipe.resolved.yaml")), small_model).calibration()
    weight = load_file(small_model / "model.safetensors")[f"{o_proj}.weight"]
    errors = {}
    for in_place in (False, True):
        model = StreamedModel(parent, CPU)
        hidden = model.embed(ids)
        model.load_block(0)
        sites = {s.name: s for s in model.structure.of_block(0)}
        for leaf in ("q_proj", "k_proj", "v_proj") if in_place else ():
            model.put(sites[f"{block}.{leaf}"], made.stored(f"{block}.{leaf}"))
        statistics: dict[str, Any] = {}
        with torch.no_grad(), collecting(model, [sites[o_proj]], frozenset({"samples"}), statistics):
            model.run_block(0, hidden)
        errors[in_place] = output_error(made.stored(o_proj).dense(), weight, statistics[o_proj].samples_TI)
    reported = next(x.relative_output_error for x in runner.record(sequential).stages[-1].layers if x.name == o_proj)
    assert reported == pytest.approx(errors[True], rel=1e-4)
    assert abs(errors[False] / errors[True] - 1) > 1e-3


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "gpt_neox"])
def test_other_families(family: str, small_model: Path, small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix gets a record, in as many passes as there are groups."""
    passes: list[list[str]] = []
    walk = import_module("bitmend.pipelines.stages.compress")
    plain: Callable[..., Any] = walk._statistics

    def counted(stage: Any, states: Any, index: int, sites: list[Any], replay: Any) -> Any:
        passes.append([site.name for site in sites])
        return plain(stage, states, index, sites, replay)

    monkeypatch.setattr(walk, "_statistics", counted)
    save_speaking(family, tmp_path / "source", small_model, num_hidden_layers=2)
    made = run(tmp_path / "run", tmp_path / "source", small_text, "quantize", true_sequential=True, group_size=16)
    assert len(passes) == 2 * 4
    artifact = runner.last_artifact(made)
    assert set(artifact.linears) == {name for group in passes for name in group}


def test_killed_and_gone_on_with(commands: Processes, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", [{"quantize": {"method": "gptq", "bits": 3, "true_sequential": True}}], **MANY)
    arguments = ["run", str(recipe), "-m", str(small_model), "--data", str(small_text), "--device", "cpu", "-o"]
    end = {"signal": signal.SIGKILL, "path": "block-00002", "step": 2}
    assert commands.run([*arguments, str(tmp_path / "run")], tmp_path / "log", end) == -signal.SIGKILL
    assert commands.run([*arguments, str(tmp_path / "run")], tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert commands.run([*arguments, str(tmp_path / "other")], tmp_path / "log") == 0
    assert hashes(tmp_path / "run") == hashes(tmp_path / "other")


def test_methods_that_train_a_whole_block_have_no_order(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.yaml", [{"quantize": {"method": "learned_rounding", "true_sequential": True}}])
    with pytest.raises(UsageError, match="learned_rounding trains a block as a whole, so its matrices have no order"):
        resolve(str(path))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("head", [False, True])
def test_correction_toward_the_dense_inputs(family: str, head: bool, small_model: Path, tmp_path: Path, small_text: Path) -> None:
    """Also the head has a dense twin; the first matrices and the experts have nothing to correct toward and stay what they were."""
    save_speaking(family, tmp_path / "source", small_model)
    records = []
    for correction in (0.0, 0.5):
        place = tmp_path / str(correction)
        place.mkdir()
        stage = {"quantize": {"method": "gptq", "bits": 3, "group_size": 16, "correction": correction, "include_head": head}}
        runner.run(chosen(place, tmp_path / "source", small_text, [stage], **MANY), place / "run")
        directory = stage_directory(place / "run", "quantize")
        records.append(
            {k: t for f in sorted(directory.glob("*.matrices.safetensors")) for k, t in load_file(f).items() if k.endswith("codes")}
        )
    plain, corrected = records
    changed = {name for name in plain if not torch.equal(plain[name], corrected[name])}
    assert changed and plain.keys() == corrected.keys()
    leaves = ("expert", "q_proj", "k_proj", "v_proj", "c_attn")
    first = {n for n in plain if ("layers.0." in n or "h.0." in n) and any(leaf in n for leaf in leaves)}
    assert first and not first & changed, "what enters the first block is the dense model's, and experts are paired with themselves"
    assert any("lm_head" in name for name in changed) == head
