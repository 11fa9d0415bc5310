"""docs/examples/by_hand.py: the four stages without the pipeline, on the small model."""

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "by_hand.py"


def test_what_compression_costs_training_brings_back_in_part(small_model: Path, small_text: Path) -> None:
    scores = runpy.run_path(str(EXAMPLE))["main"](small_model, small_text)
    assert list(scores) == ["dense", "prune", "quantize", "decompose", "recover"]
    assert scores["dense"] < scores["prune"] < scores["quantize"]
    assert scores["quantize"] > scores["decompose"] > scores["recover"] > scores["dense"]
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 100
