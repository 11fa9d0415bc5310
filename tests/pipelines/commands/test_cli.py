"""The command line: every command's arguments, what goes to stdout and what to stderr, exit codes, errors as one line."""

import errno
import importlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import bitmend.pipelines
import pytest
import typer
from bitmend.pipelines import cli, errors, logs
from bitmend.pipelines.ranks.exchange import Ranks
from bitmend.pipelines.recipes import stage_settings
from bitmend.pipelines.recipes.recipe import resolve
from bitmend.pipelines.store.rundir import RunDirectory
from bitmend.reports.record import Protocol, RunRecord, StageRecord
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("as_before")

COMMANDS = ("run", "resume", "status", "report", "compare", "eval", "export", "generate", "sweep", "bench", "doctor", "gc", "list", "show")
RECIPE = "stages: [{quantize: {method: rtn, bits: 4}}, {recover: {method: lora}}, {fuse: {backend: auto}}]\nmodel: some/model\n"
RUN_OPTIONS = [
    "-m",
    "--model",
    "--data",
    "--calibration",
    "--train",
    "--eval",
    "-o",
    "-c",
    "--set",
    "--from",
    "--until",
    "--force",
    "--device",
    "--seed",
    "--dry-run",
    "--json",
    "--profile",
    "--revision",
    "--budget",
    "--teacher",
    "--max-perplexity-ratio",
    "-v",
    "-q",
]


def record(name: str = "basic", perplexity: float = 30.0, trainable: int | None = 1000) -> RunRecord:
    stages = (
        StageRecord("baseline", None, perplexity=28.7, perplexity_ratio=1.0, total_bytes=1_000_000, seconds=1.0),
        StageRecord(
            "quantize",
            "rtn",
            perplexity=perplexity,
            perplexity_ratio=perplexity / 28.7,
            total_bytes=200_000,
            seconds=2.0,
            trainable_parameters=trainable,
        ),
    )
    return RunRecord(name, "demo", Protocol(dataset="demo", seq_len=512, windows=16), stages)


class Calls(list[tuple[str, tuple[Any, ...], dict[str, Any]]]):
    """What was called, with which arguments."""

    def fake(self, name: str, answer: Any) -> Any:
        def called(*arguments: Any, **options: Any) -> Any:
            self.append((name, arguments, options))
            if isinstance(answer, BaseException):
                raise answer
            return answer

        return called


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> Any:
    """Stand a module of pipelines in for another, its functions recording their calls and giving the answers."""

    def stand_in(name: str, **answers: Any) -> None:
        fake = types.ModuleType(f"bitmend.pipelines.{name}")
        for function, answer in answers.items():
            setattr(fake, function, calls.fake(function, answer))
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
        room, _, last = fake.__name__.rpartition(".")
        monkeypatch.setattr(importlib.import_module(room), last, fake, raising=False)

    return stand_in


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "basic.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


def failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and the one line on stderr; nothing on stdout."""
    code = cli.main(list(arguments))
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    lines = [line for line in shown.err.splitlines() if line.startswith("error: ") or "interrupted" in line]
    assert len(lines) == 1, shown.err
    assert shown.out == ""
    return code, lines[0]


def test_every_command_has_help_and_run_every_option() -> None:
    runner = CliRunner()
    shown = runner.invoke(cli.app, ["--help"], env={"COLUMNS": "200"}).output
    for command in COMMANDS:
        assert f" {command} " in shown
        assert runner.invoke(cli.app, [command, "--help"]).exit_code == 0
    text = runner.invoke(cli.app, ["run", "--help"], env={"COLUMNS": "250", "TERMINAL_WIDTH": "250"}).output
    assert [option for option in RUN_OPTIONS if option not in text] == []
    assert runner.invoke(cli.app, []).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rum", "x"], "Did you mean 'run'"),
        (["run"], "Missing argument 'RECIPE'"),
        (["run", "x", "--dryrun"], "--dry-run"),
        (["run", "x", "--device", "gpu"], "'gpu' is not one of 'auto', 'cpu', 'cuda'"),
        (["run", "x", "--seed", "-1"], "--seed"),
        (["run", "x", "-v", "-q"], "-v and -q exclude each other"),
        (["run", "compres_and_recover"], "did you mean 'compress_and_recover'?"),
        (["run", "compress_and_recover", "--set", "evaluation.seqlen=3"], "did you mean 'seq_len'?"),
        (["run", "compress_and_recover", "--set", "quantise.bits=3"], "did you mean 'quantize'?"),
        (["run", "compress_and_recover", "--budget", "3"], "as in 3.0bpw or 60MB"),
        (["run", "compress_and_recover", "--eval"], "--eval"),
        (["report", "shw", "x"], "Did you mean 'show'"),
        (["report", "export", "."], "Missing option '--format'"),
        (["compare", "."], "at least two run directories"),
        (["export", ".", "--format", "dens", "-o", "x"], "'dens' is not one of 'dense'"),
        (["export", ".", "--format", "dense", "-o", "x", "--requantize"], "--requantize goes with --merge"),
        (["export", ".", "--format", "dense", "-o", "x", "--adapter", "--merge"], "--adapter and --merge exclude each other"),
        (["export", ".", "--format", "dense", "-o", "."], "is not empty"),
        (["generate", ".", ""], "the prompt is empty"),
        (["sweep", "compress_and_recover"], "Missing option '--over'"),
        (["sweep", "compress_and_recover", "--over", "seed"], "expected KEY=A,B,C"),
        (["sweep", "compress_and_recover", "--over", "seed=1", "--over", "seed=2"], "names a setting twice"),
        (["bench", "all"], "'all' is not one of"),
        (["eval", "demo", "--seq-len", "1"], "--seq-len"),
    ],
)
def test_usage_errors_are_one_line_with_the_way_out(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").write_text("x")
    code, line = failing(capsys, *arguments)
    assert code == 2
    assert expected in line


@pytest.mark.parametrize("command", [["resume"], ["status"], ["gc"], ["report", "show"], ["report", "export", "--format", "json"]])
def test_a_missing_run_directory_is_bad_input(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, line = failing(capsys, *command, "nowhere")
    assert code == 3
    assert "nowhere: no such run directory" in line


def test_run_hands_everything_on_and_shows_the_table(
    recipe: str, module: Any, calls: Calls, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    module("run.runner", run=record())
    module("run.ledger", record=record())
    output = tmp_path / "out"
    RunDirectory(output).create()
    (output / "report.html").write_text("page")
    settings = tmp_path / "more.yaml"
    settings.write_text("calibration: {samples: 7}\n")
    options = f"-m org/m --data a --calibration b --train c --eval d -o {output} -c {settings} --set quantize.bits=3 --from quantize --until recover"
    options += (
        " --force fuse --device cpu --seed 5 --profile demo --revision main --budget 3.0bpw --teacher org/t --max-perplexity-ratio 1.5 -v"
    )
    assert cli.main(["run", recipe, *options.split()]) == 0
    ((name, (made, directory), given), _) = calls
    assert (name, directory) == ("run", output)
    asked = {"from_stage": "quantize", "until_stage": "recover", "force": "fuse", "device": "cpu", "max_perplexity_ratio": 1.5}
    assert given == asked | {"ranks": Ranks()}
    assert (made.model, made.revision, made.teacher, made.seed, made.profile, made.budget.bits_per_weight) == (
        "org/m",
        "main",
        "org/t",
        5,
        "demo",
        3.0,
    )
    assert (made.data.calibration, made.data.train, made.data.evaluation) == ("b", "c", "d")
    assert (made.calibration.samples, made.stage("quantize").config.bits) == (7, 3)
    shown = capsys.readouterr()
    assert "quantize" in shown.out
    assert str(output / "report.html") in shown.out


def test_run_names_its_directory_and_prints_json(
    recipe: str, module: Any, calls: Calls, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module("run.runner", run=record())
    module("run.ledger", record=record())
    assert cli.main(["run", recipe, "--json"]) == 0
    assert calls[0][1][1] == Path("runs/basic-model")
    printed = json.loads(capsys.readouterr().out)
    assert (printed["schema"], printed["run"], printed["stages"][1]["perplexity"]) == (2, "basic", 30.0)


def test_unknown_stage_addresses_are_refused_before_any_work(
    recipe: str, module: Any, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    module("run.runner", run=record())
    module("run.ledger", record=record())
    for option in ("--from", "--until", "--force"):
        code, line = failing(capsys, "run", recipe, option, "quantise")
        assert code == 2
        assert "did you mean 'quantize'? known: baseline, fuse, quantize, recover" in line
    assert calls == [] and not Path("runs").exists()
    assert cli.main(["run", recipe, "--force", "baseline"]) == 0


def test_dry_run_predicts_and_names_refusals(recipe: str, module: Any, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    plan = {
        "total_bytes": 2_500_000,
        "stages": [{"stage": "quantize", "seconds": 300.0}, {"stage": "fuse", "seconds": None}],
        "refusals": [],
    }
    module("planning.plan", predict=plan)
    assert cli.main(["run", recipe, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "2.5 MB" in shown
    assert "5.0 min" in shown
    assert cli.main(["run", recipe, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == plan
    module("planning.plan", predict=plan | {"refusals": ["quantize: 576 is not a multiple of 128", "another"]})
    assert cli.main(["run", recipe, "--dry-run"]) == 2
    assert "error: this run would be refused: quantize: 576 is not a multiple of 128 (and 1 more above)" in capsys.readouterr().err
    assert [name for name, _, _ in calls] == ["predict"] * 3


def test_resume_status_and_gc(module: Any, calls: Calls, run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = {"run": "x", "stages": [{"stage": "quantize", "state": "done"}]}
    module("run.runner", resume=record())
    module("run.ledger", record=record(), status=status, gc={"dropped": [], "freed_bytes": 3_000_000})
    assert cli.main(["resume", str(run_directory), "--until", "quantize", "--device", "cpu"]) == 0
    assert calls[0] == (
        "resume",
        (run_directory,),
        {"from_stage": None, "until_stage": "quantize", "force": None, "device": "cpu", "max_perplexity_ratio": None, "ranks": Ranks()},
    )
    capsys.readouterr()
    assert cli.main(["status", str(run_directory), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == status
    assert cli.main(["status", str(run_directory)]) == 0
    assert "done" in capsys.readouterr().out
    assert cli.main(["gc", str(run_directory)]) == 0
    assert "freed_bytes: 3 MB" in capsys.readouterr().out


def test_the_gate_shows_the_table_and_exits_4(recipe: str, module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    module("run.runner", run=errors.QualityError("perplexity 40 is above"))
    module("run.ledger", record=record())
    assert cli.main(["run", recipe, "--max-perplexity-ratio", "1.1"]) == 4
    shown = capsys.readouterr()
    assert "quantize" in shown.out
    assert shown.err.strip() == "error: perplexity 40 is above"


def test_report_show_and_export(module: Any, run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module("run.ledger", record=record())
    assert cli.main(["report", "show", str(run_directory)]) == 0
    assert "28.7" in capsys.readouterr().out
    for kind, mark in (("html", "<html"), ("md", "| stage"), ("csv", "perplexity,"), ("json", '"schema": 2')):
        assert cli.main(["report", "export", str(run_directory), "--format", kind]) == 0
        assert mark in capsys.readouterr().out
        target = tmp_path / f"page.{kind}"
        assert cli.main(["report", "export", str(run_directory), "--format", kind, "-o", str(target)]) == 0
        assert mark in target.read_text()
        assert capsys.readouterr().out.strip() == str(target)
    code, line = failing(capsys, "report", "export", str(run_directory), "--format", "md", "-o", str(tmp_path / "no" / "page.md"))
    assert (code, "no such directory" in line) == (2, True)


def test_a_report_takes_the_place_of_a_report_alone(
    module: Any, run_directory: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    module("run.ledger", record=record())
    (run_directory / "stages" / "00-baseline").mkdir(parents=True)
    for name in ("run.json", "record.json", "log.jsonl"):
        (run_directory / name).write_text('{"perplexity": 1}')
    (tmp_path / "mine.json").write_text('{"irreplaceable": true}')
    refused = [run_directory / "run.json", run_directory / "record.json", run_directory / "log.jsonl", tmp_path / "mine.json"]
    (tmp_path / "link.json").symlink_to(run_directory / "run.json")
    refused += [tmp_path / "link.json", run_directory / "stages" / "00-baseline" / "new.json", tmp_path]
    before = {path: path.read_text() for path in refused if path.is_file()}
    for path in refused:
        assert cli.main(["report", "export", str(run_directory), "--format", "json", "-o", str(path)]) == 2, path
    assert {path: path.read_text() for path in before} == before and not refused[-2].exists()
    for path in (run_directory / "report.json", tmp_path / "new.json"):
        for _ in range(2):
            assert cli.main(["report", "export", str(run_directory), "--format", "json", "-o", str(path)]) == 0
    capsys.readouterr()


def test_compare(module: Any, calls: Calls, run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module("run.ledger", record=record())
    assert cli.main(["compare", str(run_directory), str(tmp_path)]) == 0
    assert "basic" in capsys.readouterr().out
    assert cli.main(["compare", str(run_directory), str(tmp_path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 2
    assert [arguments for _, arguments, _ in calls[:2]] == [(run_directory,), (tmp_path,)]


def test_eval_takes_the_protocol_of_the_run_that_holds_the_artifact(
    module: Any, calls: Calls, run_directory: Path, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    module("run.evaluate", evaluate={"perplexity": 31.25, "protocol": {"windows": 16}, "broken": float("nan")})
    artifact = run_directory / "stages" / "01-quantize"
    artifact.mkdir(parents=True)
    (run_directory / "run.json").write_text("{}")
    (run_directory / "recipe.resolved.yaml").write_text(
        resolve(recipe, sets=["evaluation={seq_len: 64, windows: 3}", "data.evaluation=t.txt"]).to_yaml()
    )
    for model, options, expected in (
        ("demo", [], ("demo", 512, 16)),
        ("org/m", [], ("demo", 2048, None)),
        (str(artifact), [], ("t.txt", 64, 3)),
        (str(run_directory), ["--eval", "u.txt", "--seq-len", "32", "--windows", "2"], ("u.txt", 32, 2)),
    ):
        assert cli.main(["eval", model, *options, "--json", "--device", "cpu"]) == 0
        source, seq_len, windows = expected
        assert calls[-1] == (
            "evaluate",
            (model,),
            {"eval_source": source, "seq_len": seq_len, "windows": windows, "device": "cpu", "dtype": None},
        )
        assert json.loads(capsys.readouterr().out) == {"perplexity": 31.25, "protocol": {"windows": 16}, "broken": None}
    assert cli.main(["eval", "demo"]) == 0
    assert "perplexity: 31.25" in capsys.readouterr().out


def test_export(module: Any, calls: Calls, run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module("export.exporting", export={"format": "gptq-v2", "total_bytes": 4_000})
    arguments = [
        "export",
        str(run_directory),
        "--format",
        "gptq-v2",
        "--stage",
        "recover",
        "--merge",
        "--requantize",
        "-o",
        str(tmp_path / "new"),
    ]
    assert cli.main(arguments) == 0
    how = {"stage": "recover", "merge": True, "requantize": True, "adapter": False}
    assert calls == [("export", (run_directory, "gptq-v2", tmp_path / "new"), how)]
    assert "4 kB" in capsys.readouterr().out


def test_generate_streams_text_to_stdout(module: Any, calls: Calls, run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module("run.generate", generate=["Once ", "upon"])
    assert (
        cli.main(
            ["generate", str(run_directory), "Tell", "--max-new-tokens", "5", "--temperature", "0.5", "--seed", "3", "--device", "cpu"]
        )
        == 0
    )
    assert capsys.readouterr().out == "Once upon\n"
    assert calls == [("generate", (run_directory, "Tell"), {"max_new_tokens": 5, "temperature": 0.5, "seed": 3, "device": "cpu"})]
    assert cli.main(["generate", str(run_directory), "Tell", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"prompt": "Tell", "text": "Once upon"}


def test_list_names_recipes_methods_and_formats(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {"compress_and_recover", "recover"} <= set(printed["recipes"])
    assert {"magnitude", "wanda"} <= set(printed["prune"])
    assert {"rtn", "gptq", "nf4"} <= set(printed["quantize"])
    assert printed["quantize"]["gptq"]["bits"] == 4
    assert (printed["decompose"]["loftq"]["iterations"], printed["decompose"]["qera_exact"]["iterations"]) == (5, 1)
    assert {"lora", "perp"} <= set(printed["recover"])
    assert {"dense", "gptq", "compressed-tensors"} <= set(printed["export_formats"])
    assert printed["stage_settings"]["quantize"]["embedding_bits"] == 8 and "true_sequential" in printed["stage_settings"]["decompose"]
    assert printed["methods"]["prune"]["wanda"]["paper"] == "Wanda, arXiv:2306.11695"
    departures = printed["departures_from_papers"]
    assert (
        departures["recover"]["lota"] == "LoTA-QAF without its offset matrices"
        and "range multiplier" in departures["quantize"]["learned_rounding"]
    )


def test_list_has_a_line_for_each_method_and_of_one_its_settings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for stage in stage_settings.STAGES:
        begin = next(place for place, line in enumerate(lines) if re.match(rf"{stage} +what it does +paper", line))
        for line, name in zip(lines[begin + 2 :], stage_settings.methods(stage), strict=False):
            assert line.split()[0] == name and (line.endswith("–") or re.search(r"arXiv:\d{4}\.\d{5}$", line)), line
    assert cli.main(["list", "lota"]) == 0
    shown = capsys.readouterr().out
    assert "departs from it: LoTA-QAF without its offset matrices" in shown and "merges into: in place" in shown
    assert re.search(r"^threshold +0\.2 +\(0, 1\)$", shown, re.MULTILINE) and "A code moves by ±1" in shown
    assert cli.main(["list", "loftq", "--json"]) == 0
    assert [row["stage"] for row in json.loads(capsys.readouterr().out)["methods"]] == ["decompose", "recover"]
    code, line = failing(capsys, "list", "gtpq")
    assert code == 2 and "did you mean 'gptq'?" in line


def test_show_writes_a_recipe_that_can_be_saved_and_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, module: Any, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["show", "compress_and_recover", "--profile", "standard", "--set", "quantize.bits=3"]) == 0
    saved = tmp_path / "mine.yaml"
    saved.write_text(capsys.readouterr().out)
    module("run.runner", run=record())
    module("run.ledger", record=record())
    assert cli.main(["run", str(saved), "-q"]) == 0
    assert (calls[0][1][0].stage("quantize").config.bits, calls[0][1][0].profile) == (3, "standard")
    capsys.readouterr()
    assert cli.main(["show", "compress_and_recover", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["profile"] == "demo"


class _Exotic(Exception):
    """Nobody expects it."""


class OutOfMemoryError(RuntimeError):
    """As torch names its own."""


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (errors.UsageError("wrong\noption"), 2, "wrong option"),
        (errors.InputError("no such model"), 3, "no such model"),
        (errors.QualityError("too bad"), 4, "too bad"),
        (errors.OutOfMemoryError("full"), 5, "full"),
        (MemoryError(), 5, "out of memory;"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 5, "out of memory (CUDA out of memory)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 5, "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 5, "no disk space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 5, "no disk space left"),
        (ValueError("I/O error: No space left on device (os error 28)"), 5, "no disk space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/some/file"), 3, "/some/file: Permission denied"),
        (_Exotic("odd\nthing"), 1, "unexpected _Exotic: odd thing; run again with -v for the traceback"),
        (KeyboardInterrupt(), 130, "interrupted; what was finished is kept"),
        (typer.Abort(), 130, "interrupted"),
    ],
)
def test_errors_become_exit_codes(
    error: BaseException, code: int, expected: str, module: Any, run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module("run.ledger", status=error)
    actual, line = failing(capsys, "status", str(run_directory))
    assert actual == code
    assert expected in line


def test_verbose_shows_the_traceback(module: Any, run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module("run.ledger", status=_Exotic("odd"))
    assert cli.main(["status", str(run_directory), "-v"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert shown.strip().splitlines()[-1] == "error: unexpected _Exotic: odd"


def test_sweep_runs_every_combination_and_ranks_them(
    recipe: str, module: Any, calls: Calls, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {2: record(perplexity=90.0), 3: record(perplexity=31.0, trainable=500_000), 4: errors.OutOfMemoryError("full")}

    def run(made: Any, directory: Path, **options: Any) -> RunRecord:
        calls.append(("run", (made, directory), options))
        answer = answers[made.stage("quantize").config.bits]
        if isinstance(answer, Exception):
            raise answer
        return answer

    module("run.runner")
    monkeypatch.setattr(sys.modules["bitmend.pipelines.run.runner"], "run", run, raising=False)
    arguments = [
        "sweep",
        recipe,
        "--over",
        "quantize.bits=2,3,4",
        "--over",
        "recover.method=lora,loar",
        "-o",
        str(tmp_path / "s"),
        "--json",
    ]
    code, line = failing(capsys, *arguments)
    assert (code, "unknown method" in line, calls) == (2, True, [])
    assert not (tmp_path / "s").exists()
    arguments = ["sweep", recipe, "--over", "quantize.bits=2,3,4", "-o", str(tmp_path / "s"), "--budget", "200k", "--device", "cpu"]
    assert cli.main([*arguments, "--json"]) == 5
    shown = capsys.readouterr()
    assert "1 of 3 combinations failed; quantize.bits=4: full" in shown.err
    rows = json.loads(shown.out)["runs"]
    assert [(row["quantize.bits"], row["perplexity"], row["within_budget"], row["error"]) for row in rows] == [
        ("2", 90.0, True, None),
        ("3", 31.0, False, None),
        ("4", None, None, "full"),
    ]
    assert {str(arguments[1]) for _, arguments, _ in calls} == {str(tmp_path / "s")}
    assert len(list((tmp_path / "s" / "sweep").glob("*.json"))) == 2
    assert "<html" in (tmp_path / "s" / "sweep" / "compare.html").read_text()
    answers[4] = record(perplexity=30.0, trainable=None)
    assert cli.main(arguments) == 0
    table = capsys.readouterr().out
    assert table.index("30") < table.index("90") < table.index("31")


def test_sweep_dry_run_lists_the_combinations(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sweep", recipe, "--over", "quantize.bits=2,3", "--over", "quantize.ignore=[a, b],[],'c,d'", "--dry-run", "--json"]
    assert cli.main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["directory"] == "runs/basic-model-sweep"
    assert [run["quantize.ignore"] for run in printed["runs"]] == ["[a, b]", "[]", "'c,d'"] * 2


def in_process(script: str, *arguments: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, **options)


MAIN = "import sys; from bitmend.pipelines.cli import main; code = main(); "


def test_usage_errors_and_help_do_not_wait_for_torch(tmp_path: Path) -> None:
    script = MAIN + "print(sorted({'torch', 'transformers', 'datasets', 'matplotlib', 'scipy'} & set(sys.modules)), code)"
    for arguments, code in (
        (["--help"], 0),
        (["run", "--help"], 0),
        (["rum"], 2),
        (["run", "compress_and_recover", "--set", "quantise.bits=3"], 2),
        (["run", "nothing"], 2),
        (["status", "nowhere"], 3),
    ):
        done = in_process(script, *arguments, cwd=tmp_path)
        assert done.stdout.splitlines()[-1] == f"[] {code}", done.stderr


def test_the_installed_command_exits_with_the_code(tmp_path: Path) -> None:
    done = in_process(MAIN + "sys.exit(code)", "run", "compress_and_recover", "--profile", "fast", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


SLEEPER = """
import sys, time, types
import bitmend.pipelines.run
ledger = types.ModuleType("bitmend.pipelines.run.ledger")
def status(directory, verify):
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
ledger.status = status
sys.modules[ledger.__name__] = bitmend.pipelines.run.ledger = ledger
from bitmend.pipelines.cli import main
sys.exit(main(["status", "."]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_in_130_and_one_line(number: signal.Signals, tmp_path: Path) -> None:
    # as at a terminal: a shell's background job begins deaf to SIGINT, one under nohup to SIGHUP
    heard = "import signal as s; s.signal(s.SIGINT, s.default_int_handler); s.signal(s.SIGHUP, s.SIG_DFL)\n"
    with subprocess.Popen(
        [sys.executable, "-c", heard + SLEEPER], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(err.splitlines()) == 1
    assert "interrupted" in err


def test_nohup_is_respected(tmp_path: Path) -> None:
    script = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + SLEEPER
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 130


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", MAIN + "sys.exit(code)", "run", "--help"],
        cwd=tmp_path,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_bars_are_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    logs.setup()
    monkeypatch.setattr(logs, "LINE_SECONDS", 0.0)
    with logs.bar("recover", 3) as bar:
        bar.advance(1, loss=2.5)
        bar.advance(2, loss=0.123456)
    assert list(logs.track([1, 2], "blocks")) == [1, 2]
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert (shown.out, len(lines)) == ("", 6)
    assert "recover: 1/3, loss 2.5, about" in lines[0]
    assert "recover: 3/3, loss 0.1235, in" in lines[2]
    logs.setup(quiet=True)
    with logs.bar("recover", 3) as bar:
        bar.advance(3)
    assert capsys.readouterr().err == ""


def test_quiet_hides_notes_and_setup_twice_does_not_repeat_them(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup()
    logs.setup()
    logging.getLogger("bitmend.pipelines.anything").info("a note")
    assert capsys.readouterr().err.count("a note") == 1
    logs.setup(quiet=True)
    logging.getLogger("bitmend.pipelines.anything").warning("a note")
    logging.getLogger("bitmend.pipelines.anything").error("a failure")
    shown = capsys.readouterr().err
    assert ("a note" in shown, "a failure" in shown) == (False, True)


def test_doctor_reports_every_section_and_how_to_mend(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    doctor = importlib.import_module("bitmend.pipelines.doctor")
    monkeypatch.setattr(doctor, "PACKAGES", (*doctor.PACKAGES, "surely-not-installed"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "secret-value")
    assert cli.main(["doctor", "--json"]) == 0
    text = capsys.readouterr().out
    assert "secret-value" not in text
    printed = json.loads(text)
    assert printed["packages"]["torch"]
    assert printed["arithmetic"]["float32_gflops"] > 0
    assert printed["arithmetic"]["faster"] in ("float32", "bfloat16")
    assert printed["memory"]["limit_bytes"] > 1e8
    assert printed["disk"]["here_free_bytes"] > 0
    assert printed["hub"]["offline"] is True
    assert printed["cache"]["directory"]
    assert any("surely-not-installed" in row["what"] and "pip install surely-not-installed" in row["fix"] for row in printed["missing"])
    monkeypatch.setattr(doctor, "report", lambda: printed)
    assert cli.main(["doctor"]) == 0
    assert "bfloat16_gflops" in capsys.readouterr().out


def test_bench_hands_its_options_on(module: Any, calls: Calls, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    module("bench.benchmarks", run={"rows": [{"method": "gptq", "seconds": 1.5}]})
    bitmend.pipelines.bench.benchmarks.SIZES = (1,)  # type: ignore[attr-defined]
    bitmend.pipelines.bench.benchmarks.Options = lambda *arguments: arguments  # type: ignore[attr-defined]
    bitmend.pipelines.bench.benchmarks.refuse_failed = lambda measured: None  # type: ignore[attr-defined]
    arguments = [
        "bench",
        "compress",
        "--size",
        "64",
        "--size",
        "128",
        "--method",
        "gptq",
        "--repeats",
        "2",
        "--device",
        "cpu",
        "-o",
        str(tmp_path),
    ]
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["method"] == "gptq"
    assert cli.main(["bench", "recover", "-m", "some/model"]) == 0
    assert "1.5 s" in capsys.readouterr().out
    assert calls[0][1] == ("compress", ("cpu", (64, 128), ("gptq",), 2, None, tmp_path, (), None, False, None, False))
    assert calls[1][1] == ("recover", ("auto", (1,), (), 3, "some/model", None, (), None, False, None, False))
    assert cli.main(["bench", "compress", "--depths", "4, 8"]) == 0 and cli.main(["bench", "compress", "--shape", "1b"]) == 0
    assert cli.main(["bench", "compress", "--count", "--shape", "8b"]) == 0
    assert [(*call[1][1][6:8], call[1][1][10]) for call in calls[2:]] == [((4, 8), None, False), ((), "1b", False), ((), "8b", True)]
    capsys.readouterr()
    assert "--depths 4,x: expected numbers of blocks" in failing(capsys, "bench", "compress", "--depths", "4,x")[1]
    (tmp_path / "file").write_text("x")
    assert failing(capsys, "bench", "compress", "-o", str(tmp_path / "file"))[0] == 2


def test_fuse_is_the_one_registry_of_this_folder() -> None:
    assert stage_settings.methods("fuse") is stage_settings.FUSE
