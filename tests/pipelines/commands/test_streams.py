"""Standard streams as shells, schedulers and old locales leave them: ASCII, closed, full, read by nobody."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bitmend.pipelines.commands.streams import plain

from .test_light_commands import made_run

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
EACH = """
import json, os, sys
from bitmend.pipelines.cli import main
for arguments in json.loads(sys.argv[1]):
    print("exit code", main([os.fsdecode(argument.encode()) for argument in arguments]))
"""
MAIN = "import sys; from bitmend.pipelines.cli import main; sys.exit(main(sys.argv[1:]))"


def shell(redirection: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`pipeline ARGUMENTS` under a shell's redirection."""
    command = ["sh", "-c", f'exec "$0" -c "$1" {" ".join(arguments)} {redirection}', sys.executable, MAIN]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **variables})


def test_in_ascii_every_command_says_the_same_in_other_characters(tmp_path: Path) -> None:
    one, two = str(made_run(tmp_path / "ein – Lauf")), str(made_run(tmp_path / "two"))
    commands = [
        ["--help"], ["run", "--help"], ["list"], ["list", "svdquant"], ["list", "gptq", "--json"], ["show", "recover"], ["status", one],
        ["report", "show", one], *(["report", "export", one, "--format", kind] for kind in ("json", "md", "csv", "html")),
        ["compare", one, two], ["compare", one, two, "--json"], ["gc", one], ["status", f"{two} – no"],
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", EACH, json.dumps(commands)], capture_output=True, timeout=120, env={**os.environ, **ASCII})
    shown, errors = done.stdout.decode("ascii"), done.stderr.decode("ascii")
    codes = [line.split()[2] for line in shown.splitlines() if line.startswith("exit code ")]
    assert codes == ["0"] * (len(commands) - 1) + ["3"] and "Traceback" not in errors, errors
    assert "|w|.|x|" in shown and "GPTQ of W - L" in shown
    assert "error: " in errors and "no: no such run directory" in errors


def test_json_in_ascii_says_the_same_as_in_utf_8() -> None:
    utf_8, in_ascii = (shell("", "list", "svdquant", "--json", **variables) for variables in ({"PYTHONIOENCODING": "utf-8"}, ASCII))
    assert in_ascii.stdout.isascii() and not utf_8.stdout.isascii() and json.loads(in_ascii.stdout) == json.loads(utf_8.stdout)


@pytest.mark.parametrize(
    ("text", "expected"), [("1 × 2 … −3", "1 x 2 ... -3"), ("é ╭─│", "e |-|"), ("漢", "\\u6f22"), ("\udcff", "\\udcff")]
)
def test_what_stands_for_a_character(text: str, expected: str) -> None:
    made = "".join(c if c.isascii() else plain(UnicodeEncodeError("ascii", c, 0, 1, ""))[0] for c in text)
    assert made == expected


def test_a_full_stdout_is_one_line_and_code_5(tmp_path: Path) -> None:
    run = str(made_run(tmp_path / "run"))
    for arguments in (["status", run], ["report", "show", run], ["list", "--json"], ["--version"]):
        for unbuffered in ("", "1"):
            done = shell(">/dev/full", *arguments, PYTHONUNBUFFERED=unbuffered)
            assert (done.returncode, done.stderr) == (5, "error: stdout: No space left on device\n"), arguments
    done = shell(">/dev/full", "status", "--help")
    assert done.returncode == 5 and len(done.stderr.splitlines()) == 1
    assert shell(">/dev/full 2>/dev/full", "status", run).returncode == 5
    assert shell("2>/dev/full", "status", f"{run}/no").returncode == 3


def test_closed_streams_are_no_error(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*.json")}
    for redirection, arguments, code in (
        (">&-", ["status", str(run)], 0),
        ("<&- >&- 2>&-", ["gc", str(run)], 0),
        ("2>&-", ["status", "nowhere"], 3),
        ("<&-", ["generate", str(run), "-"], 2),
    ):
        done = shell(redirection, *arguments)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], ["show", "recover"], ["report", "show", "RUN"]])
def test_a_reader_that_takes_one_line_is_no_error(arguments: list[str], tmp_path: Path) -> None:
    run = str(made_run(tmp_path / "run"))
    done = shell("| true", *(run if word == "RUN" else word for word in arguments))
    assert (done.returncode, done.stderr) == (0, "")
