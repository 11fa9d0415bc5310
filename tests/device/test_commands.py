"""Every command that takes --device, on the pretended card, as a user gives it; what is interrupted there ends bit for bit like what is not."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.pipelines import cli
from bitmend.pipelines.bench.training_step import step_seconds
from bitmend.pipelines.formats.registry import FORMATS
from bitmend.pipelines.recipes.recipe import resolve
from bitmend.pipelines.run.opening import last_artifact
from bitmend.pipelines.store import artifact

from ..pipelines.runs import hashes, write_recipe
from .conftest import FEW, RTN
from .pretended import pretended_cuda

pytestmark = pytest.mark.usefixtures("card")

recover = importlib.import_module("bitmend.pipelines.stages.recover")  # the name in the package is the stage's function
GPTQ: dict[str, Any] = {"quantize": {"method": "gptq", "bits": 4, "group_size": 32}}
TRAINED: dict[str, Any] = {"recover": {"method": "scales", "steps": 6, "batch_size": 1, "seq_len": 16, "eval_every": 3}}
Command = Callable[..., Any]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """What a command says on stdout, as JSON; it must end well."""

    def run(*arguments: object) -> Any:
        code = cli.main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "r.yaml", [GPTQ, TRAINED], **FEW)


@pytest.fixture(scope="module")
def source(one_block: Path, little_text: Path) -> list[object]:
    return ["-m", one_block, "--data", little_text]


@pytest.fixture(scope="module")
def started(recipe: Path, two_blocks: Path, little_text: Path) -> list[str]:
    """A run on the card but for where it goes."""
    return [str(a) for a in ("run", recipe, "-m", two_blocks, "--data", little_text, "--device", "cuda", "-o")]


@pytest.fixture(scope="module")
def finished(started: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the card, never interrupted."""
    place = tmp_path_factory.mktemp("finished") / "run"
    with pretended_cuda():
        assert cli.main([*started, str(place)]) == 0
    return place


def test_a_run_says_where_it_computed(finished: Path) -> None:
    actual = json.loads((finished / "environment.json").read_text())
    assert (actual["device"], actual["dtype"], actual["device_name"]) == ("cuda", "bfloat16", "pretended")


@pytest.fixture
def cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process goes right after the first block is written, and in the next run after the first training state is."""
    whole, kept, wrote = artifact.ArtifactWriter.write_part, recover.keep, [0, 0]

    def write_part(self: artifact.ArtifactWriter, *arguments: Any, **options: Any) -> Any:
        done = whole(self, *arguments, **options)
        wrote[0] += "block-00000" in arguments
        if wrote[0] == 1:
            wrote[0] = 2
            raise KeyboardInterrupt
        return done

    def write_bytes(*arguments: Any, **options: Any) -> None:
        kept(*arguments, **options)
        wrote[1] += 1
        if wrote[1] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(artifact.ArtifactWriter, "write_part", write_part)
    monkeypatch.setattr(recover, "keep", write_bytes)


def test_resumed_is_uninterrupted(finished: Path, started: list[str], tmp_path: Path, cut_short: None) -> None:
    """Interrupted behind quantize's first block and behind recover's fifth step."""
    place = str(tmp_path / "run")
    assert [cli.main([*started, place]), cli.main(["resume", place, "--device", "cuda"]), cli.main(["resume", place])] == [130, 130, 0]
    assert hashes(Path(place)) == hashes(finished) and len(hashes(finished)) > 10


def test_eval_and_generate(finished: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token, since the pretended card records no graphs."""
    monkeypatch.setattr("bitmend.pipelines.run.generate.graphable", lambda model, length: "no graphs here")
    measured = command("eval", finished, "--device", "cuda")
    record = json.loads((finished / "record.json").read_text())
    assert measured["perplexity"] == pytest.approx(record["stages"][-1]["perplexity"])
    assert command("generate", finished, "The river", "--max-new-tokens", 2, "--device", "cuda")


def test_sweep_and_dry_run(
    recipe: Path, source: list[object], tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["--set", "recover.method=none", "--device", "cuda"]
    asked = ["sweep", recipe, *source, "-o", tmp_path / "sweep", "--over", "quantize.bits=3,4", *sets]
    assert cli.main([*map(str, asked), "--jobs", "2"]) == 2
    assert "--jobs 2: torch sees 1 GPU, and each process needs one to itself; give --jobs 1" in capsys.readouterr().err
    swept = command(*asked)
    assert len(swept["runs"]) == 2
    assert command("run", recipe, *source, "-o", tmp_path / "dry", "--dry-run", *sets)


def test_budget(source: list[object], tmp_path: Path, command: Command) -> None:
    """Fisher information and a table of errors on the card."""
    few = {"bits": [3, 4], "group_sizes": [32], "ranks": [0, 2], "factor_bits": 16}
    path = write_recipe(tmp_path / "r.yaml", [RTN, {"decompose": {"method": "qera_exact", "rank": 2}}], allocation=few, **FEW)
    made = command("run", path, *source, "-o", tmp_path / "run", "--budget", "4.5bpw", "--device", "cuda")
    assert made["stages"][-1]["bits_per_weight"] <= 4.5


@pytest.mark.parametrize("name", [name for name, row in FORMATS.items() if not row.whole])
def test_export_and_import(name: str, source: list[object], tmp_path: Path, command: Command, finished: Path, recipe: Path) -> None:
    """What another program's checkpoint becomes is measured on the card; the formats' own bytes are made on the CPU."""
    run = finished
    if name == "bnb":
        path, run = write_recipe(tmp_path / "r.yaml", [{"quantize": {"method": "nf4"}}], **FEW), tmp_path / "nf4"
        command("run", path, *source, "-o", run, "--device", "cuda")
    command("export", run, "--format", name, "-o", tmp_path / "out")
    again = write_recipe(tmp_path / "again.yaml", [{"prune": {"method": "none"}}], **FEW)
    made = command("run", again, "-m", tmp_path / "out", *source[2:], "-o", tmp_path / "run", "--device", "cuda")
    before = json.loads((run / "record.json").read_text())["stages"][-1]["perplexity"]
    assert made["stages"][0]["perplexity"] == pytest.approx(before, rel=0.02)


@pytest.mark.parametrize("subject, method", [("compress", "gptq"), ("decompose", "qera_exact")])
def test_bench_on_layers(subject: str, method: str, command: Command) -> None:
    (row, *_) = command("bench", subject, "--size", 64, "--repeats", 1, "--method", method, "--device", "cuda")["rows"]
    assert row["peak_bytes"] > 0


def test_bench_of_a_training_step(finished: Path) -> None:
    """As `bench recover` times it, on what the run quantized."""
    trained = resolve(str(finished / "recipe.resolved.yaml")).stage("recover")
    actual = step_seconds(last_artifact(finished, "quantize"), [trained], torch.device("cuda"), 1, torch.bfloat16)
    assert actual["scales"]["seconds_per_step"] > 0
