"""A stage that was killed does not run again the blocks that lie before its last checkpoint of hidden states, and ends in the same bits."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from bitmend.pipelines.models import state_checkpoints

from ..families import save_speaking
from ..runs import hashes
from ..toy import RTN, run, toy_text

pytestmark = pytest.mark.usefixtures("no_pages")

compress = import_module("bitmend.pipelines.stages.compress")  # whose name is a function of the package, too
BLOCKS = 4
STAGES: dict[str, list[dict[str, Any]]] = {
    "gptq": [{"quantize": {"method": "gptq", "bits": 3, "group_size": 16, "head_bits": 4}}],
    "along with the dense model": [RTN, {"quantize": {"method": "gptq", "bits": 3, "group_size": 16, "correction": 1.0}}],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    place = tmp_path_factory.mktemp("walked")
    save_speaking("llama", place / "model", small_model, num_hidden_layers=BLOCKS)
    toy_text(place / "toy.jsonl")
    return place / "model"


class Killed(RuntimeError):
    pass


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that stages walked through, in order."""
    seen: list[int] = []
    plain = compress._block

    def block(stage: Any, states: Any, index: int, *others: Any) -> list[dict[str, Any]]:
        seen.append(index)
        return plain(stage, states, index, *others)

    monkeypatch.setattr(compress, "_block", block)
    return seen


def end(place: Path, model: Path, stages: list[dict[str, Any]]) -> dict[str, str]:
    place.mkdir(exist_ok=True)
    run(place, model, model.parent / "toy.jsonl", stages)
    assert not list(place.rglob("walked-*")), "nothing of it stays in an artifact"
    return hashes(place / "run")


def undisturbed(model: Path, stages: list[dict[str, Any]]) -> dict[str, str]:
    whole = model.parent / f"whole-{len(stages)}"
    return hashes(whole / "run") if whole.is_dir() else end(whole, model, stages)


def killed(place: Path, model: Path, stages: list[dict[str, Any]], behind: int, blocks: list[int]) -> None:
    """The last stage ends in the block that comes after `behind`, once it is written."""
    place.mkdir()
    end(place, model, stages[:-1] or [{"fuse": {"backend": "reference"}}])
    with pytest.MonkeyPatch.context() as patch:
        passed = iter(range(behind))
        plain = compress._advance

        def advance(*arguments: Any) -> None:
            if next(passed, None) is None:
                raise Killed
            plain(*arguments)

        patch.setattr(compress, "_advance", advance)
        with pytest.raises(Killed):
            run(place, model, model.parent / "toy.jsonl", stages)
    blocks.clear()


@pytest.mark.parametrize("stages", STAGES.values(), ids=list(STAGES))
def test_finished_blocks_are_not_run_again(
    stages: list[dict[str, Any]], tmp_path: Path, model: Path, blocks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = undisturbed(model, stages)
    monkeypatch.setattr(state_checkpoints, "SECONDS", 0.0)
    killed(tmp_path / "killed", model, stages, 2, blocks)
    assert end(tmp_path / "killed", model, stages).items() >= whole.items()
    assert blocks == [2, 3], "the third was written, and is run once more for its outputs"


def test_a_torn_checkpoint_is_not_there(tmp_path: Path, model: Path, blocks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    stages = STAGES["along with the dense model"]
    whole = undisturbed(model, stages)
    monkeypatch.setattr(state_checkpoints, "SECONDS", 0.0)
    killed(tmp_path / "killed", model, stages, 2, blocks)
    (dense,) = tmp_path.rglob("walked-00002-dense.safetensors")
    dense.write_bytes(dense.read_bytes()[:-4])
    assert end(tmp_path / "killed", model, stages).items() >= whole.items()
    assert blocks == [0, 1, 2, 3]


def test_a_minute_and_the_disk_decide(tmp_path: Path, model: Path, blocks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    killed(tmp_path / "young", model, STAGES["gptq"], 2, blocks)
    assert not list(tmp_path.rglob("walked-*"))
    monkeypatch.setattr(state_checkpoints, "SECONDS", 0.0)
    monkeypatch.setattr(state_checkpoints, "DISK_SHARE", 0.0)
    killed(tmp_path / "full", model, STAGES["gptq"], 2, blocks)
    assert not list(tmp_path.rglob("walked-*"))
