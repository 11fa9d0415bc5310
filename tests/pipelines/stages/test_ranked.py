"""Stages shared by several processes leave the bits that one process leaves."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bitmend.pipelines.store.files import sha256

from ..families import save_speaking
from ..runs import Processes

CODE = Path(__file__).parents[1].joinpath("ranked.py").read_text(encoding="utf-8")
SECTIONS = {"calibration": {"samples": 10, "seq_len": 64}, "evaluation": {"seq_len": 32, "windows": 1}}
GRID = {"bits": 3, "group_size": 32}
TERM = {"rank": 2}
TRAIN = {"steps": 2, "batch_size": 2, "seq_len": 32, "accumulation": 3, "eval_every": 1}
SHORT: dict[str, dict[str, list[dict[str, Any]]]] = {
    "llama": {
        "sequential": [
            {"prune": {"method": "sparsegpt", "allocation": "outliers"}},
            {"quantize": {"method": "gptq", "correction": 0.5, "true_sequential": True, "include_head": True, **GRID}},
            {"decompose": {"method": "lq_lora", "iterations": 1, **TERM}},
        ],
        "block": [{"quantize": {"method": "learned_rounding", "steps": 2, "batch_size": 3, "seq_len": 48, **GRID}}],
        "pruned": [{"prune": {"method": "wanda"}}, {"recover": {"method": "perp", **TRAIN}}],
        "rounded": [
            {"quantize": {"method": "rtn", "clip": "hessian", **GRID}},
            {"recover": {"method": "scales", "norms": True, "loss": "both", **TRAIN}},
            {"recover": {"method": "lora", **TERM, **TRAIN}},
        ],
    },
    "mixtral": {
        "experts": [
            {"quantize": {"method": "gptq", **GRID}},
            {"decompose": {"method": "qera_exact", **TERM}},
            {"recover": {"method": "lora", **TRAIN}},
        ]
    },
}


def artifacts(place: Path) -> dict[str, str]:
    """sha256 of every file of every artifact, and of what its stage said."""
    found = [p for p in place.rglob("*") if p.is_file() and ".partial" not in str(p) and "teacher" not in str(p)]
    return {str(p.relative_to(place)): sha256(p) for p in found}


def made(commands: Processes, size: int, place: Path, **asked: Any) -> dict[str, str]:
    told = {"place": str(place), "tokens_at_once": 64, "held_out_tokens": 320, "sections": SECTIONS, **asked}
    log = place.with_suffix(".log")
    variables = {"BITMEND_RANKED": json.dumps(told)}
    codes = commands.ranks(size, log, code=CODE, environments=[variables] * size)
    assert codes == [0] * size, [Path(f"{log}.{rank}").read_text()[-3000:] for rank in range(size)]
    return artifacts(place)


@pytest.fixture(scope="module", params=SHORT)
def alone(
    request: pytest.FixtureRequest, commands: Processes, small_model: Path, small_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """What one process leaves, and what it was asked."""
    place = tmp_path_factory.mktemp(request.param)
    save_speaking(request.param, place / "model", small_model, num_hidden_layers=2)
    asked = {"model": str(place / "model"), "text": str(small_text), "chains": SHORT[request.param]}
    yield made(commands, 1, place / "one", **asked), asked


@pytest.mark.parametrize("size", [2, 4])
def test_artifacts_are_those_of_one_process(
    size: int, alone: tuple[dict[str, str], dict[str, Any]], commands: Processes, tmp_path: Path
) -> None:
    expected, asked = alone
    found = made(commands, size, tmp_path / "several", **asked)
    assert len(expected) > 20 and {name for name in expected if expected[name] != found.get(name)} == set() and found.keys() == expected.keys()
