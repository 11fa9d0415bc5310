"""Embeddings and head inside a budget: what an error there costs against what it does cost, what is chosen, stored, done again and refused."""

import itertools
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitmend.compress.grids import UniformGrid
from bitmend.compress.lowrank import Metric
from bitmend.compress.rounding import RtnConfig, round_uniform
from bitmend.compress.weights import DenseWeight, StoredWeight, UniformWeight
from bitmend.pipelines.allocation import error_tables, outside_errors
from bitmend.pipelines.allocation.choice import Choice, ChosenSetting, choose_settings, losses, read_choice, resolved
from bitmend.pipelines.allocation.error_tables import ErrorTable, build, table_key
from bitmend.pipelines.allocation.outside_errors import Lookup, Product, gain
from bitmend.pipelines.allocation.spending import Costs, costs, settings_of, spent
from bitmend.pipelines.models.sizes import apply, dense_sizes
from bitmend.pipelines.models.source import load_config
from bitmend.pipelines.models.structure import inspect, skeleton
from bitmend.pipelines.planning.plan import predict, refusals
from bitmend.pipelines.recipes.recipe import Recipe, resolve
from bitmend.pipelines.run import runner
from bitmend.pipelines.stages.baseline import build_baseline, fingerprint
from bitmend.pipelines.stages.context import Context
from bitmend.pipelines.stages.inputs import Inputs
from bitmend.pipelines.store.kept import keep, kept
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ..runs import write_recipe

pytestmark = pytest.mark.usefixtures("no_pages")

CPU = torch.device("cpu")
TABLE = "model.embed_tokens"
RTN: dict[str, Any] = {"method": "rtn", "clip": "none", "include_embeddings": True}
FEW_MATRICES: dict[str, Any] = {"ignore": [r"layers\.[1-3]\.", "mlp", "[qo]_proj"]}
"""Leaves k and v of the first block."""
BITS = (3, 4, 5, 6, 8)
FEW: dict[str, Any] = {"bits": [3, 4], "group_sizes": 64, "ranks": 0}


def asked(place: Path, model: Path, text: Path, budget: str, quantize: dict[str, Any], **allocation: Any) -> Recipe:
    texts = {"calibration": {"samples": 4, "seq_len": 64}, "evaluation": {"seq_len": 64, "windows": 16}}
    path = write_recipe(place / "r.yaml", [{"quantize": RTN | quantize}], allocation=FEW | allocation, **texts)
    return resolve(str(path), options={"model": str(model), "data": str(text), "budget": budget})


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    """The small model with a head of its own, which is the same matrix."""
    place = tmp_path_factory.mktemp("apart")
    shutil.copytree(small_model, place, dirs_exist_ok=True)
    (place / "config.json").write_text(json.dumps(json.loads((place / "config.json").read_text()) | {"tie_word_embeddings": False}))
    tensors = load_file(place / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors[f"{TABLE}.weight"].clone()}, place / "model.safetensors", metadata={"format": "pt"})
    return place


def counted(recipe: Recipe, source: Path) -> Costs:
    model = skeleton(load_config(source))
    return costs(recipe, spent(recipe), dense_sizes(model, inspect(model, include_head=True), 4))


def context_of(place: Path, source: Path, recipe: Recipe) -> Context:
    key = fingerprint(source)
    manifest = {"key": key, "parent": None, "stage": {"name": "baseline", "method": None}}
    baseline = build_baseline(source, place / "b.partial", place / "b", manifest)
    return Context(baseline, baseline, place / "metrics", place / "states", place, CPU, torch.float32, 0, Inputs(recipe, source), lambda: False)


def built(place: Path, recipe: Recipe, context: Context, source: Path) -> tuple[ErrorTable, Costs]:
    actual = counted(recipe, source)
    made = build(place, context.baseline, spent(recipe), settings_of(recipe, spent(recipe)), actual.outside, recipe.allocation, context)
    return made, actual


@dataclass(frozen=True)
class Built:
    place: Path
    recipe: Recipe
    context: Context
    table: ErrorTable
    actual: Costs


