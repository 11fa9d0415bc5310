"""The tutorial is true: every command in it runs, on the model and text that it names, and gives the numbers that it shows."""

import re
import shlex
from pathlib import Path

import pytest
from bitmend.pipelines import cli
from bitmend.pipelines.run import ledger

pytestmark = pytest.mark.usefixtures("as_before", "no_pages")

ROOT = Path(__file__).parents[3]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PLACEHOLDER = "MODEL"
"""Stands for a model of the reader's own."""
SHELL = ("make venv", "source .venv/bin/activate")


def test_every_command_runs_and_the_numbers_are_those_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tests", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bitmend.pipelines.stages.inputs.HELD_OUT_TOKENS", 512)  # the last step is kept with any
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    printed: list[str] = []
    for language, block in BLOCK.findall(page):
        if language == "python":
            exec(compile(block, "tutorial.md", "exec"), {})
            printed.append(capsys.readouterr().out)
            continue
        for line in block.splitlines():
            command, *arguments = shlex.split(line, comments=True)
            if line.startswith(SHELL) or PLACEHOLDER in arguments:
                continue
            assert command == "pipeline", line
            assert cli.main(arguments) == 0, f"{line}: {capsys.readouterr().err}"
            printed.append(capsys.readouterr().out)
    assert len(printed) >= 12
    generated, by_transformers = printed[-2:]
    assert by_transformers.startswith("The river") and generated.strip() in by_transformers

    first, budget = (ledger.record(Path("runs") / name).stages for name in ("first", "budget"))
    for stage in first:
        shown = re.search(rf"^\| {stage.stage} \| \S+ \| ([\d.]+) \|", page, re.MULTILINE)
        assert shown and float(shown[1]) == pytest.approx(stage.perplexity, rel=0.02), stage.stage
    match = re.search(r"took perplexity from ([\d.]+) to ([\d.]+), before", page)
    assert match and [float(number) for number in match.groups()] == pytest.approx([first[-1].perplexity, budget[-1].perplexity], rel=0.02)
