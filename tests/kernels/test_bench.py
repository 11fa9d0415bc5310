"""The benchmark: times what is right, refuses what is wrong, says where it ran; and `kernels` needs little to be imported."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitmend.kernels import bench
from bitmend.kernels.journal import Journal
from bitmend.kernels.timing import Timing, TimingProtocol, time_calls

TINY = bench.BenchPlan((1, 3), (bench.Layer("tiny", 64, 128),), (0, 8), (4,), (None,), stack_blocks=0)
QUICK = TimingProtocol(1, 3)


def test_rows_are_complete_and_written(tmp_path: Path, device: str) -> None:
    measured = bench.run(device, output=tmp_path, plan=TINY, protocol=QUICK)
    assert measured["refused"] == []
    assert {(row["rows"], row["rank"]) for row in measured["rows"]} == {(1, 0), (1, 8), (3, 0), (3, 8)}
    for rank, needed in (
        (0, ("torch bfloat16", "dequantize then matmul", "without rank")),
        (8, ("torch bfloat16", "torch bfloat16, unfused rank", "unfused rank", "fused")),
    ):
        variants = {row["variant"] for row in measured["rows"] if row["rank"] == rank}
        assert all(any(name in variant for variant in variants) for name in needed), variants
    assert all(row["microseconds"] > 0 and row["spread"] >= 0 and row["resident_bytes"] > 0 for row in measured["rows"])
    assert all(row["repeats"] == 3 for row in measured["rows"])
    names = {"device_name", "clocks", "clocks_at_the_end", "torch", "triton", "warm_up", "repeats", "most_seconds", "threads", "peak"}
    assert names <= set(measured["environment"])
    assert not (tmp_path / "bench-kernels.journal").exists()
    assert json.loads((tmp_path / "bench-kernels.json").read_text()) == measured
    table = (tmp_path / "bench-kernels.md").read_text()
    assert table.count("| W4A16 |") == len(measured["rows"]) and "Refused" not in table


def test_a_wrong_operator_is_refused_not_timed(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    plain = bench.variants

    def broken(stored, place):
        actual = plain(stored, place)
        name = next(n for n in actual if n.endswith(("fused", "without rank")))
        call, kept = actual[name]
        return actual | {name: ((lambda x: call(x) * 1.05), kept)}

    monkeypatch.setattr(bench, "variants", broken)
    measured = bench.run(device, [2], plan=TINY, protocol=QUICK)
    refused = [row["variant"] for row in measured["refused"]]
    assert len(refused) == 2 and all(name.endswith(("fused", "without rank")) for name in refused)
    assert not {row["variant"] for row in measured["rows"]} & set(refused)
    assert "Refused:" in bench.markdown(measured)


def test_torchs_int4_multiplies_with_the_same_weights() -> None:
    """On a card by another operator of the same scales and zeros; the benchmark checks that one there."""
    stored = bench.synthetic(bench.Layer("own", 128, 256), 4, 0, None, torch.device("cpu"))
    call, kept = bench.rivals(stored)["torch int4"]()
    error, allowed = bench.check(stored, call, torch.randn(3, 256).bfloat16(), 2.0)
    assert 0 < error <= allowed and kept == 128 * 256 // 2 + 128 * 4 * 2 * 2
    for other in (
        bench.synthetic(TINY.layers[0], 3, 0, None, torch.device("cpu")),
        bench.synthetic(TINY.layers[0], 4, 0, 8, torch.device("cpu")),
    ):
        assert bench.rivals(other) == {}
    ranked = bench.synthetic(bench.Layer("own", 128, 256), 4, 8, None, torch.device("cpu"))
    call, more = bench.rivals(ranked)["torch int4, unfused rank"]()
    error, allowed = bench.check(ranked, call, torch.randn(3, 256).bfloat16(), 2.0)
    assert 0 < error <= allowed and more == kept + 2 * 8 * (128 + 256)


def test_two_levels_are_rows_of_their_own(device: str) -> None:
    """Against their own definition: the weight is another one."""
    plan = replace(TINY, rows=(3,), activation_bits=(8,), two_levels=True)
    measured = bench.run(device, plan=plan, protocol=QUICK)
    assert measured["refused"] == []
    actual = {(row["operator"], row["rank"]): row for row in measured["rows"]}
    assert {("W4A8", 0), ("W4A8", 8), ("W4A8, two levels", 0), ("W4A8, two levels", 8)} <= set(actual)
    stored = bench.synthetic(TINY.layers[0], 4, 8, 8, torch.device("cpu"), two_levels=True)
    assert stored.activations is not None and stored.activations.group_size == -1


def test_an_operator_of_others_that_cannot_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    def none(stored):
        def build():
            raise NotImplementedError("no kernel for this card\nwith details")

        return {"theirs": build}

    monkeypatch.setattr(bench, "rivals", none)
    measured = bench.run(device, [2], plan=replace(TINY, ranks=(0,)), protocol=QUICK)
    (refused,) = measured["refused"]
    assert (refused["variant"], refused["reason"]) == ("theirs", "no kernel for this card") and measured["rows"]


def test_times_are_relative_to_bfloat16_of_as_many_rows() -> None:
    where = {"out": 64, "inputs": 128, "rank": 0}
    plain, ours = where | {"rows": 2, "variant": "torch bfloat16", "microseconds": 4.0}, where | {"rows": 2, "variant": "a", "microseconds": 3.0}
    others = [ours | {"rows": 3}, {"rows": 1, "rank": 0, "variant": "fused", "microseconds": 1.0}]
    shown = bench.relative_to_bfloat16([ours, plain | {"rank": 8, "microseconds": 9.0}, plain, *others])
    assert [row.get("times_bfloat16") for row in shown] == [0.75, 2.25, 1.0, None, None]


def test_the_quick_plan_is_a_cards(capsys: pytest.CaptureFixture[str]) -> None:
    plan = bench.PLANS["cuda, quick"]
    assert {(layer.out, layer.inputs) for layer in plan.layers} == {(4096, 4096), (28672, 4096), (4096, 14336)} and plan.ranks == (0, 32) and plan.two_levels
    assert not any(bench.PLANS[name].two_levels for name in ("cpu", "cpu, full")), "its kernels are a card's"
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--quick", "--device", "cpu"])
    assert "--quick needs a CUDA device and excludes --full" in capsys.readouterr().err


def test_an_output_that_is_not_finite_is_refused() -> None:
    stored = bench.synthetic(TINY.layers[0], 4, 8, None, torch.device("cpu"))
    error, allowed = bench.check(stored, lambda x: torch.full((x.shape[0], 64), torch.nan), torch.randn(2, 128).bfloat16(), 2.0)
    assert not error <= allowed


@pytest.mark.usefixtures("patient")
def test_stack_counts_what_every_form_keeps() -> None:
    plan = replace(TINY, layers=(), ranks=(16,), stack_blocks=1)
    rows = {row["variant"]: row for row in bench.run("cpu", plan=plan, protocol=QUICK)["rows"]}
    assert rows["torch float32"]["resident_bytes"] == 2 * rows["torch bfloat16"]["resident_bytes"]
    assert rows["fused"]["resident_bytes"] < 0.5 * rows["torch bfloat16"]["resident_bytes"]


def test_median_and_quartiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass warms up; the others are sorted by nobody."""
    seconds = iter([0.05, 1.0, 2.0, 3.0, 4.0, 100.0])
    monkeypatch.setattr("bitmend.kernels.timing._cpu_seconds", lambda once: next(seconds))
    assert time_calls([int], torch.device("cpu"), TimingProtocol(1, 5)) == Timing(3e6, 50.5e6, 5)


