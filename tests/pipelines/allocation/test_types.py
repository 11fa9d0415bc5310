"""A budget spent on types of ggml: kept to the byte, mixed in the GGUF file, no worse than one type for all, and refused before any work."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bitmend.compress.ggml_types import GGML_TYPES, type_for
from bitmend.compress.weights import GgmlWeight
from bitmend.pipelines.allocation.choice import Choice, ChosenSetting, resolved
from bitmend.pipelines.allocation.error_tables import table_key
from bitmend.pipelines.allocation.spending import costs, settings_of, spent
from bitmend.pipelines.errors import UsageError
from bitmend.pipelines.export.exporting import export
from bitmend.pipelines.models.sizes import apply, dense_sizes
from bitmend.pipelines.models.source import load_config
from bitmend.pipelines.models.structure import inspect, skeleton
from bitmend.pipelines.planning.plan import predict
from bitmend.pipelines.recipes.recipe import Recipe, resolve
from bitmend.pipelines.run import runner
from bitmend.pipelines.run.opening import last_artifact
from bitmend.reports.record import RunRecord
from gguf import GGUFReader

from ..runs import write_recipe

pytestmark = pytest.mark.usefixtures("no_pages")

GPTQ: dict[str, Any] = {"quantize": {"method": "gptq", "grid": "q3_k", "include_embeddings": True, "embedding_bits": 6}}
ALL_BITS: dict[str, Any] = {"embedding_bits": [2, 3, 4, 5, 6, 8]}
WANDA: dict[str, Any] = {"prune": {"method": "wanda", "pattern": "2:4"}}
TERM: dict[str, Any] = {"decompose": {"method": "qera_exact", "rank": 2}}


@pytest.fixture(scope="module")
def asked(small_model: Path, small_text: Path) -> Callable[..., Recipe]:
    def make(place: Path, budget: str | None, chain: list[dict[str, Any]] | None = None, sets: list[str] | None = None, **allocation: Any) -> Recipe:
        path = write_recipe(place / "r.yaml", chain or [GPTQ], allocation=allocation)
        return resolve(str(path), sets=sets, options={"model": str(small_model), "data": str(small_text), "budget": budget})

    return make


@pytest.fixture(scope="module")
def one_type(asked: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunRecord]:
    place = tmp_path_factory.mktemp("types")
    return place / "run", runner.run(asked(place, None), place / "run", device="cpu")


def bits_of(run: Path) -> tuple[int, int]:
    """(bits of every matrix on a grid, their weights)."""
    artifact = last_artifact(run)
    stored = [artifact.stored(name) for name in artifact.linears]
    return sum(record.stored_bits() for record in stored), sum(record.shape[0] * record.shape[1] for record in stored)


@pytest.fixture(scope="module")
def chosen_run(asked: Callable[..., Recipe], one_type: tuple[Path, RunRecord]) -> tuple[Path, RunRecord, tuple[int, int]]:
    """At the bits of one type for all, embeddings included."""
    run, _ = one_type
    spent_bits = bits_of(run)
    budget = f"{np.ceil(1000 * spent_bits[0] / spent_bits[1]) / 1000}bpw"
    return run, runner.run(asked(run.parent, budget, **ALL_BITS), run, device="cpu"), spent_bits


def test_no_worse_than_one_type_at_its_bytes(one_type: tuple[Path, RunRecord], chosen_run: tuple[Path, RunRecord, tuple[int, int]]) -> None:
    run, made, (bits, weights) = chosen_run
    now, again = bits_of(run)
    assert again == weights and bits * 0.97 < now <= bits * 1.001
    first, last = one_type[1].stages[-1].perplexity, made.stages[-1].perplexity
    assert first is not None and last is not None and last <= first


def test_the_file_holds_the_types_that_were_chosen(chosen_run: tuple[Path, RunRecord, tuple[int, int]], tmp_path: Path) -> None:
    run, made, _ = chosen_run
    artifact = last_artifact(run)
    kinds: dict[str, str] = {}
    for layer in made.stages[-1].layers:
        base = artifact.stored(layer.name).base
        assert isinstance(base, GgmlWeight) and base.type == type_for(layer.metrics["grid"], base.shape[1])
        assert base.stored_bits() == layer.metrics["bytes"] * 8
        kinds[layer.name] = base.type
    assert len(kinds) == 29 and len(set(kinds.values())) >= 3
    export(run, "gguf", tmp_path / "m.gguf")
    held = {tensor.name: tensor.tensor_type.name.lower() for tensor in GGUFReader(tmp_path / "m.gguf").tensors if len(tensor.shape) == 2}
    assert held["token_embd.weight"] == kinds["model.embed_tokens"] and sorted(held.values()) == sorted(kinds.values())
    assert held["blk.2.ffn_down.weight"] == kinds["model.layers.2.mlp.down_proj"]


def test_what_is_counted_is_what_is_stored(asked: Callable[..., Recipe], small_model: Path, tmp_path: Path) -> None:
    """Any choice at all, of types whose rows fit and of those that fall back, terms included."""
    recipe = asked(tmp_path, "1MB", [GPTQ, TERM], grids=["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_1", "q8_0"], ranks=[0, 2])
    stages, model = spent(recipe), skeleton(load_config(small_model))
    sizes = dense_sizes(model, inspect(model, include_head=True), 4)
    counted = costs(recipe, stages, sizes)
    generator = np.random.default_rng(0)
    picked = [int(generator.choice(np.flatnonzero(np.isfinite(bytes_K)))) for bytes_K in counted.bytes_MK]
    keys = {each.site.name: each.key for each in counted.outside}
    rows = [
        ChosenSetting(site.name, counted.settings[k], 0, 0, 0, 0, 0, keys.get(site.name)) for site, k in zip(counted.sites, picked, strict=True)
    ]
    for spec in resolved(recipe, stages, Choice("1MB", "relative", rows, 1, "", 0, 0, 0, 0, 0)):
        apply(spec, sizes)
    assert len({row.setting.grid.kind for row in rows}) == 7 and {row.setting.rank for row in rows} == {0, 2}
    assert counted.bytes_MK[range(29), picked].sum() + counted.rest_bytes == pytest.approx(sizes.total_bytes(), abs=1)


def test_the_table_does_not_hang_on_the_type_it_replaces(asked: Callable[..., Recipe], tmp_path: Path) -> None:
    def key(grid: str, **allocation: Any) -> str:
        recipe = asked(tmp_path, "3bpw", [{"quantize": {"method": "gptq", "grid": grid}}], **allocation)
        return table_key("k", "c", spent(recipe), settings_of(recipe, spent(recipe)), [], recipe.allocation, {})

    assert key("q3_k") == key("q6_k") != key("q6_k", grids=["q2_k", "q6_k"])


def test_an_earlier_mask_leaves_the_types_with_a_code_for_0(asked: Callable[..., Recipe], tmp_path: Path) -> None:
    kept = {setting.grid.kind for recipe in [asked(tmp_path, "5bpw", [WANDA, GPTQ])] for setting in settings_of(recipe, spent(recipe))}
    assert kept == {"q3_k", "q6_k"} and not any(GGML_TYPES[kind].minima for kind in kept)
    recipe = asked(tmp_path, "5bpw", [WANDA, GPTQ], sparsities=["dense", "2:4"])
    fitting = {(s.grid.kind, s.grid.pattern) for s in settings_of(recipe, spent(recipe)) if s.fits(128, 256)}
    assert ("q4_k", "dense") in fitting and ("q4_k", "2:4") not in fitting and ("q6_k", "2:4") in fitting


REFUSED: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any], str]] = {
    "a type in a uniform recipe": (
        "3bpw", [{"quantize": {"method": "gptq", "overrides": {"v_proj": {"grid": "q6_k"}}}}], {}, r"quantize\.overrides have a grid of ggml's; .* set quantize\.grid",
    ),
    "a mask and minima": ("5bpw", [WANDA, GPTQ], {"grids": ["q4_k", "q2_k"]}, r"allocation\.grids: .* none of q4_k, q2_k has a code for 0; add one of q4_0, q5_0"),
    "an override beyond the choices": (
        "4.6bpw", [{"quantize": {"method": "rtn", "grid": "q4_k", "overrides": {"v_proj": {"grid": "q8_0"}}}}], {}, r"v_proj: none of the choices of `allocation` fits",
    ),
    "less than the least": ("2.5bpw", [GPTQ], {}, r"infeasible: the smallest that the choices of `allocation` can store is 4\.\d+bpw"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, asked: Callable[..., Recipe], tmp_path: Path) -> None:
    budget, chain, allocation, words = REFUSED[case]
    lines = predict(asked(tmp_path, budget, chain, **allocation))["refusals"]
    assert len(lines) == 1 and re.search(words, lines[0]) and lines[0].startswith("--budget"), lines


UNREAD: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[str], str]] = {
    "bits of types": ([GPTQ], {"bits": [2, 8]}, [], r"allocation\.bits: is not read, since the grid .* a type of ggml; name types in allocation\.grids"),
    "groups of types, at their default": (
        [GPTQ], {}, ["allocation.group_sizes=[32,64,128]"], r"allocation\.group_sizes: is not read, since the grid .* a type of ggml",
    ),
    "types of a uniform grid": (
        [{"quantize": {"method": "gptq"}}], {"grids": ["q4_k"]}, [], r"allocation\.grids: is not read, .* none of ggml; set quantize\.grid, as in quantize\.grid=q4_k",
    ),
    "types of a book": ([{"quantize": {"method": "normal_float"}}], {"grids": "q4_k"}, [], r"allocation\.grids: is not read"),
    "a type that is none": ([GPTQ], {"grids": ["q7_k"]}, [], r"allocation\.grids: expected a list of types of ggml, q4_0 … q6_k"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREAD)
def test_settings_that_nothing_reads(case: str, asked: Callable[..., Recipe], tmp_path: Path) -> None:
    chain, allocation, sets, words = UNREAD[case]
    with pytest.raises(UsageError, match=words):
        asked(tmp_path, "3bpw", chain, sets, **allocation)
