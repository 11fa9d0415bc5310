"""A run on several processes: the bits of one, whoever is killed meanwhile; all end together, with one line."""

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from bitmend.pipelines.errors import UsageError
from bitmend.pipelines.ranks.exchange import Ranks
from bitmend.pipelines.recipes.recipe import resolve
from bitmend.pipelines.run.session import check_ranks
from bitmend.pipelines.stages.inputs import Inputs

from ..families import save_speaking
from ..runs import Processes, hashes, write_recipe

STAGES: list[dict[str, Any]] = [
    {"prune": {"method": "wanda", "sparsity": 0.3}},
    {"quantize": {"method": "gptq", "bits": 3, "group_size": 32}},
    {
        "recover": {
            "method": "lora", "rank": 2, "steps": 2, "batch_size": 4, "seq_len": 64, "eval_every": 2, "accumulation": 2, "learning_rate": "search",
        }
    },
    {"fuse": {}},
]
TEXTS: dict[str, Any] = {"calibration": {"samples": 26, "seq_len": 256}, "evaluation": {"seq_len": 256, "windows": 18}}
"""Four batches of calibration, three of evaluation, the last one short."""
STORY = ("error: ", "interrupted; ")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, small_model: Path, small_text: Path) -> list[str]:
    place = tmp_path_factory.mktemp("ranked")
    save_speaking("llama", place / "model", small_model, num_hidden_layers=2, max_position_embeddings=256)
    recipe = write_recipe(place / "recipe.yaml", STAGES, **TEXTS)
    return ["run", str(recipe), "-m", str(place / "model"), "--data", str(small_text), "--device", "cpu"]


PLAIN = """
import os, sys
from bitmend.pipelines import cli
from bitmend.pipelines.run import runner
from bitmend.pipelines.store import rundir
from bitmend.reports import page
page.html = lambda record: "html\\n"  # a real one takes seconds
rundir.APPEARING_SECONDS = 4.0
if "CHDIR" in os.environ:
    os.makedirs(os.environ["CHDIR"], exist_ok=True), os.chdir(os.environ["CHDIR"])
if "BREAK" in os.environ:
    def broken(*rest): raise MemoryError("no more")
    runner.texts_of = broken
code = cli.main(os.environ.get("INSTEAD", "").split() or [*ARGUMENTS, *os.environ.get("OTHER", "").split()])
sys.stdout.flush(), sys.stderr.flush()
os._exit(code)
"""


def ran(commands: Processes, arguments: list[str], log: Path, size: int, **more: Any) -> list[int]:
    """Exit codes of a command on so many ranks; one is one process without any."""
    return commands.ranks(size, log, code=f"ARGUMENTS = {arguments!r}\n{PLAIN}", **more)


