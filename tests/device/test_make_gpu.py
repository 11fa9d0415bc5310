"""`make gpu` on the pretended card: every part leaves rows and goes on where it was; what is slow is stopped, what fails is named."""

import contextlib
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.kernels import timing
from bitmend.pipelines import logs
from bitmend.pipelines.bench import model_speed, shape, synthetic
from bitmend.pipelines.gpu import __main__ as gpu
from bitmend.pipelines.gpu.child import Call, CardPlan
from bitmend.pipelines.gpu.demo_runs import readme_table
from bitmend.pipelines.models import decoding

from .pretended import pretended_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the command itself is what runs on a card")

SUITE = """
import os, time, pytest
def test_passes(): pass
def test_fails(): assert 1 == 2, "not the same"
def test_dies(): os._exit(7)
def test_is_skipped(): pytest.skip("no reason")
def test_hangs(): time.sleep(60)
"""
SHORT = (
    "calibration.samples=2",
    "calibration.seq_len=64",
    "evaluation.seq_len=64",
    "evaluation.windows=2",
    "quantize.method=rtn",
    "quantize.group_size=32",
)
STEP = ("recover.steps=1", "recover.batch_size=16", "recover.seq_len=64", "recover.eval_every=1")
QUICK = ("prune.method=none", "decompose.method=zeroquant_v2", "recover.accumulation=1", "fuse.backend=reference")
SPEEDS = ("bfloat16", "4 bits, rank 32")


@pytest.fixture
def plan(small_model: Path, small_text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CardPlan:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "choices"))
    monkeypatch.setitem(synthetic.SHAPES, "tiny", synthetic.Shape(2, 64, 128, 4, 2, 96))
    for name, value in (("NEW_TOKENS", 2), ("PROMPT", 2), ("READ", 4), ("VARIANTS", {name: model_speed.VARIANTS[name] for name in SPEEDS})):
        monkeypatch.setattr(model_speed, name, value)
    monkeypatch.setattr(decoding, "WARM_UP", 1)
    few = {"calibration": {"samples": 8, "seq_len": 64}, "evaluation": {"seq_len": 64, "windows": 2}}
    monkeypatch.setattr(shape, "STANDARD", few)
    monkeypatch.setattr(timing, "peaks", lambda device, protocol: {"gigabytes_per_second": 1.0, "teraflops": 1.0})
    monkeypatch.setattr(timing, "MOST_COPIES", {"cuda": 2, "cpu": 2})
    return CardPlan(
        model=str(small_model), data=str(small_text), sets=(*SHORT, *STEP, *QUICK), dtypes=("float32",), shape=("tiny", 2),
        shape_rows=(("quantize", "rtn"), ("recover", "scales")), kernels=("--quick", "--layers", "64x128", "--ranks", "0", "--rows", "2"),
        decode=("--shape", "tiny", "--blocks", "1", "--repeats", "1"),
        training=(*SHORT, *STEP, "dtype=float32"),
    )  # fmt: skip


