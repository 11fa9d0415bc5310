"""What surrounds a command: names that lead nowhere, files that are something else, modes that forbid. One line, the right code."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bitmend.kernels.cache import cache_directory
from bitmend.pipelines import cli
from bitmend.pipelines.errors import InputError
from bitmend.pipelines.models.source import resolve_model

from ..families import save_speaking
from ..runs import Processes, hashes, write_recipe
from .test_bad_input import one_line


@pytest.fixture
def arguments(small_model: Path, small_text: Path, tmp_path: Path) -> list[str]:
    recipe = write_recipe(tmp_path / "r.yaml", [{"quantize": {"method": "rtn", "group_size": 32}}])
    return ["run", str(recipe), "-m", str(small_model), "--data", str(small_text), "--device", "cpu"]


NAMES: dict[str, tuple[list[str], int, str]] = {
    "a run directory that is a loop": (["-o", "{loop}"], 3, r"Symlink loop from '\S+loop': links that lead to themselves|loop: .*levels of symbolic links"),
    "a run directory without a name": (["-o", ""], 2, r"the name is empty; give a path"),
    "a model that is a loop": (["-m", "{loop}"], 3, r"loop: no such model directory"),
    "a model without a name": (["-m", ""], 2, r"model"),
    "a text that is a loop": (["--data", "{loop}.txt"], 3, r"loop\.txt: no such file"),
    "a text without a name": (["--data", ""], 2, r"data"),
    "a mistyped path": (["-m", "models/mistyped"], 3, r"models/mistyped: no such directory, and as a model of the Hub not in the local cache"),
    "settings nested without end": (["-c", "{deep}"], 2, r"deep\.yaml: nested too deep to be settings"),
    "a value nested without end": (["--set", "quantize.bits=" + "[" * 4000], 2, r"--set quantize\.bits: nested too deep to be settings"),
    "20,000 stages": (["-c", "{many}"], 2, r"stages: 20000 are more than a recipe may have \(99\)"),
    "a recipe that is no text": (["-c", "/dev/null/x"], 2, r"cannot be read as text|no such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_names(case: str, commands: Processes, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("loop", "loop.txt"):
        (tmp_path / name).symlink_to(name)
    (tmp_path / "deep.yaml").write_text("seed: " + "[" * 5000 + "]" * 5000)
    (tmp_path / "many.yaml").write_text("stages:\n" + "  - quantize: {method: rtn}\n" * 20_000)
    places = {"loop": tmp_path / "loop", "deep": tmp_path / "deep.yaml", "many": tmp_path / "many.yaml"}
    extra, expected, words = NAMES[case]
    default = [] if "-o" in extra else ["-o", str(tmp_path / "run")]
    filled = [text if text.startswith("quantize") else text.format(**places) for text in extra]
    code, line = one_line(commands, [*arguments, *default, *filled], tmp_path / "log")
    assert code == expected and re.search(words, line), line
    assert len(line) < 500, "no line repeats what it was given without end"


OTHERS = (b"", b"[]", b"{}", b"null", b"3", b"\xff\xfe")


@pytest.mark.parametrize("name", ["run.json", "record.json", "environment.json", "recipe.resolved.yaml", "artifact.json"])
def test_files_that_are_something_else(name: str, commands: Processes, finished: Path, tmp_path: Path) -> None:
    """Commands read them and either need them not or say so; none ends in an internal error."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    file = next(iter([*run.glob(name), *run.glob(f"stages/05-*/{name}")]))
    file.chmod(0o644)
    asked = {"record.json": ["report", "show", str(run)], "artifact.json": ["eval", str(file.parent), "--device", "cpu"]}
    for content in OTHERS:
        file.write_bytes(content)
        for command in (asked.get(name, ["status", str(run)]), ["resume", str(run), "--device", "cpu", "--until", "baseline"]):
            code, text = commands.run(command, tmp_path / "log"), (tmp_path / "log").read_text()
            assert code in (0, 2, 3) and "Traceback" not in text, f"{name} {content!r}: {text}"
            assert code == 0 or (text.count("error: ") == 1 and str(run) in text), f"{name} {content!r}: {text}"