@pytest.fixture(scope="module")
def alone(commands: Processes, command: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The run of one process, and its seconds."""
    place = tmp_path_factory.mktemp("alone")
    assert ran(commands, ["list"], place / "log", 1) == [0]  # the server is there
    began = time.monotonic()
    assert ran(commands, [*command, "-o", str(place / "run")], place / "log", 1) == [0], written(place / "log", 1)
    return place / "run", time.monotonic() - began


def reported(log: Path, size: int) -> list[str]:
    """How it ended, in all that the ranks wrote."""
    return [line for rank in range(size) for line in Path(f"{log}.{rank}").read_text().splitlines() if line.startswith(STORY)]


def written(log: Path, size: int) -> str:
    return "\n".join(f"rank {rank}: {Path(f'{log}.{rank}').read_text()}" for rank in range(size))


def measured(run: Path) -> dict[str, Any]:
    """Scores of every stage, hidden states of the baseline, by file; what the record says but for time and memory."""
    scores: dict[str, Any] = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in run.glob("stages/*.metrics/*.safetensors")}
    for path in run.glob("stages/*.metrics/????????.json"):
        actual = json.loads(path.read_text())
        scores[f"{path.parent.name}/{path.name}"] = [actual[key] for key in ("protocol", "nll", "kl", "top1", "bits_per_byte")]
    stages = json.loads((run / "record.json").read_text())["stages"]
    return scores | {s["stage"]: [s[key] for key in ("perplexity", "total_bytes", "notes", "layers", "kl_to_baseline")] for s in stages}


def same(run: Path, other: Path) -> None:
    assert hashes(run) == hashes(other) and len(hashes(run)) > 30
    assert measured(run) == measured(other)
    assert not list(run.rglob("*.partial")) and not list(run.glob(".seen*")), "nothing unfinished is left"


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_every_file_is_that_of_one_process(
    commands: Processes, command: list[str], alone: tuple[Path, float], tmp_path: Path, size: int
) -> None:
    log = tmp_path / "log"
    assert ran(commands, [*command, "-o", str(tmp_path / "run")], log, size) == [0] * size, written(log, size)
    same(tmp_path / "run", alone[0])
    assert "report: " in Path(f"{log}.0").read_text()
    assert [Path(f"{log}.{rank}").read_text() for rank in range(1, size)] == [""] * (size - 1), "rank 0 alone speaks"


def killed(commands: Processes, arguments: list[str], log: Path, size: int, rank: int, when: float | str) -> None:
    """All end within a minute, the killed one's death reported in one line; one that was killed before it came is missed instead."""
    began = time.monotonic()
    codes = ran(commands, arguments, log, size, wounds=[(when, rank, signal.SIGKILL)])
    if codes == [0] * size and not isinstance(when, str):
        return  # came too late
    assert isinstance(when, str) or time.monotonic() - began < when + 60
    lines = reported(log, size)
    if lines and all("did not come within" in line or "not reached within" in line for line in lines):
        assert codes == [-signal.SIGKILL if r == rank else 2 for r in range(size)], written(log, size)
        assert rank == 0 or (len(lines) == 1 and f"rank {rank} of {size}" in lines[0]), lines
        return
    assert codes == [-signal.SIGKILL if r == rank else 1 for r in range(size)], written(log, size)
    (line,) = lines
    assert f"rank {rank} is gone" in line and "the same command goes on" in line
    assert rank == 0 or "its process is no more" in line


def test_a_killed_rank_ends_all_and_any_number_goes_on(
    commands: Processes, command: list[str], alone: tuple[Path, float], tmp_path: Path
) -> None:
    arguments, log = [*command, "-o", str(tmp_path / "run")], tmp_path / "log"
    killed(commands, arguments, log, 2, 1, "quantize: gptq")
    killed(commands, arguments, log, 2, 0, "recover: lora")
    assert ran(commands, arguments, log, 1) == [0], written(log, 1)
    same(tmp_path / "run", alone[0])


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_killed_at_twenty_moments(commands: Processes, command: list[str], alone: tuple[Path, float], tmp_path: Path) -> None:
    draw, log = random.Random(2025), tmp_path / "log"
    for attempt in range(8):
        run = tmp_path / f"run-{attempt}"
        for _ in range(3):
            size = draw.choice((2, 2, 3, 4))
            killed(commands, [*command, "-o", str(run)], log, size, draw.randrange(size), draw.uniform(0.3, 1.5) * alone[1])
        size = draw.choice((2, 3, 4))
        assert ran(commands, [*command, "-o", str(run)], log, size) == [0] * size, written(log, size)
        same(run, alone[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_stops_all(
    commands: Processes, command: list[str], alone: tuple[Path, float], tmp_path: Path, number: int
) -> None:
    log, arguments = tmp_path / "log", [*command, "-o", str(tmp_path / "run")]
    codes = ran(commands, arguments, log, 2, wounds=[("quantize: gptq", 1, number)])
    assert codes == [130, 130], written(log, 2)
    assert reported(log, 2) == ["interrupted; what was finished is kept, the same command goes on from there"]
    assert ran(commands, ["resume", str(tmp_path / "run")], log, 1) == [0], written(log, 1)
    same(tmp_path / "run", alone[0])


ELSEWHERE = tempfile.gettempdir()
REFUSED = {
    "no address": ({"MASTER_ADDR": ""}, {"MASTER_ADDR": ""}, "WORLD_SIZE is 2 and MASTER_ADDR is not set; start with torchrun"),
    "no rank": ({"RANK": ""}, {"RANK": ""}, "WORLD_SIZE is set and RANK is not set; start with torchrun"),
    "a size that is none": ({"WORLD_SIZE": "two"}, {"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', which is no number"),
    "another command line": ({}, {"OTHER": "--seed 3"}, "rank 1: its command line is another than rank 0's"),
    "another directory": ({}, {"CHDIR": ELSEWHERE}, "rank 0 wrote a file there that"),
    "a command of one process": ({"INSTEAD": "status x"}, {"INSTEAD": "status x"}, "pipeline status: WORLD_SIZE is 2, and only run and resume share their work"),
    "an unknown recipe": ({"INSTEAD": "run nothing"}, {"INSTEAD": "run nothing"}, "nothing"),
    "a stage that fails on one": ({}, {"BREAK": "1"}, "rank 1: out of memory"),
}

@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_reported_in_one_line(commands: Processes, command: list[str], tmp_path: Path, case: str) -> None:
    *environments, line = REFUSED[case]
    place, log = tmp_path / "work", tmp_path / "log"
    codes = ran(commands, [*command, "-o", "run"], log, 2, environments=[{"CHDIR": str(place), **variables} for variables in environments])
    assert codes[0] == codes[1] != 0, written(log, 2)
    (only,) = reported(log, 2)
    assert line in only and "Traceback" not in written(log, 2)
    assert codes == [5, 5] if "memory" in line else codes[0] in (2, 3)


def test_a_port_that_is_taken_is_named(commands: Processes, command: list[str], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = {"MASTER_PORT": str(taken.getsockname()[1])}
        log = tmp_path / "log"
        codes = ran(commands, [*command, "-o", "run"], log, 2, environments=[port, port], wounds=[(4.0, 1, signal.SIGKILL)])
    assert codes == [2, -signal.SIGKILL], written(log, 2)
    (only,) = reported(log, 2)
    assert f"MASTER_PORT {port['MASTER_PORT']}: it is in use; choose another MASTER_PORT" in only


def test_a_rank_that_never_comes_is_named(commands: Processes, tmp_path: Path) -> None:
    """Of three, the last one is not there."""
    log, code = tmp_path / "log", (
        "from datetime import timedelta\nfrom bitmend.pipelines.ranks import joining\n"
        "joining.MISSED, joining.JOINING = timedelta(seconds=1), timedelta(seconds=3)\nARGUMENTS = ['run', 'x']\n"
    )
    codes = commands.ranks(2, log, code=code + PLAIN, environments=[{"WORLD_SIZE": "3"}] * 2)
    assert codes == [2, 2], written(log, 2)
    assert "waiting for rank 2 of 3, until 3 s" in Path(f"{log}.0").read_text()
    assert reported(log, 2) == ["error: rank 2 of 3 did not come within 3 s; start all of WORLD_SIZE, with one MASTER_ADDR"]


def test_a_rank_0_that_never_comes_is_named(commands: Processes, tmp_path: Path) -> None:
    log, code = tmp_path / "log", (
        "from datetime import timedelta\nfrom bitmend.pipelines.ranks import joining\n"
        "joining.MISSED, joining.JOINING = timedelta(seconds=1), timedelta(seconds=3)\nARGUMENTS = ['run', 'x']\n"
    )
    began = time.monotonic()
    codes = commands.ranks(1, log, code=code + PLAIN, environments=[{"WORLD_SIZE": "2", "RANK": "1"}])
    assert codes == [2] and time.monotonic() - began < 20, written(log, 1)
    assert "rank 1 waits for rank 0 at 127.0.0.1:" in written(log, 1)
    (line,) = reported(log, 1)
    assert "not reached within 3 s (Connection refused); start rank 0, too" in line


def test_ranks_without_work_are_refused(small_model: Path, small_text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", STAGES, **TEXTS)
    chosen = resolve(str(path), options={"model": str(small_model), "data": str(small_text)})
    inputs = Inputs(chosen, small_model)
    check_ranks(chosen, inputs, Ranks(0, 2, 0))
    assert not caplog.records
    with pytest.raises(UsageError, match="WORLD_SIZE 9: .* in 8 parts; start 8 processes or fewer"):
        check_ranks(chosen, inputs, Ranks(0, 9, 0))
    with pytest.raises(UsageError, match=r"WORLD_SIZE 7: .* are 4 batches, so that 3 .* start 4, or set calibration.samples to 49 or more"):
        check_ranks(chosen, inputs, Ranks(0, 7, 0))
    few = write_recipe(tmp_path / "recipe.yaml", [{"quantize": {"method": "rtn"}}, STAGES[2] | {}, {"recover": {"method": "reconstruct", "batch_size": 3}}], **TEXTS)
    check_ranks(resolve(str(few), options={"model": str(small_model), "data": str(small_text)}), inputs, Ranks(0, 7, 0))
    assert "recover: 2 micro-batches a step for 7 ranks" in caplog.text and "recover.accumulation=7" in caplog.text
    assert "recover.2: 3 windows a step for 7 ranks: the others wait while it trains; recover.2.batch_size=7 keeps all at work" in caplog.text


# -- torchrun itself ---------------------------------------------------------------------------------------------------------------


def torchrun(options: list[str], arguments: list[str], log: Path, before: list[str] | None = None, **variables: str) -> subprocess.Popen[bytes]:
    words = [*(before or []), sys.executable, "-P", "-m", "torch.distributed.run", *options, "-m", "bitmend.pipelines.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **variables}
    with log.open("wb") as file:
        return subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment)


@pytest.mark.slow
def test_torchrun_on_one_machine(command: list[str], alone: tuple[Path, float], tmp_path: Path) -> None:
    process = torchrun(["--standalone", "--nproc-per-node", "2"], [*command, "--dtype", "float32", "-o", str(tmp_path / "run")], tmp_path / "log")
    assert process.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    same(tmp_path / "run", alone[0])


def networks() -> bool:
    """Whether this user may make network namespaces."""
    try:
        made = subprocess.run(["ip", "netns", "add", "bitmend-try"], capture_output=True, timeout=30).returncode == 0
    except OSError:
        return False
    if made:
        subprocess.run(["ip", "netns", "del", "bitmend-try"], check=True, timeout=30)
    return made


@pytest.fixture
def hosts(tmp_path: Path):
    """Two hosts: prefixes of a command and the addresses. Network namespaces over a veth pair, or else two addresses of this machine."""
    if not networks():
        print("no network namespaces here: nodes on 127.0.0.1 and 127.0.0.2")
        yield [[], []], ["127.0.0.1", "127.0.0.2"]
        return
    names = [f"bitmend-{os.getpid()}-{n}" for n in (1, 2)]
    links = [f"bm{os.getpid() % 100000}-{n}" for n in (1, 2)]
    ip = lambda *words: subprocess.run(["ip", *words], check=True, timeout=30)  # noqa: E731
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", links[0], "netns", names[0], "type", "veth", "peer", "name", links[1], "netns", names[1])
        for number, (name, link) in enumerate(zip(names, links, strict=True), 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [["ip", "netns", "exec", name] for name in names], ["10.77.0.1", "10.77.0.2"]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=30)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_hosts_and_one_of_them_cut_off(hosts: Any, command: list[str], alone: tuple[Path, float], tmp_path: Path) -> None:
    prefixes, addresses = hosts
    arguments = [*command, "--dtype", "float32", "-o", str(tmp_path / "run")]
    logs = [tmp_path / "log-0", tmp_path / "log-1"]

    def start(port: int) -> list[subprocess.Popen[bytes]]:
        options = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", addresses[0], "--master-port", str(port)]
        return [torchrun([*options, "--node-rank", str(n)], arguments, logs[n], prefixes[n]) for n in range(2)]

    nodes = start(29611)
    try:
        while "quantize: gptq" not in logs[0].read_text():
            assert nodes[0].poll() is None, logs[0].read_text()
            time.sleep(0.2)
        cut = time.monotonic()
        if prefixes[1]:
            link = subprocess.run(["ip", "-n", prefixes[1][3], "-br", "link"], capture_output=True, text=True, check=True, timeout=30).stdout
            name = next(line.split("@")[0] for line in link.splitlines() if line.startswith("bm"))
            subprocess.run(["ip", "-n", prefixes[1][3], "link", "set", name, "down"], check=True, timeout=30)
        else:
            nodes[1].send_signal(signal.SIGKILL)
            for child in Path(f"/proc/{nodes[1].pid}/task/{nodes[1].pid}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
        while "is gone" not in logs[0].read_text():
            assert time.monotonic() - cut < 60, logs[0].read_text()
            time.sleep(0.2)
        while prefixes[1] and "rank 0 is gone" not in logs[1].read_text():
            assert time.monotonic() - cut < 75, logs[1].read_text()
            time.sleep(0.2)
    finally:
        for node in nodes:
            node.kill()
            node.wait(timeout=30)
    (line,) = [line for line in logs[0].read_text().splitlines() if line.startswith(STORY)]
    assert "rank 1 is gone" in line
    if prefixes[1]:
        subprocess.run(["ip", "-n", prefixes[1][3], "link", "set", name, "up"], check=True, timeout=30)
    nodes = start(29612)
    assert [node.wait(timeout=300) for node in nodes] == [0, 0], logs[0].read_text() + logs[1].read_text()
    same(tmp_path / "run", alone[0])