@pytest.fixture
def in_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Modules run in this process, which has imported what they need; the list is what has run."""
    ran: list[str] = []

    def run(call: Call, module: str, arguments: Sequence[str], name: str, watch: Callable[[], None] = lambda: None) -> int:
        ran.append(name)
        call.place.mkdir(parents=True, exist_ok=True)
        with call.log(name).open("w") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), pretended_cuda():
            code = importlib.import_module(module).main(list(arguments))
        logs.setup(quiet=True)  # the command set it up for a file that is closed by now
        watch()
        return code

    monkeypatch.setattr(Call, "run", run)
    return ran


def make_gpu(tmp_path: Path, plan: CardPlan, *arguments: str, seconds: float = 600) -> tuple[int, dict[str, Any]]:
    options = ["--launcher", "unused", "--output", str(tmp_path / "out"), "--place", str(tmp_path / "place"), "--seconds", str(seconds)]
    code = gpu.main([*arguments, *options], plan)
    return code, json.loads((tmp_path / "out" / "gpu-pretended.json").read_text())["parts"]


def test_every_part_leaves_rows_and_is_not_run_again(
    tmp_path: Path, plan: CardPlan, in_here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ("demo", "shape", "kernels", "decode", "train")
    code, actual = make_gpu(tmp_path, plan, *parts)
    printed = capsys.readouterr().out
    assert code == 0 and printed.startswith("pretended, torch"), printed
    assert [actual[name]["left"] for name in parts] == [[], [], [], [], []]
    assert list(actual["demo"]["rows"]) == [f"float32 {name}" for name in ("baseline", "quantize", "decompose", "recover", "fuse")]
    assert all(row["perplexity"] > 1 and row["dtype"] == "float32" for row in actual["demo"]["rows"].values())
    rtn, scales = actual["shape"]["rows"].values()
    assert rtn["seconds_per_block"] > 0 and rtn["device_peak_bytes"] > 0 and rtn["host_peak_bytes"] > rtn["device_peak_bytes"]
    assert scales["seconds_per_step"] > 0 and scales["device_peak_bytes"] > 0
    variants = {row["variant"] for row in actual["kernels"]["rows"].values()}
    assert {"torch bfloat16", "torch int4"} <= variants and "| torch int4 |" in (tmp_path / "out" / "gpu-pretended.md").read_text()
    assert list(actual["decode"]["rows"]) == [f"{variant} {regime}" for variant in SPEEDS for regime in ("decode", "prefill")]
    assert all(row["times_bfloat16"] > 0 and row["blocks"] == 1 for row in actual["decode"]["rows"].values())
    assert actual["decode"]["rows"]["4 bits, rank 32 decode"]["backends"] == "triton 7"
    assert actual["train"]["rows"]["recover"]["steps"] == 1 and actual["train"]["rows"]["recover"]["tokens_per_second"] > 0

    in_here.clear()
    code, again = make_gpu(tmp_path, plan, *parts)
    assert in_here == ["machine"] and again == actual and "finished before" in capsys.readouterr().out


def test_a_part_goes_on_with_what_is_left(tmp_path: Path, plan: CardPlan, in_here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    over = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(Call, "over", lambda call: next(over))
        _, actual = make_gpu(tmp_path, plan, "shape")
    assert list(actual["shape"]["rows"]) == ["tiny quantize rtn"] and actual["shape"]["left"] == ["tiny recover scales"]
    first = actual["shape"]["rows"]["tiny quantize rtn"]
    _, actual = make_gpu(tmp_path, plan, "shape")
    assert actual["shape"]["left"] == [] and actual["shape"]["rows"]["tiny quantize rtn"] == first
    assert in_here.count("tiny-2-blocks-quantize-rtn.answer") == 1


def test_failing_tests_are_named_and_those_left_come_next(
    tmp_path: Path, plan: CardPlan, in_here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """One fails, one takes its process with it, one never ends."""
    suite = tmp_path / "test_suite.py"
    suite.write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    plan = CardPlan(tests=(str(suite),))
    for seconds in (8, 16, 32, 64):  # on a quiet machine the first is enough
        code, actual = make_gpu(tmp_path, plan, "tests", seconds=seconds)
        if actual["tests"]["left"] == []:
            break
    printed = capsys.readouterr().out
    rows = {key.split("::")[-1]: row for key, row in actual["tests"]["rows"].items()}
    assert code == 1
    assert rows["test_passes"]["outcome"] == "passed" and rows["test_is_skipped"]["outcome"] == "skipped"
    assert rows["test_fails"]["line"].startswith("AssertionError: not the same") and "test_fails: AssertionError" in printed
    assert rows["test_dies"] == {"outcome": "failed", "seconds": rows["test_dies"]["seconds"], "line": "its process ended with 7"}
    assert "did not end within" in rows["test_hangs"]["line"] and actual["tests"]["left"] == []
    table = (tmp_path / "out" / "gpu-pretended.md").read_text()
    assert "1 passed, 3 failed, 1 skipped." in table and "not the same" in table


def test_a_process_is_asked_to_stop_and_then_made_to(tmp_path: Path) -> None:
    polite = "import time, signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); print('at work', flush=True); time.sleep(60)"
    stubborn = "import time, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('at work', flush=True); time.sleep(60)"
    for name, code in (("polite", polite), ("stubborn", stubborn)):
        began = time.monotonic()
        call = Call(CardPlan(), tmp_path, began + 3, 1.0)
        assert not call.over()
        assert call.process([sys.executable, "-c", code], name) is None
        assert 2 < time.monotonic() - began < 3 + (name == "stubborn") + 2 and call.over()
        assert call.last_line(name) == "at work"


def test_results_of_another_torch_are_measured_again(tmp_path: Path, plan: CardPlan, in_here: list[str]) -> None:
    make_gpu(tmp_path, plan, "kernels")
    path = tmp_path / "out" / "gpu-pretended.json"
    known = json.loads(path.read_text())
    known["parts"]["kernels"]["context"]["torch"] = "1.0"
    path.write_text(json.dumps(known))
    make_gpu(tmp_path, plan, "kernels")
    assert in_here.count("kernels") == 2


def test_what_is_pretended_is_not_published(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["shape", "--launcher", "tests/device/pretended.py"])
    assert "what is not measured on a card is not published" in capsys.readouterr().err


def test_a_python_that_lacks_a_package_is_told_so(
    tmp_path: Path, plan: CardPlan, in_here: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(gpu, "missing", lambda part: ["pydantic", "yaml"] if part == "demo" else [])
    code, actual = make_gpu(tmp_path, plan, "demo", "kernels")
    assert code == 1 and list(actual) == ["kernels"]
    (line, *_) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"demo: {sys.executable} lacks pydantic, yaml: ") and '`make gpu-packages FETCH="pydantic PyYAML" ' in line
    assert gpu.main(["demo"]) == 2


def test_a_python_without_torch_is_told_so_by_name(tmp_path: Path) -> None:
    """As `make gpu` calls it, with nothing but the checkout."""
    (tmp_path / "bitmend").symlink_to(gpu.ROOT)
    command = [sys.executable, "-S", "-P", "-m", "bitmend.pipelines.gpu", "kernels"]
    done = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60)
    printed = f"kernels: {sys.executable} lacks torch, triton, numpy: give a Python that has torch, triton: PYTHON=…\n"
    assert (done.returncode, done.stdout) == (2, printed), done.stderr


def test_the_checkout_is_importable_through_its_link(tmp_path: Path) -> None:
    """As the Makefile does it: nothing is installed, and the folders' names stand in nobody's way."""
    (tmp_path / "bitmend").symlink_to(gpu.ROOT)
    code = "import bitmend.pipelines.gpu.card as m; print(m.__file__, m.missing('demo'))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=gpu.ROOT, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith(f"{tmp_path}/bitmend/pipelines/gpu/card.py []"), done.stderr


def test_the_demos_table_in_the_readme_is_read() -> None:
    table = readme_table()
    assert list(table) == ["baseline", "quantize", "recover", "fuse"]
    assert table["recover"]["cpu_perplexity"] < table["quantize"]["cpu_perplexity"] and table["recover"]["cpu_seconds"] > 60
