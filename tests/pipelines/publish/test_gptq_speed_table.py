"""The table of two programs holds one row of each for a text and a width, measured once, and says where a text lies that is not there."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitmend.pipelines.errors import InputError
from bitmend.pipelines.publish import gptq_speed_table, publishing
from bitmend.pipelines.recipes.recipe import Recipe
from bitmend.reports import published
from bitmend.reports.record import Protocol, RunRecord, StageRecord


def test_both_programs_are_measured_once_from_the_same_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, str | None, str]] = []
    rivals: list[dict[str, Any]] = []

    def run(chosen: Recipe, directory: Path, **_: object) -> RunRecord:
        ran.append((str(chosen.model), chosen.stages[0].method, chosen.dtype))
        stages = (StageRecord("baseline", perplexity=19.0, bits_per_weight=4.3), StageRecord("q", perplexity=21.0, bits_per_weight=4.4, seconds=30.0))
        return RunRecord("speed", "demo", Protocol("demo", dtype="bfloat16"), stages)

    def made(directory: Path, dense: Path, ids_NT: torch.Tensor, asked: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        rivals.append(asked | {"tokens": ids_NT.numel()})
        return directory / "checkpoint", {"version": "7.7.0", "seconds": 120.0, "peak_bytes": 5, "dtype": "float32"}

    windows = SimpleNamespace(calibration=lambda: torch.zeros(128 * 512, dtype=torch.long))
    monkeypatch.setattr(gptq_speed_table.runner, "run", run)
    monkeypatch.setattr(gptq_speed_table, "evaluate", lambda model, dtype: {"perplexity": 18.0 if model.endswith("00-b") else 20.5})
    monkeypatch.setattr(gptq_speed_table, "RunDirectory", lambda _: SimpleNamespace(read=lambda: {"stages": [{"name": "00-b"}, {"name": "01-q"}]}))
    monkeypatch.setattr(gptq_speed_table, "export", lambda *_, **__: None)
    monkeypatch.setattr(gptq_speed_table, "Inputs", lambda *_: windows)
    monkeypatch.setattr(gptq_speed_table.other_programs, "made", made)
    monkeypatch.setattr(published, "DIRECTORY", tmp_path / "published")
    monkeypatch.delenv(gptq_speed_table.WIKITEXT, raising=False)
    for _ in range(2):
        assert publishing.OWN["gptq-speed"](tmp_path / "runs")
    assert [(asked["program"], asked["bits"], asked["tokens"]) for asked in rivals] == [("gptqmodel", bits, 128 * 512) for bits in (4, 3)]
    assert [kind for _, *kind in ran] == [["gptq", "auto"], ["bind", "float32"]] * 2
    rows = published.read("gptq-speed", tmp_path / "published")["rows"]
    assert [(row["bits"], row["program"]) for row in rows] == [(4, "GPTQModel"), (4, "bitmend"), (3, "GPTQModel"), (3, "bitmend")]
    theirs, ours = rows[:2]
    assert (ours["perplexity"], ours["baseline_perplexity"], ours["to_gptqmodel"]) == (20.5, 18.0, 0.25)
    assert (theirs["perplexity"], theirs["bits_per_weight"], theirs["dtype"]) == (19.0, 4.3, "float32")


def test_a_text_that_is_not_there_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gptq_speed_table.WIKITEXT, str(tmp_path))
    with pytest.raises(InputError, match=r"wiki\.valid\.raw: no such file; BITMEND_WIKITEXT2 names the directory"):
        gptq_speed_table.publish(tmp_path / "runs")
