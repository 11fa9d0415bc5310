"""What a teacher computed is kept for the run's other recoveries, and nothing depends on whether it is there."""

import json
from pathlib import Path
from typing import Any

import pytest
from bitmend.pipelines.run import runner
from bitmend.pipelines.stages import teacher

from ..families import save_speaking
from ..runs import hashes, stage_directory
from ..toy import RTN, STEPS, run, toy_text

pytestmark = pytest.mark.usefixtures("no_pages")

DISTILLED: dict[str, Any] = {**STEPS, "loss": "both", "steps": 4, "eval_every": 2}


def scales(rate: float | str) -> list[dict[str, Any]]:
    return [RTN, {"recover": {"method": "scales", "learning_rate": rate, **DISTILLED}}]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Micro-batches that a teacher was run on: grows by one each time."""
    counted: list[int] = []
    streamed = teacher.StreamedModel

    class Counted(streamed):
        def embed(self, ids: Any) -> Any:
            counted.append(ids.shape[0])
            return super().embed(ids)

    monkeypatch.setattr(teacher, "StreamedModel", Counted)
    return counted


@pytest.fixture
def place(tmp_path: Path, small_model: Path) -> Path:
    save_speaking("llama", tmp_path / "model", small_model, num_hidden_layers=1)
    toy_text(tmp_path / "toy.jsonl")
    return tmp_path


def trained(place: Path, directory: str, rate: float | str = 0.01) -> list[str]:
    """Digests of the files of the recover stage of a run in `directory`."""
    (place / directory).mkdir(exist_ok=True)
    run(place / directory, place / "model", place / "toy.jsonl", scales(rate))
    stage = stage_directory(place / directory / "run", "recover").name
    return sorted(digest for name, digest in hashes(place / directory / "run").items() if stage in name and "block-" in name)


def states(place: Path, directory: str) -> list[Path]:
    return sorted((place / directory / "run" / "teacher-states").rglob("*.safetensors"))


def test_a_second_recovery_reads_the_first_ones_teacher(place: Path, computed: list[int]) -> None:
    first = trained(place, "a")
    assert len(computed) == 4, "each micro-batch once"
    second = trained(place, "a", rate=0.02)
    assert len(computed) == 4, "another learning rate needs no teacher"
    assert second != first
    assert trained(place, "b", rate=0.02) == second and len(computed) == 8


def test_a_torn_state_is_computed_again(place: Path, computed: list[int]) -> None:
    trained(place, "a", rate=0.02)
    files = states(place, "a")
    assert len(files) == 4
    files[0].write_bytes(files[0].read_bytes()[:-5])
    files[1].write_bytes(b"")
    files[2].unlink()
    torn = trained(place, "a")
    assert len(computed) == 4 + 3
    assert torn == trained(place, "b")


def test_no_more_than_the_limit_is_kept(place: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    size = DISTILLED["batch_size"] * DISTILLED["seq_len"] * json.loads((place / "model" / "config.json").read_text())["hidden_size"] * 4
    monkeypatch.setattr(teacher, "STATE_BYTES", 2 * size + size // 2)
    trained(place, "a")
    assert len(states(place, "a")) == 2
    trained(place, "a", rate=0.02)
    assert len(computed) == 4 + 2


def test_gc_removes_them(place: Path) -> None:
    trained(place, "a")
    actual = runner.gc(place / "a" / "run")
    assert "teacher-states" in actual["dropped"] and not states(place, "a")


def test_where_training_begins_anew_the_teacher_runs_ahead_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates are tried from the first micro-batch on: without room on disk each try takes two passes for its four, as the run itself does."""
    passes: list[int] = []
    streamed = teacher.StreamedModel

    class Counted(streamed):
        def walk(self, *arguments: Any, **more: Any) -> Any:
            passes.append(1)
            return super().walk(*arguments, **more)

    monkeypatch.setattr(teacher, "StreamedModel", Counted)
    monkeypatch.setattr(teacher, "STATE_BYTES", 0)
    monkeypatch.setattr(teacher, "TEACHER_TOKENS", 2 * STEPS["batch_size"] * STEPS["seq_len"])
    trained(place, "a", "search")
    stage = json.loads((place / "a" / "run" / "record.json").read_text())["stages"][-1]
    assert len(passes) == 2 * (len(stage["metrics"]["rates_tried"]) + 1)