@pytest.mark.parametrize("a_pass, repeats", [(0.1, 10), (0.4, 3), (1.5, 1)])
def test_what_takes_long_is_repeated_less_and_says_so(a_pass: float, repeats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    monkeypatch.setattr("bitmend.kernels.timing._cpu_seconds", lambda once: passes.append(1) or a_pass)
    actual = time_calls([int, int], torch.device("cpu"), TimingProtocol(3, 11, most_seconds=1.01))
    assert actual == Timing(a_pass / 2 * 1e6, None if repeats == 1 else 0.0, repeats)
    assert len(passes) == (1 if repeats == 1 else 3 + repeats)


def test_one_that_was_stopped_goes_on(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, timed = bench.time_calls, []

    def stop_in_the_second_piece(calls, place, protocol):
        timed.append(1)
        if len(timed) == 6:
            raise KeyboardInterrupt
        return whole(calls, place, protocol)

    monkeypatch.setattr(bench, "time_calls", stop_in_the_second_piece)
    with pytest.raises(KeyboardInterrupt):
        bench.run(device, [2], tmp_path, plan=TINY, protocol=QUICK)
    before = (tmp_path / "bench-kernels.journal").read_text()
    (tmp_path / "bench-kernels.journal").write_text(before + '{"key": "torn')
    resumed = bench.run(device, [2], tmp_path, plan=TINY, protocol=QUICK)
    first = json.loads(before.splitlines()[2])
    assert first["key"] == "W4A16 64x128 rank 0" and resumed["rows"][: len(first["result"]["rows"])] == first["result"]["rows"]
    assert len(timed) == 6 + len(resumed["rows"]) - len(first["result"]["rows"]), "what was finished was not measured again"


def test_rows_measured_otherwise_are_dropped(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", {"threads": 1})
    journal.add("a", [1])
    assert Journal(tmp_path / "j", {"threads": 1})["a"] == [1]
    assert "a" not in Journal(tmp_path / "j", {"threads": 2})
    assert len((tmp_path / "j").read_text().splitlines()) == 1


def test_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "PLANS", {"cpu": TINY, "cuda": TINY})
    monkeypatch.setattr(bench, "TimingProtocol", lambda: QUICK)
    assert bench.main(["--rows", "2", "--ranks", "8", "--output", str(tmp_path)]) == 0
    assert "| operator |" in capsys.readouterr().out and (tmp_path / "bench-kernels.md").exists()


def test_imports_with_torch_triton_and_the_standard_library_alone(tmp_path: Path) -> None:
    """A card's machine may have nothing else: every other distribution is hidden from the interpreter."""
    script = """
import importlib.abc, sys
import torch, triton
ALLOWED = set(sys.stdlib_module_names) | {name.split(".")[0] for name in sys.modules} | {"bitmend", "torch", "triton", "torchgen", "annotated_types"}
class Closed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in ALLOWED:
            raise ModuleNotFoundError(f"hidden: {name}", name=name)
sys.meta_path.insert(0, Closed())
for forbidden in ("scipy", "transformers", "pydantic"):
    assert forbidden not in ALLOWED, forbidden
import bitmend.kernels.bench, bitmend.kernels.linear, bitmend.kernels.weight_only_matmul_up
from bitmend.kernels.bench import DEMO, synthetic
from bitmend.kernels.linear import bind
print(bind(synthetic(DEMO[1], 4, 8, None, torch.device("cpu")))(torch.zeros(1, 576)).shape)
"""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in (str(Path(bench.__file__).parents[2]), os.environ.get("PYTHONPATH", "")) if p)
    }
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 192])" in done.stdout
