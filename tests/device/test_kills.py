"""A block method and training on the pretended card, killed at drawn operations: the same command makes the bits of a run nobody disturbed."""

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from bitmend.pipelines import cli

from ..pipelines.faults import Faults
from ..pipelines.runs import hashes, write_recipe
from .conftest import FEW

pytestmark = pytest.mark.usefixtures("card")

TRAINED: dict[str, Any] = {"steps": 2, "batch_size": 1, "seq_len": 16}
CHAIN: list[dict[str, Any]] = [
    {"quantize": {"method": "learned_rounding", "bits": 3, "group_size": 32, **TRAINED}},
    {"recover": {"method": "lora", "rank": 2, "eval_every": 2, **TRAINED}},
]


def forked(arguments: list[str], step: int, below: Path) -> int:
    """Exit code of the command in a process of its own, which is killed at its step-th operation there."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            Faults("kill", step, str(below)).inject()
            code = cli.main(arguments)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_killed_on_the_card(two_blocks: Path, little_text: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", CHAIN, **FEW)
    command = ["run", str(recipe), "-m", str(two_blocks), "--data", str(little_text), "--device", "cuda", "-o"]
    assert cli.main([*command, str(tmp_path / "whole")]) == 0
    draw, kills, code = random.Random(3), 0, -signal.SIGKILL
    while kills < 12 and code == -signal.SIGKILL:
        code = forked([*command, str(tmp_path / "run")], draw.randrange(20, 90), tmp_path / "run")
        kills += code == -signal.SIGKILL
    assert code == 0 and kills >= 2, f"exit {code} after {kills} kills"
    assert hashes(tmp_path / "run") == hashes(tmp_path / "whole") and len(hashes(tmp_path / "run")) > 10
