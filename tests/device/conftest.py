"""The pretended card, and runs on it that tests go on with: one or two blocks of the small model, few tokens, no pages."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bitmend.pipelines.evaluation import speed
from bitmend.pipelines.recipes.recipe import resolve
from bitmend.pipelines.run import runner
from bitmend.pipelines.stages import inputs
from bitmend.reports.record import RunRecord
from safetensors.torch import load_file, save_file

from ..pipelines.runs import write_recipe
from .pretended import Card, pretended_cuda

FEW: dict[str, Any] = {"calibration": {"samples": 2, "seq_len": 16}, "evaluation": {"seq_len": 16, "windows": 1}}
RTN: dict[str, Any] = {"quantize": {"method": "rtn", "bits": 3, "group_size": 32, "clip": "none"}}
PARENTS: dict[str, list[dict[str, Any]]] = {
    "quantized": [RTN],
    "decomposed": [RTN, {"decompose": {"method": "zeroquant_v2", "rank": 2}}],
    "pruned": [{"prune": {"method": "magnitude", "sparsity": 0.3}}],
}
Running = Callable[..., RunRecord]


@pytest.fixture
def card() -> Iterator[Card]:
    with pretended_cuda() as made:
        yield made


@pytest.fixture(autouse=True, scope="module")  # not the session's: other folders' tests come after these in the same process
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache that is not the user's; few tokens held out and written, no report's page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITMEND_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(inputs, "HELD_OUT_TOKENS", 32)
        patch.setattr(speed.tokens_per_second, "__defaults__", (2,))
        patch.setattr("bitmend.reports.page.html", lambda record: "html\n")
        yield


@pytest.fixture(scope="session")
def little_text(small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of it, which is quickly cut into tokens."""
    place = tmp_path_factory.mktemp("text") / "text.jsonl"
    place.write_text("\n".join(small_text.read_text().splitlines()[:16]) + "\n")
    return place


@pytest.fixture(scope="session")
def one_block(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut(small_model, tmp_path_factory.mktemp("one") / "model", 1)


@pytest.fixture(scope="session")
def two_blocks(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut(small_model, tmp_path_factory.mktemp("two") / "model", 2)


def cut(model: Path, place: Path, blocks: int) -> Path:
    """The first blocks of the small model."""
    shutil.copytree(model, place)
    config = json.loads((place / "config.json").read_text()) | {"num_hidden_layers": blocks}
    (place / "config.json").write_text(json.dumps(config))
    tensors = load_file(place / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if ".layers." not in name or int(name.split(".")[2]) < blocks}
    save_file(kept, place / "model.safetensors", metadata={"format": "pt"})
    return place


@pytest.fixture(scope="session")
def ran(one_block: Path, little_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Running:
    """Run stages in a named run directory, which keeps what they share with those of another test."""
    places: dict[str, Path] = {}

    def run(name: str, stages: list[dict[str, Any]], dtype: str = "auto", model: Path | None = None) -> RunRecord:
        place = places.setdefault(f"{name}-{dtype}", tmp_path_factory.mktemp(name))
        recipe = write_recipe(place / "recipe.yaml", stages, **{**FEW, "dtype": dtype})
        options = {"model": str(model or one_block), "data": str(little_text)}
        return runner.run(resolve(str(recipe), options=options), place / "run", device="cuda")

    return run
