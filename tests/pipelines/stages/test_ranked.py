"""Stages shared by several processes leave the bits that one process leaves."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from bitmend.compress.methods import DECOMPOSE, PRUNE, QUANTIZE
from bitmend.pipelines.models.sharding import BatchShare
from bitmend.pipelines.models.structure import Site
from bitmend.pipelines.ranks.exchange import SLOTS, Ranks
from bitmend.pipelines.recipes.recipe import resolve
from bitmend.pipelines.stages.inputs import Inputs
from bitmend.pipelines.stages.shared_inputs import row_parts, spread
from bitmend.pipelines.store.files import sha256
from bitmend.pipelines.store.rundir import TRAINING_STATE
from bitmend.recover.recovery_methods import RECOVER

from ..families import save_speaking
from ..runs import Processes

CODE = Path(__file__).parents[1].joinpath("ranked.py").read_text(encoding="utf-8")
SECTIONS = {"calibration": {"samples": 10, "seq_len": 64}, "evaluation": {"seq_len": 32, "windows": 1}}
ROWS = 80
"""The most that a sweep takes at once: of the wider matrices ranks have parts."""
GRID = {"bits": 3, "group_size": 32}
TERM = {"rank": 2}
TRAIN = {"steps": 2, "batch_size": 2, "seq_len": 32, "accumulation": 3, "eval_every": 1}
FITTED = {"steps": 2, "samples": 6, "batch_size": 3, "seq_len": 32}
Chain = list[dict[str, Any]]
Chains = dict[str, Chain]
SHORT: Chains = {
    "sequential": [
        {"prune": {"method": "sparsegpt", "allocation": "outliers"}},
        {"quantize": {"method": "gptq", "correction": 0.5, "true_sequential": True, "include_head": True, **GRID}},
        {"decompose": {"method": "lq_lora", "iterations": 1, **TERM}},
    ],
    "guided": [{"quantize": {"method": "gptq", "guided": 2, "true_sequential": True, **GRID}}],
    "block": [{"quantize": {"method": "learned_rounding", "steps": 2, "batch_size": 3, "seq_len": 48, **GRID}}],
    "pruned": [{"prune": {"method": "wanda"}}, {"recover": {"method": "perp", **TRAIN}}, {"recover": {"method": "reconstruct", **FITTED}}],
    "rounded": [
        {"quantize": {"method": "rtn", "clip": "hessian", **GRID}},
        {"recover": {"method": "scales", "norms": True, "loss": "both", **TRAIN}},
        {"recover": {"method": "lora", **TERM, **TRAIN}},
    ],
}
EXPERTS: Chains = {
    "experts": [
        {"quantize": {"method": "gptq", **GRID}},
        {"decompose": {"method": "qera_exact", **TERM}},
        {"recover": {"method": "lora", **TERM, **TRAIN}},
    ]
}
BRIEF: dict[str, dict[str, Any]] = {
    "learned_rounding": {"steps": 2, "batch_size": 3, "seq_len": 48},
    "block_training": {"steps": 2, "batch_size": 3, "seq_len": 48, "window": "two_blocks"},
    "svdquant": {"iterations": 2, "smoothing_steps": 2},
    "reconstruct": FITTED,
}
"""Settings of methods that have no steps or would take minutes."""


NEEDS_LINEARS = {"parallel_adapter": {"at": "attention"}, "mam_adapter": None}
"""Bottlenecks, which fused experts have no linears for: where else they go, None where they go nowhere else."""


def every_method(family: str) -> Chains:
    """A chain for every method, recovery behind the first artifact that it serves."""
    chains: Chains = {f"prune-{name}": [{"prune": {"method": name}}] for name in PRUNE}
    grid = {"quantize": {"method": "rtn", **GRID}}
    for name in QUANTIZE:
        own = {} if name in ("nf4", "normal_float", "gptq_nf") else GRID
        chains[f"quantize-{name}"] = [{"quantize": {"method": name, **own, **BRIEF.get(name, {})}}]
    for name, row in DECOMPOSE.items():
        few = {"iterations": 2} if row.defaults.get("iterations", 1) > 2 else {}
        chains[f"decompose-{name}"] = [grid, {"decompose": {"method": name, **TERM, **BRIEF.get(name, few)}}]
    before: list[tuple[set[str], Chain]] = [
        ({"uniform"}, [grid]),
        ({"dense", "masked"}, [{"prune": {"method": "magnitude"}}]),
        ({"uniform", "low_rank"}, [grid, {"decompose": {"method": "zeroquant_v2", **TERM}}]),
    ]
    for name, row in RECOVER.items():
        chain = next(chain for kinds, chain in before if row.serves(frozenset(kinds), row.own()) is None)
        place = NEEDS_LINEARS.get(name, {}) if family == "mixtral" else {}
        if place is None:
            continue
        chains[f"recover-{name}"] = [*chain, {"recover": {"method": name, **BRIEF.get(name, TRAIN), **place}}]
    return chains


def artifacts(place: Path) -> dict[str, str]:
    """sha256 of every file of every artifact, and of its stage's outcome."""
    actual = [p for p in place.rglob("*") if p.is_file() and ".partial" not in str(p) and "teacher" not in str(p)]
    return {str(p.relative_to(place)): sha256(p) for p in actual}