@pytest.fixture(scope="module")
def whole(apart: Path, small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The table of the model with a head of its own, never interrupted: two matrices of a block, the embeddings, the head."""
    place = tmp_path_factory.mktemp("whole")
    recipe = asked(place, apart, small_text, "3MB", {"head_bits": 4, **FEW_MATRICES}, bits=4, embedding_bits=list(BITS))
    context = context_of(place, apart, recipe)
    return Built(place / "table", recipe, context, *built(place / "table", recipe, context, apart))


# -- what an error costs -----------------------------------------------------------------------------------------------------------


def test_nats_are_about_those_that_rounding_costs(
    whole: Built, small_model: Path, apart: Path, small_text: Path, tmp_path: Path
) -> None:
    """The KL divergence to the exact model is the same to second order, and has no first-order part that chance makes large compared with few nats."""
    recipe = asked(tmp_path, small_model, small_text, "1MB", FEW_MATRICES, bits=4, embedding_bits=list(BITS))
    both = built(tmp_path / "table", recipe, context_of(tmp_path, small_model, recipe), small_model)
    predicted = []
    for table, actual in (both, (whole.table, whole.actual)):
        for each, losses_K in zip(actual.outside, losses(table, "fisher")[2:], strict=True):
            predicted.append([losses_K[actual.settings.index(setting)] for setting in each.settings])
    tied, *of_uses = predicted
    assert tied == pytest.approx(np.sum(of_uses, 0), rel=1e-6) and len(of_uses) == 2, "one matrix pays for both of its uses"

    model, ids_NT = AutoModelForCausalLM.from_pretrained(apart).eval(), Inputs(recipe, apart).evaluation().ids
    ends = [model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data]
    exact = ends[0].clone()
    on_grid = {size: round_uniform(exact, UniformGrid(size, 64), "power").dense() for size in BITS}

    def log_p() -> torch.Tensor:
        with torch.no_grad():
            return model(ids_NT).logits[:, :-1].log_softmax(-1)

    reference = log_p()
    for uses, predictions in (((0, 1), tied), ((0,), of_uses[0]), ((1,), of_uses[1])):
        divergences, rises = [], []
        for size in BITS:
            for use in uses:
                ends[use].copy_(on_grid[size])
            rounded = log_p()
            rises.append(float((reference - rounded).gather(-1, ids_NT[:, 1:, None]).mean()))
            divergences.append(float(torch.nn.functional.kl_div(rounded, reference, log_target=True, reduction="none").sum(-1).mean()))
            for end in ends:
                end.copy_(exact)
        assert predictions == sorted(predictions, reverse=True) and divergences == sorted(divergences, reverse=True)
        assert all(0.7 < cost / measured < 1.4 for cost, measured in zip(predictions, divergences, strict=True))
        assert 0.4 < predictions[0] / rises[0] < 2.5, "of 3 bits, the log-perplexity itself"


def test_rows_some_at_once_are_all_rows_and_an_error_is_that_of_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the outputs themselves, token by token; pruned, with rows that the text never looks up."""
    generator = torch.Generator().manual_seed(0)
    weight_OI, x_TI = torch.randn(50, 16, generator=generator), torch.randn(40, 16, generator=generator).double()
    ids_T, squares = torch.randint(30, (40,), generator=generator), torch.rand(50, generator=generator)
    record = StoredWeight(DenseWeight(weight_OI)).with_mask(torch.rand(50, 16, generator=generator) > 0.3)
    share_O = torch.bincount(ids_T, minlength=50).double() / 40
    uses = [Lookup(share_O, gain(16, squares[:16], 3.0)), Product(Metric(moment_II=x_TI.T @ x_TI / 40), gain(50, squares, 3.0))]
    configs = [RtnConfig(bits, 8) for bits in (3, 4)]
    monkeypatch.setattr(outside_errors, "ROWS_AT_ONCE", 7)
    errors_VK, energy_V = outside_errors.outside_errors(StoredWeight(DenseWeight(weight_OI)), record, configs, uses, CPU)
    for k, config in enumerate(configs):
        kept_OI = weight_OI.where(record.mask_OI(), 0)
        lost_OI = (weight_OI - round_uniform(kept_OI, UniformGrid(config.bits, 8), "power").dense()).where(record.mask_OI(), weight_OI).double()
        for v, (of_columns, of_rows) in enumerate(((torch.ones(16), torch.ones(50)), (squares[:16] * 1.5, squares * 1.5))):
            for actual, wanted_OI in ((errors_VK[v, k], lost_OI), (energy_V[v], weight_OI.double())):
                looked_up = (wanted_OI[ids_T].square() * of_columns).sum(1).mean()
                multiplied = ((x_TI @ wanted_OI.T).square() * of_rows).sum(1).mean()
                assert float(actual) == pytest.approx(float(looked_up + multiplied), rel=1e-6)


# -- what is chosen and stored -----------------------------------------------------------------------------------------------------


def test_a_tight_budget_gives_the_table_fewer_bits(whole: Built, apart: Path, small_text: Path, tmp_path: Path) -> None:
    given: list[tuple[int, ...]] = []
    for budget in ("2.49MB", "2.53MB", "2.57MB", "2.62MB"):
        recipe = asked(tmp_path, apart, small_text, budget, {"head_bits": 4, **FEW_MATRICES}, bits=4, embedding_bits=list(BITS))
        chosen = choose_settings(recipe, spent(recipe), counted(recipe, apart), whole.table)
        given.append(tuple(row.setting.grid.bits for row in chosen.rows[2:]))
        assert [(row.name, row.key, row.tied) for row in chosen.rows[2:]] == [(TABLE, "embedding_bits", False), ("lm_head", "head_bits", False)]
        (quantize,) = resolved(recipe, spent(recipe), chosen)
        assert (quantize.embedding_bits, quantize.head_bits) == given[-1]
    assert all(fewer <= more for one, other in itertools.pairwise(given) for fewer, more in zip(one, other, strict=True))
    assert all(fewer < more for fewer, more in zip(given[0], given[-1], strict=True)), given


def test_what_is_chosen_is_stored(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    recipe = asked(tmp_path, small_model, small_text, "1.96MB", {"ignore": [r"layers\.[1-3]\."]})
    stage, artifact = runner.run(recipe, tmp_path / "run", device="cpu").stages[1], runner.last_artifact(tmp_path / "run")
    (chosen,) = [c for path in (tmp_path / "run").glob("allocation/*/choice-*.json") if (c := read_choice(path)) is not None]
    rows, base = {row.name: row for row in chosen.rows}, artifact.stored(TABLE).base
    row = rows[TABLE]
    assert set(rows) == set(artifact.linears) and len(rows) == 8 and (row.key, row.tied) == ("embedding_bits", True)
    assert isinstance(base, UniformWeight) and (base.bits, base.group_size) == (row.setting.grid.bits, 64)
    assert 0 < row.bytes - base.stored_bits() / 8 < 300, "headers count"
    assert stage.total_bytes is not None and 0.98 * 1.96e6 < stage.total_bytes <= 1.96e6
    planned = predict(recipe, tmp_path / "run")
    assert planned["stages"][1]["total_bytes"] == pytest.approx(stage.total_bytes, abs=300) and planned["allocation"]["table"] == "is there"
    layer = next(layer for layer in stage.layers if layer.name == TABLE)
    assert layer.metrics["bits"] == row.setting.grid.bits and layer.metrics["predicted_loss"] == row.predicted_loss > 0
    assert layer.metrics["measured_loss"] is layer.metrics["predicted_output_error"] is None and layer.relative_output_error
    (tmp_path / "run" / next((tmp_path / "run").glob("allocation/*")) / "outside.safetensors").unlink()
    (next((tmp_path / "run").glob("allocation/*/choice-*"))).unlink()
    assert predict(recipe, tmp_path / "run")["allocation"]["table"] == f"will be built for {TABLE}"


def test_what_is_counted_is_what_the_plan_stores(apart: Path, small_text: Path, tmp_path: Path) -> None:
    """Any choice at all; the head has been pruned, so it has a mask."""
    recipe = asked(tmp_path, apart, small_text, "1MB", {"head_bits": 4, "group_size": 48})
    prune = resolve(str(write_recipe(tmp_path / "p.yaml", [{"prune": {"method": "wanda", "include_head": True}}]))).stages
    recipe = recipe.model_copy(update={"stages": (*prune, *recipe.stages)})
    model, stages = skeleton(load_config(apart)), spent(recipe)
    actual, sizes = counted(recipe, apart), dense_sizes(model, inspect(model, include_head=True), 4)
    assert [(each.site.name, each.key, each.tied) for each in actual.outside] == [(TABLE, "embedding_bits", False), ("lm_head", "head_bits", False)]
    assert {config.group_size for each in actual.outside for config in each.configs} == {32}, "the largest below 48 that divides 128"
    generator = np.random.default_rng(0)
    picked = [int(generator.choice(np.flatnonzero(np.isfinite(bytes_K)))) for bytes_K in actual.bytes_MK]
    keys = {each.site.name: each.key for each in actual.outside}
    rows = [
        ChosenSetting(site.name, actual.settings[k], 0, 0, 0, 0, 0, keys.get(site.name)) for site, k in zip(actual.sites, picked, strict=True)
    ]
    for spec in resolved(recipe, stages, Choice("1MB", "relative", rows, 1, "", 0, 0, 0, 0, 0)):
        apply(spec, sizes)
    assert actual.bytes_MK[range(30), picked].sum() + actual.rest_bytes == pytest.approx(sizes.total_bytes(), abs=1)


# -- what is done again ------------------------------------------------------------------------------------------------------------


def test_a_table_that_was_stopped_is_the_same(whole: Built, apart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("block-00001", "outside"):

        def ends(path: Path, *rest: Any, name: str = name) -> None:
            if path.name.startswith(name):
                raise KeyboardInterrupt
            keep(path, *rest)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(error_tables, "keep", ends)
            built(tmp_path, whole.recipe, whole.context, apart)
        assert not (tmp_path / "outside.safetensors").exists()
    again, _ = built(tmp_path, whole.recipe, whole.context, apart)
    assert np.array_equal(whole.table.relative_MVK, again.relative_MVK) and np.array_equal(whole.table.energy_MV, again.energy_MV)
    for path in whole.place.iterdir():
        (ours, _), (theirs, _) = kept(path) or ({}, {}), kept(tmp_path / path.name) or ({}, {})
        assert ours.keys() == theirs.keys() and len(ours) == {"outside.safetensors": 4, "block-00000.safetensors": 4}.get(path.name, 0)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_table_of_the_blocks_alone_keeps_its_name(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    keys = {}
    for budget, bits in (("3bpw", None), ("3bpw", []), ("1MB", []), ("1MB", None), ("3bpw", [4, 5, 6, 8]), ("1MB", [4, 8])):
        recipe = asked(tmp_path, small_model, small_text, budget, {}, embedding_bits=bits)
        stages, actual = spent(recipe), counted(recipe, small_model)
        keys[budget, str(bits)] = table_key("k", "c", stages, settings_of(recipe, stages), actual.outside, recipe.allocation, {})
    alone = {keys["3bpw", "None"], keys["3bpw", "[]"], keys["1MB", "[]"]}
    assert len(alone) == 1 and keys["1MB", "None"] == keys["3bpw", "[4, 5, 6, 8]"] and len(set(keys.values())) == 3


# -- before any work ---------------------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[bool, str, dict[str, Any], dict[str, Any], list[tuple[str, str]] | str]] = {
    # tied, budget, settings of quantize, of the allocation, what is in the budget or the words that refuse it
    "tied": (True, "1MB", {}, {}, [(TABLE, "embedding_bits")]),
    "tied, said of the head": (True, "1MB", {"include_embeddings": False, "head_bits": 4}, {}, [("lm_head", "head_bits")]),
    "apart": (False, "3MB", {"head_bits": 6}, {}, [(TABLE, "embedding_bits"), ("lm_head", "head_bits")]),
    "apart, the table ignored": (False, "3MB", {"head_bits": 6, "ignore": "embed_tokens"}, {}, [("lm_head", "head_bits")]),
    "apart, the head by the method": (False, "3MB", {"include_head": True}, {}, [(TABLE, "embedding_bits")]),
    "tied, the head by the method": (True, "1MB", {"include_head": True}, {}, []),
    "left to the stage": (True, "1MB", {}, {"embedding_bits": []}, []),
    "bits per weight": (True, "3.5bpw", {}, {}, []),
    "bits per weight of all": (True, "5bpw", {}, {"embedding_bits": 4}, [(TABLE, "embedding_bits")]),
    "nothing to round": (True, "3bpw", {"include_embeddings": False}, {"embedding_bits": 4}, r"rounds neither the embeddings nor a head of its own"),
    "compressed already": (True, "1MB", {"include_head": True}, {"embedding_bits": 4}, r"rounds neither .*; set quantize\.include_embeddings"),
    "too little for all": (True, "300kB", {}, {}, r"infeasible: the smallest that the choices of `allocation` can store is 3\d\d\.\d+kB"),
    "too few bits for all": (True, "3.5bpw", {}, {"bits": 3, "embedding_bits": 8}, r"infeasible: the smallest .* can store is 4\.\d+bpw"),
    "an override for the table": (True, "1MB", {"overrides": {"embed_tokens": {"bits": 8}}}, {}, r"overrides: 'embed_tokens' matches none"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_in_the_budget(case: str, small_model: Path, apart: Path, small_text: Path, tmp_path: Path) -> None:
    tied, budget, settings, allocation, expected = CASES[case]
    source = small_model if tied else apart
    recipe = asked(tmp_path, source, small_text, budget, settings, **allocation)
    refused = refusals(recipe, source)
    if isinstance(expected, str):
        assert len(refused) == 1 and re.search(expected, refused[0]), refused
        return
    actual = counted(recipe, source)
    assert refused == [] and [(each.site.name, each.key) for each in actual.outside] == expected
    assert [site.name for site in actual.sites if site.block is None] == [name for name, _ in expected]
    weights = sum(s.shape[0] * s.shape[1] for s in actual.sites)
    assert actual.weights == weights == 131_072 * len(expected) + 4 * 147_456