MODES: dict[str, tuple[str, int, str]] = {
    "a model directory that may not be read": ("model", 3, r"model"),
    "weights that may not be read": ("model/model.safetensors", 3, r"model\.safetensors.*[Pp]ermission denied"),
    "a config that may not be read": ("model/config.json", 3, r"config\.json"),
    "a tokenizer that may not be read": ("model/tokenizer.json", 3, r"tokenizer"),
    "a text that may not be read": ("text.jsonl", 3, r"text\.jsonl.*[Pp]ermission denied"),
    "a recipe that may not be read": ("r.yaml", 2, r"r\.yaml: cannot be read"),
    "a place that may not be written": ("closed", 3, r"closed.*[Pp]ermission denied"),
}


@pytest.mark.parametrize("case", MODES)
def test_modes(case: str, commands: Processes, arguments: list[str], small_model: Path, small_text: Path, tmp_path: Path) -> None:
    """For an ordinary user."""
    shutil.copytree(small_model, tmp_path / "model")
    shutil.copy(small_text, tmp_path / "text.jsonl")
    (tmp_path / "closed").mkdir()
    name, expected, words = MODES[case]
    (tmp_path / name).chmod(0)
    output = tmp_path / ("closed" if name == "closed" else "") / "run"
    command = ["run", str(tmp_path / "r.yaml"), "-m", str(tmp_path / "model"), "--data", str(tmp_path / "text.jsonl"), "-o", str(output)]
    try:
        code, text = commands.run(command, tmp_path / "log", unprivileged=True), (tmp_path / "log").read_text()
    finally:
        (tmp_path / name).chmod(0o755)
    if code == 99 and "laid down" in text:
        pytest.skip("this system lets no process lay down root's right to read everything")
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == expected and len(lines) == 1 and "Traceback" not in text, text
    assert re.search(words, lines[0]), lines[0]


