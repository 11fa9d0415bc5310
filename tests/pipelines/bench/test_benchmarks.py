"""Benchmarks: rows hold what was measured, files are written, refusals are reported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.methods import QUANTIZE
from bitmend.pipelines.bench import benchmarks, solvers, training_step
from bitmend.pipelines.bench.benchmarks import Options, run
from bitmend.pipelines.errors import PipelineError, UsageError
from bitmend.pipelines.recipes.stage_settings import build
from bitmend.pipelines.run.opening import last_artifact


def test_compress_measures_every_matrix_method(tmp_path: Path) -> None:
    measured = run("compress", Options(device="cpu", sizes=(64,), repeats=1, output=tmp_path))
    rows = {row["method"]: row for row in measured["rows"] if "error" not in row}
    refused = {row["method"]: row["error"] for row in measured["rows"] if "error" in row}
    assert set(refused) == {name for name, row in QUANTIZE.items() if row.scope == "block"}
    assert set(refused.values()) == {"trains whole blocks, not a matrix: measure it with -m MODEL"}
    assert {"magnitude", "wanda", "sparsegpt", "rtn", "gptq", "nf4"} <= set(rows)
    assert all(row["seconds"] > 0 and row["peak_bytes"] >= 0 and 0 < row["relative_output_error"] < 1 for row in rows.values())
    assert rows["gptq"]["relative_output_error"] < rows["rtn"]["relative_output_error"]
    assert rows["sparsegpt"]["relative_output_error"] < rows["wanda"]["relative_output_error"] < rows["magnitude"]["relative_output_error"]
    assert json.loads((tmp_path / "bench-compress.json").read_text())["rows"] == measured["rows"]
    assert "| gptq" in (tmp_path / "bench-compress.md").read_text()
    assert (tmp_path / "bench-compress.png").stat().st_size > 1000


def test_what_does_not_fit_has_a_row_that_says_so() -> None:
    (row,) = run("compress", Options(device="cpu", sizes=(72,), only=("rtn",), repeats=1))["rows"]
    assert row["size"] == 72 and "in_features 72 is not a multiple of group_size 64" in row["error"]


def test_decompose_starts_from_a_quantized_matrix() -> None:
    rows = run("decompose", Options(device="cpu", sizes=(64,), only=("loftq", "eora"), repeats=1))["rows"]
    assert [row["method"] for row in rows] == ["loftq", "eora"]
    assert rows[1]["relative_output_error"] < rows[0]["relative_output_error"]
    assert all(3 < row["bits_per_weight"] < 16 for row in rows)


def test_decompose_ends_with_the_exact_step_and_leaves_slow_baselines_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "SQUARE_ROOT_SIDE", 32)
    monkeypatch.setitem(benchmarks.STAGES, "decompose", ())
    ours, theirs = run("decompose", Options(device="cpu", sizes=(64,), repeats=1))["rows"]
    assert ours["method"] == "exact step" and theirs["error"] == "takes minutes above 32: --full measures it"


def test_allocate_solves_the_program_of_a_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "SHAPES_7B", solvers.SHAPES_7B[:14])
    (row,) = run("allocate", Options(device="cpu", repeats=1))["rows"]
    assert (row["matrices"], row["settings"]) == (14, 432) and row["gap"] <= 1e-3
    assert 2.75 * 0.98 < row["bits_per_weight"] <= 2.75 and row["loss_to_best_uniform"] < 0.8


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'gptq'"):
        run("compress", Options(only=("gtpq",)))


def test_a_model_runs_whole_stages_and_a_failure_stays_in_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    import bitmend.pipelines.run
    from bitmend.reports.record import RunRecord, StageRecord

    asked: list[Any] = []

    def fake(recipe: Any, directory: Path, device: str) -> RunRecord:
        asked.append((recipe.model, [spec.method for spec in recipe.stages], directory, device))
        if recipe.stages[-1].method == "perp":
            raise UsageError("cannot serve this")
        last = recipe.stages[-1]
        return RunRecord(
            "r", recipe.model, stages=(StageRecord("baseline"), StageRecord(last.name, last.method, seconds=last.config.steps * 1.0))
        )

    def steps(parent: Any, specs: Any, device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
        assert parent == (tmp_path / "bench-recover", "quantize")
        return {spec.method: {"seconds_per_step": repeats / 2} for spec in specs}

    monkeypatch.setattr(training_step, "step_seconds", steps)
    runner: Any = types.ModuleType("bitmend.pipelines.run.runner")
    runner.run, runner.last_artifact = fake, lambda *asked: asked
    monkeypatch.setitem(sys.modules, runner.__name__, runner)
    monkeypatch.setattr(bitmend.pipelines.run, "runner", runner, raising=False)
    measured = run("recover", Options(device="cpu", only=("lora", "perp"), output=tmp_path))
    assert [row.get("seconds") for row in measured["rows"]] == [benchmarks.RECOVERY_STEPS, None]
    assert [row.get("seconds_per_step") for row in measured["rows"]] == [1.5, None]
    assert measured["rows"][1]["error"] == "cannot serve this"
    assert asked[0] == ("demo", ["rtn", "lora"], tmp_path / "bench-recover", "cpu")
    assert (tmp_path / "bench-recover.md").is_file()
    with pytest.raises(PipelineError, match=r"bench recover: 1 of 2 methods could not be measured \(perp\): cannot serve this; the others"):
        benchmarks.refuse_failed(measured)
    benchmarks.refuse_failed(measured | {"rows": measured["rows"][:1]})


def test_where_every_method_is_refused_there_is_no_table(small_model: Path, tmp_path: Path) -> None:
    """A model of fewer positions than bench's windows."""
    with pytest.raises(UsageError, match=r"seq_len \d+ is above the 512 positions of this model.*`pipeline run`"):
        run("recover", Options(device="cpu", model=str(small_model), only=("lora", "scales"), output=tmp_path))
    assert not list(tmp_path.glob("bench-recover.*"))


def test_steps_are_timed_in_turn_and_blocks_have_none(finished: Path) -> None:
    parent = last_artifact(finished, "decompose")
    names = ("lora", "scales", "fish_mask", "reconstruct")
    few = {"fish_mask": {"samples": 4}}
    specs = [build("recover", "recover", {"method": name, "batch_size": 1, "seq_len": 32, **few.get(name, {})}) for name in names]
    actual = training_step.step_seconds(parent, [spec for spec in specs if spec is not None], torch.device("cpu"), 2)
    assert set(actual) == {"lora", "scales", "fish_mask"}
    assert all(0 <= row["step_spread"] < 60 and row["seconds_per_step"] > 0 for row in actual.values())