def made(commands: Processes, size: int, place: Path, stops: dict[str, int] | None = None, **asked: Any) -> tuple[dict[str, str], str]:
    """What `size` processes leave, and what rank 0 says."""
    job = {"place": str(place), "tokens_at_once": 64, "held_out_tokens": 320, "rows": ROWS, "sections": SECTIONS, "stops": stops or {}, **asked}
    log = place.with_suffix(".log")
    codes = commands.ranks(size, log, code=CODE, environments=[{"BITMEND_RANKED": json.dumps(job)}] * size)
    assert codes == [0] * size, [Path(f"{log}.{rank}").read_text()[-3000:] for rank in range(size)]
    return artifacts(place), Path(f"{log}.0").read_text()


Alone = tuple[dict[str, str], dict[str, Any]]


def by_one(family: str, chains: Chains, commands: Processes, small_model: Path, small_text: Path, place: Path) -> Alone:
    """What one process leaves, and its job."""
    save_speaking(family, place / "model", small_model, num_hidden_layers=2)
    asked = {"model": str(place / "model"), "text": str(small_text), "chains": chains}
    return made(commands, 1, place / "one", **asked)[0], asked


@pytest.fixture(scope="module")
def llama(commands: Processes, small_model: Path, small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return by_one("llama", SHORT, commands, small_model, small_text, tmp_path_factory.mktemp("llama"))


def same(actual: dict[str, str], expected: dict[str, str]) -> None:
    assert len(expected) > 20 and {name for name in expected if expected[name] != actual.get(name)} == set()
    assert actual.keys() == expected.keys()


def test_artifacts_of_four_processes_are_those_of_one(llama: Alone, commands: Processes, tmp_path: Path) -> None:
    expected, asked = llama
    same(made(commands, 4, tmp_path / "four", **asked)[0], expected)


def test_stages_go_on_with_another_number_of_processes(llama: Alone, commands: Processes, tmp_path: Path) -> None:
    expected, asked = llama
    asked = asked | {"chains": {name: SHORT[name] for name in ("sequential", "rounded")}}
    expected = {name: of for name, of in expected.items() if name.startswith(("baseline", "sequential", "rounded"))}
    place, output = tmp_path / "changing", ""
    for size, stops in ((2, {"sequential": 4, "rounded": 4}), (4, {"sequential": 2}), (1, {})):
        actual, news = made(commands, size, place, stops, **asked)
        output += news
        if size == 2:
            assert list(place.glob("sequential-0.partial/walked-00001-hidden.safetensors")) and list(place.glob(f"rounded-1.partial/{TRAINING_STATE}"))
    assert [line for line in output.splitlines() if line.startswith("stopped")] == [
        "stopped: sequential, stage 0", "stopped: rounded, stage 1", "stopped: sequential, stage 1"
    ]  # fmt: skip
    same({name: of for name, of in actual.items() if not name.startswith("metrics")}, expected)


def test_experts_are_shared_out(commands: Processes, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    expected, asked = by_one("mixtral", EXPERTS, commands, small_model, small_text, tmp_path)
    same(made(commands, 2, tmp_path / "two", **asked)[0], expected)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("family", "sizes"), [("llama", (2, 3)), ("mixtral", (2, 8))])
def test_every_method_leaves_the_bits_of_one_process(
    family: str, sizes: tuple[int, ...], commands: Processes, small_model: Path, small_text: Path, tmp_path: Path
) -> None:
    expected, asked = by_one(family, every_method(family), commands, small_model, small_text, tmp_path)
    for size in sizes:
        same(made(commands, size, tmp_path / str(size), **asked)[0], expected)


def test_a_bad_input_of_one_rank_is_an_error_of_all(llama: Alone, commands: Processes, tmp_path: Path) -> None:
    """A row of the embeddings that one batch alone looks up, and that is no number."""
    _, asked = llama
    shutil.copytree(asked["model"], tmp_path / "model")
    text = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    recipe_file = tmp_path / "recipe.json"
    recipe_file.write_text(json.dumps({"stages": SHORT["sequential"][:1], **SECTIONS}))
    recipe = resolve(str(recipe_file), options={"model": asked["model"], "data": asked["text"]})
    ids_NT = Inputs(recipe, Path(asked["model"])).calibration()
    rare = next(t for t in ids_NT[1].tolist() if [int((row == t).any()) for row in ids_NT] == [0, 1] + [0] * 8)
    text["model.embed_tokens.weight"][rare] = torch.nan
    safetensors.torch.save_file(text, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    job = {"place": str(tmp_path / "bad"), "tokens_at_once": 64, "held_out_tokens": 320, "rows": ROWS, "sections": SECTIONS, "stops": {}}
    job |= asked | {"model": str(tmp_path / "model"), "chains": {"wanda": [{"prune": {"method": "wanda"}}]}}
    codes = commands.ranks(2, tmp_path / "log", code=CODE, environments=[{"BITMEND_RANKED": json.dumps(job)}] * 2)
    assert codes == [99, 99]
    for rank in range(2):
        assert "InputError: model.layers.0.self_attn.q_proj: square_sum of its inputs holds NaN" in (tmp_path / f"log.{rank}").read_text()


def test_the_dearest_matrices_are_spread_first() -> None:
    assert spread([1, 8, 3, 5, 2], 2) == [1, 0, 1, 1, 0]
    assert spread([1, 1, 1], 1) == [0, 0, 0]
    assert spread([4, 4, 4, 4], 4) == [0, 1, 2, 3]


def test_the_dearest_are_divided_by_rows_whatever_the_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitmend.compress.feedback._ROWS", 100)
    wide, plain, few = ([Site("w", "w", "linear", shape, 0)] for shape in ((250, 10), (90, 40), (101, 1)))
    assert row_parts([wide], [True]) == [[(84 + 10) * 100.0] * 2 + [(82 + 10) * 100.0]] and row_parts([wide], [False]) == [[26000.0]]
    assert [len(costs) for costs in row_parts([wide, plain, few], [True] * 3)] == [1, 1, 1], "the first costs less than an eighth"
    assert [len(costs) for costs in row_parts([wide, few, few], [True] * 3)] == [3, 1, 1]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_every_batch_has_one_owner_and_one_round(size: int) -> None:
    shares = [BatchShare(19, Ranks(rank, size)) for rank in range(size)]
    assert sorted(number for share in shares for number in share.numbers) == list(range(19))
    walked = []
    for turn in zip(*(share.rounds for share in shares), strict=True):
        for share, places in zip(shares, turn, strict=True):
            walked += [[share.numbers[place] for place in places]]
    assert [numbers for numbers in walked if numbers] == [[*range(slot, 19, SLOTS)] for slot in range(SLOTS)]
