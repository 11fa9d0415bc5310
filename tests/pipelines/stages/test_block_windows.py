"""Methods that train a block, in every window: below their start, ended between two steps and gone on with to the same bits."""

from pathlib import Path
from typing import Any

import pytest
from bitmend.pipelines.run import runner
from bitmend.pipelines.stages import whole_blocks

from ..runs import chosen, hashes

pytestmark = pytest.mark.usefixtures("no_pages")

SECTIONS: dict[str, Any] = {"calibration": {"samples": 8, "seq_len": 32}, "evaluation": {"seq_len": 32, "windows": 2}}
TRAINED = {"bits": 2, "group_size": 32, "steps": 10, "batch_size": 2, "start": "rtn"}


def stages(method: str, window: str) -> list[dict[str, Any]]:
    return [{"quantize": {"method": method, "window": window, **TRAINED}}]


@pytest.mark.parametrize(
    ("method", "window"), [("learned_rounding", "sub_block"), ("block_training", "block"), ("learned_rounding", "two_blocks")]
)
def test_stopped_inside_a_block_and_gone_on_with_to_the_same_bits(
    method: str, window: str, small_model: Path, small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = chosen(tmp_path, small_model, small_text, stages(method, window), **SECTIONS)
    whole = runner.run(recipe, tmp_path / "whole").stages[-1]
    for layer in whole.layers:
        assert layer.metrics["block_loss_best"] <= layer.metrics["block_loss_start"]
    assert any(layer.metrics["best_step"] > 0 for layer in whole.layers)
    left, plain = [25], whole_blocks.check_stop

    def stop(context: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        plain(context)

    monkeypatch.setattr(whole_blocks, "check_stop", stop)
    with pytest.raises(KeyboardInterrupt):
        runner.run(recipe, tmp_path / "stopped")
    finished = list((tmp_path / "stopped").glob("stages/01-*.partial/block-*.part.json"))
    assert 0 < len(finished) < 4
    runner.run(recipe, tmp_path / "stopped")
    assert hashes(tmp_path / "stopped", "1") == hashes(tmp_path / "whole", "1")


def test_windows_differ(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    made = []
    for window in ("sub_block", "block", "two_blocks"):
        (tmp_path / window).mkdir()
        recipe = chosen(tmp_path / window, small_model, small_text, stages("learned_rounding", window), **SECTIONS)
        runner.run(recipe, tmp_path / window / "run")
        made.append({h for name, h in hashes(tmp_path / window / "run", "1").items() if name.endswith("block-00001.vectors.safetensors")})
    assert all(made) and not made[0] & made[1] and not made[1] & made[2] and not made[0] & made[2]