def test_a_stage_that_may_not_be_read(commands: Processes, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    stage = next(run.glob("stages/02-quantize-????????"))
    stage.chmod(0)
    try:
        code, text = (
            commands.run(["resume", str(run), "--device", "cpu"], tmp_path / "log", unprivileged=True),
            (tmp_path / "log").read_text(),
        )
    finally:
        stage.chmod(0o755)
    if code == 99 and "laid down" in text:
        pytest.skip("this system lets no process lay down root's right to read everything")
    assert code == 3 and text.count("error: ") == 1 and "02-quantize" in text, text
    assert hashes(run) == hashes(finished), "nothing was done anew"


def test_a_cache_that_may_not_be_written(commands: Processes, arguments: list[str], own_cache: Path, tmp_path: Path) -> None:
    """It saves time only: the run is the same without."""
    modes = {path: path.stat().st_mode for path in (own_cache, *own_cache.rglob("*")) if path.is_dir()}
    for path in modes:
        path.chmod(0o500)
    try:
        code = commands.run([*arguments, "-o", str(tmp_path / "run")], tmp_path / "log", unprivileged=os.geteuid() == 0)
    finally:
        for path, mode in modes.items():
            path.chmod(mode & 0o777)
    text = (tmp_path / "log").read_text()
    if code == 99 and "laid down" in text:
        pytest.skip("this system lets no process lay down root's right to read everything")
    assert code == 0, text


NO_HOME = """
import json, sys
from bitmend.pipelines.cli import main
for arguments in json.loads(sys.argv[1]):
    print(json.dumps([arguments, main(arguments)]), file=sys.stderr, flush=True)
"""
CACHES = ("HOME", "HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TRITON_CACHE_DIR", "MPLCONFIGDIR", "BITMEND_CACHE")


@pytest.fixture
def ordinary() -> Iterator[tuple[list[str], Path]]:
    """(what begins a command of an ordinary user without a home, a directory of theirs that they reach)."""
    user = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"] if os.geteuid() == 0 else []
    reading = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]  # an interpreter in root's home, say
    environment = {name: value for name, value in os.environ.items() if name not in CACHES} | {"HOME": "/nonexistent"}
    begins = ["env", "-i", *(f"{name}={value}" for name, value in environment.items()), sys.executable, "-P"]
    with tempfile.TemporaryDirectory() as place:
        for more in ([], reading) if user else ([],):
            actual = [*user, *more, *begins]
            if (shutil.which("setpriv") or not user) and not subprocess.run(
                [*actual, "-c", "import bitmend"], cwd="/", capture_output=True
            ).returncode:
                break
        else:
            pytest.skip("root cannot become an ordinary user here who reads this interpreter (setpriv)")
        os.chown(place, 54321 if user else -1, -1)
        yield actual, Path(place)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_home_that_may_not_be_written(every: bool, ordinary: tuple[list[str], Path], small_model: Path, small_text: Path) -> None:
    """Every command works where it needs no cache, else it says in one line which variable names another place; no library grumbles."""
    begins, place = ordinary
    save_speaking("llama", place / "model", small_model, num_hidden_layers=1)
    (place / "model" / "model.safetensors").chmod(0o644)
    shutil.copy(small_text, place / "text.jsonl")
    chain = [
        {"quantize": {"method": "rtn", "group_size": 32}},
        {"recover": {"method": "lora", "rank": 2, "steps": 1, "batch_size": 1, "seq_len": 32}},
    ]
    sizes = {"calibration": {"samples": 2, "seq_len": 32}, "evaluation": {"seq_len": 32, "windows": 2}}
    write_recipe(place / "r.yaml", [*chain, {"fuse": {}}], **sizes)
    write_recipe(place / "one.yaml", chain[:1], **sizes)
    demo = ["run", "r.yaml", "-m", "model", "--device", "cpu"]
    given = ["-m", "model", "--data", "text.jsonl", "--device", "cpu"]
    commands = [
        ["list"], ["run", "r.yaml", *given, "-o", "run"], ["status", "run", "--verify"],
        ["report", "export", "run", "--format", "html", "-o", "page.html"], ["eval", "run", "--device", "cpu"],
        ["export", "run", "--format", "dense", "--stage", "quantize", "-o", "out"], ["generate", "run", "The river", "--max-new-tokens", "2"],
        ["bench", "compress", "--size", "64", "--method", "rtn", "--repeats", "1", "--device", "cpu"],
        ["sweep", "one.yaml", *given, "--over", "quantize.bits=4", "-o", "sweep"], demo,
    ]  # fmt: skip
    commands = commands if every else [*commands[:3], demo]
    done = subprocess.run([*begins, "-c", NO_HOME, json.dumps(commands)], cwd=place, capture_output=True, text=True, timeout=300)
    codes = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[[")]
    assert codes == [[command, 3 if command == demo else 0] for command in commands], done.stderr
    other = [line for line in done.stderr.splitlines() if not re.match(r"\[\[|\d\d:\d\d:\d\d [A-Z]+ ", line)]
    assert len(other) == 1 and re.fullmatch(
        r"error: cache /nonexistent/\S+: cannot be written \(.*\); set BITMEND_CACHE to a directory of yours", other[0]
    )
    assert done.stderr.count("these choices are measured again next time; BITMEND_CACHE=DIR keeps them") == 1


def test_a_user_whom_the_system_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """No HOME and no entry of its id: there is no place for a cache, and `~` is none."""

    def nobody(number: int) -> Any:
        raise KeyError(number)

    for name in CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert not cache_directory().parent.parent.is_dir()
    with pytest.raises(RuntimeError) as caught:
        Path("~/model").expanduser()
    assert cli.explain(caught.value) == (2, "a path begins with ~, and there is no such home directory; write the path out, or set HOME")


@pytest.mark.parametrize(
    ("path", "variable"), [("/home/x/.triton/cache", "TRITON_CACHE_DIR"), ("/home/x/.cache/huggingface/hub", "HF_HOME")]
)
def test_a_librarys_cache_that_may_not_be_written_names_its_variable(path: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = PermissionError(errno.EACCES, "Permission denied", path)
    assert cli.explain(error) == (3, f"{path}: Permission denied; set {variable} to a directory of yours")
    assert cli.explain(PermissionError(errno.EACCES, "Permission denied", "/home/x/text")) == (3, "/home/x/text: Permission denied")

    def refused(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    with pytest.raises(InputError, match=f"org/model: {path} cannot be written .*; set HF_HOME to a directory of yours"):
        resolve_model("org/model")
