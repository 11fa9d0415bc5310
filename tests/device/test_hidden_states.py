"""Hidden states that do not fit a card: partly on it, partly in the host's memory, partly in files, the same bits."""

from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from bitmend.pipelines.evaluation import perplexity
from bitmend.pipelines.models.hidden import Room
from bitmend.pipelines.recipes.recipe import resolve
from bitmend.pipelines.run import runner

from ..pipelines.runs import hashes, write_recipe
from .conftest import FEW

pytestmark = pytest.mark.usefixtures("card")

STAGES: dict[str, list[dict[str, Any]]] = {
    "of whole blocks": [
        {"quantize": {"method": "learned_rounding", "group_size": 32, "start": "rtn", "steps": 1, "batch_size": 2, "target": "compressed"}},
        {"decompose": {"method": "lq_lora", "rank": 2, "iterations": 1, "ignore": ["gate", "up", "k_proj", "v_proj", "o_proj"]}},
    ],
    "replayed": [{"quantize": {"method": "gptq", "bits": 3, "group_size": 32, "true_sequential": True, "guided": 1}}],
}


@pytest.mark.parametrize("case", STAGES)
def test_spilled_they_make_the_same_artifacts(
    case: str, two_blocks: Path, small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "TOKENS_AT_ONCE", 16)
    made, turn = [], cycle(("device", "host", "file"))
    for name in ("fits", "spills"):
        if name == "spills":
            monkeypatch.setattr(Room, "place", lambda self, size: next(turn))
        (tmp_path / name).mkdir()
        recipe = write_recipe(tmp_path / name / "recipe.yaml", STAGES[case], **FEW)
        options = {"model": str(two_blocks), "data": str(small_text)}
        runner.run(resolve(str(recipe), options=options), tmp_path / name / "run", device="cuda")
        made.append(hashes(tmp_path / name / "run"))
    assert made[0] == made[1] and len(made[0]) > 10
