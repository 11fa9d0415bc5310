"""bench kernels and bench generate: tables and plots of what was measured, refusals kept, and a compressed model against its dense self."""

import json
from pathlib import Path

import pytest
import torch
from bitmend.kernels import bench
from bitmend.kernels.timing import TimingProtocol
from bitmend.pipelines.bench import benchmarks, decode_speed, kernel_tables
from bitmend.pipelines.bench.benchmarks import Options
from bitmend.pipelines.errors import UsageError
from bitmend.pipelines.recipes.recipe import resolve

from ..runs import stage_directory

TINY = bench.BenchPlan((1, 3), (bench.Layer("tiny", 64, 128),), (0, 8), (4,), (None,))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITMEND_CACHE", str(tmp_path / "choices"))
    monkeypatch.setattr(bench, "PLANS", {"cpu": TINY, "cpu, full": TINY})
    monkeypatch.setattr(bench, "TimingProtocol", lambda: TimingProtocol(1, 3))
    monkeypatch.setattr(decode_speed, "PROMPTS", (4, 8))
    monkeypatch.setattr(decode_speed, "NEW_TOKENS", 4)


def test_kernels_are_published_with_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = bench.variants

    def broken(stored, place):
        actual = plain(stored, place)
        call, kept = actual["torch bfloat16"]
        return actual | {"torch bfloat16": ((lambda x: call(x) * 1.5), kept)}

    monkeypatch.setattr(bench, "variants", broken)
    measured = benchmarks.run("kernels", Options(device="cpu", output=tmp_path))
    assert sorted(path.name for path in tmp_path.glob("*kernels*")) == [f"kernels-cpu.{kind}" for kind in ("json", "md", "png", "svg")]
    written = json.loads((tmp_path / "kernels-cpu.json").read_text())
    assert written["rows"] == measured["rows"] and written["protocol"]["torch"] == torch.__version__
    table = (tmp_path / "kernels-cpu.md").read_text()
    assert table.count("Refused: W4A16 torch bfloat16 64 × 128") == 4 and "| W4A16" in table
    assert (tmp_path / "kernels-cpu.png").stat().st_size > 1000


def test_what_another_machine_measured_is_published_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = bench.run("cpu", [1], tmp_path)
    measured["environment"] |= {"device": "cuda", "device_name": "NVIDIA H200 sm90"}
    (tmp_path / "elsewhere.json").write_text(json.dumps(measured))
    assert kernel_tables.main([str(tmp_path / "elsewhere.json"), "-o", str(tmp_path / "published")]) == 0
    assert "kernels-h200.md" in capsys.readouterr().out and (tmp_path / "published" / "kernels-h200.png").exists()


@pytest.mark.parametrize(
    "name, short", [("NVIDIA H100 80GB HBM3 sm90", "h100"), ("NVIDIA GeForce RTX 4090 sm89", "cuda"), ("Tesla T4 sm75", "t4")]
)
def test_a_card_has_a_short_name(name: str, short: str) -> None:
    assert kernel_tables.short_name({"device": "cuda:0", "device_name": name}) == short


@pytest.mark.usefixtures("no_pages")
def test_a_model_is_compressed_and_generates_against_its_dense_self(
    tmp_path: Path, small_model: Path, small_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = {"data": dict.fromkeys(("calibration", "train", "evaluation"), str(small_text)), "evaluation": {"seq_len": 64, "windows": 2}}
    monkeypatch.setattr(decode_speed, "resolve", lambda document: resolve(document | text))
    measured = benchmarks.run("generate", Options(device="cpu", model=str(small_model), repeats=1, output=tmp_path))
    rows = {row["variant"]: row for row in measured["rows"]}
    assert set(rows) == {*decode_speed.RECIPES, "dense float32", "dense bfloat16"}
    assert rows["dense float32"]["bfloat16_share"] == pytest.approx(2, rel=0.01) and rows["dense bfloat16"]["bfloat16_share"] == 1
    assert all(row["tokens_per_second"] > 0 and row["read_4_seconds"] > 0 and row["read_8_seconds"] > 0 for row in rows.values())
    assert "| 4 bits, rank 16 " in (tmp_path / "generate-cpu.md").read_text()


def test_a_run_generates_against_its_baseline(finished: Path) -> None:
    rows = benchmarks.run("generate", Options(device="cpu", model=str(finished), repeats=1))["rows"]
    assert [row["variant"] for row in rows] == ["compressed", "dense float32", "dense bfloat16"]


def test_a_run_that_compressed_nothing_is_refused(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitmend.pipelines.run import runner
    from bitmend.pipelines.store.artifact import open_artifact

    monkeypatch.setattr(runner, "last_artifact", lambda run, stage=None: open_artifact(stage_directory(finished, "baseline")))
    with pytest.raises(UsageError, match="compressed nothing"):
        benchmarks.run("generate", Options(device="cpu", model=str(finished)))
