"""Small real runs for tests, and processes of the command line that end at a chosen step."""

import hashlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from bitmend.pipelines.recipes.recipe import Recipe, resolve

CHAIN: list[dict[str, Any]] = [
    {"prune": {"method": "wanda", "sparsity": 0.3}},
    {"quantize": {"method": "gptq", "bits": 3, "group_size": 32}},
    {"decompose": {"method": "qera_exact", "rank": 4}},
    {"recover": {"method": "lora", "steps": 7, "batch_size": 1, "seq_len": 64, "eval_every": 7}},
    {"fuse": {"backend": "auto"}},
]
TEXTS = {"calibration": {"samples": 4, "seq_len": 64}, "evaluation": {"seq_len": 64, "windows": 6}}


def write_recipe(path: Path, stages: list[dict[str, Any]] | None = None, **sections: Any) -> Path:
    path.write_text(yaml.safe_dump({"stages": CHAIN if stages is None else stages, **TEXTS, **sections}, sort_keys=False))
    return path


def chosen(place: Path, model: Path, text: Path, stages: list[dict[str, Any]] | None = None, **sections: Any) -> Recipe:
    """A resolved recipe: CHAIN, or other stages, on a model and a text."""
    path = write_recipe(place / "recipe.yaml", stages, **sections)
    return resolve(str(path), options={"model": str(model), "data": str(text)})


def hashes(run: Path, stages: str = "") -> dict[str, str]:
    """sha256 of every file of every finished stage (whose number is one of the digits `stages`), by its path in the run."""
    wanted = f"0[{stages}]-*" if stages else "0*"
    actual = [p for p in run.glob(f"stages/{wanted}/*") if p.is_file() and not p.parent.name.endswith(".metrics")]
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in actual}


def stage_directory(run: Path, address: str) -> Path:
    rows = json.loads((run / "run.json").read_text())["stages"]
    return run / "stages" / next(row["name"] for row in rows if row["address"] == address)


@dataclass
class Processes:
    """Forks a process for each command from one that has imported the program, so that a test may start and kill many."""

    server: subprocess.Popen[str]

    def run(
        self, arguments: list[str], log: Path, end: dict[str, Any] | None = None, fault: tuple[str | None, int, str] | None = None,
        unprivileged: bool = False,
    ) -> int:
        """Exit code of `pipeline ARGUMENTS`, its output in `log`. `end` {signal, step, path}: the process gets this signal right before
        the step-th renaming, linking or removing of a file whose path contains `path`. `fault` (kind, step, path) as in `faults`; how many
        operations there were is the log's last line. `unprivileged`: the modes of files count, even for root."""
        faults = str(Path(__file__).with_name("faults.py"))
        asked = {"arguments": arguments, "log": str(log), "end": end, "fault": fault, "faults": faults, "unprivileged": unprivileged}
        return self._answer(asked)[0]

    def ranks(
        self, size: int, log: Path, arguments: list[str] | None = None, code: str = "", *, wounds: Sequence[tuple[float | str, int, int]] = (),
        environments: Sequence[dict[str, str]] = (),
    ) -> list[int]:
        """Exit codes of `size` processes as torchrun starts them, of `pipeline ARGUMENTS` or of Python `code`; the output of rank r is in
        log.r. `wounds`: after so many seconds, or once rank 0 has said this, the rank gets the signal. `environments`: variables, for each rank."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        each = [{**world, "RANK": str(r), "LOCAL_RANK": str(r), **(environments[r] if environments else {})} for r in range(size)]
        asked = {"arguments": arguments, "code": code, "log": str(log), "ranks": each, "wounds": list(wounds)}
        return self._answer(asked)

    def _answer(self, asked: dict[str, Any]) -> list[int]:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(asked) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())


SERVER = """
import gc, json, os, runpy, sys, time, traceback
import torch
torch.set_num_threads(1)
from bitmend.pipelines import cli
from bitmend.pipelines.demo import imported
from bitmend.pipelines.devices import compute
from bitmend.pipelines.run import runner
from bitmend.pipelines.text import data
compute.measured_dtype = lambda: torch.float32
from bitmend.pipelines.stages import baseline, fuse, recover, walked
from transformers import LlamaForCausalLM

def end_at(signal, step, path):
    left = [step]
    def counted(plain):
        def call(*arguments, **options):
            if any(path in str(a) for a in arguments):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal)
            return plain(*arguments, **options)
        return call
    for name in ("replace", "rename", "link", "unlink"):
        setattr(os, name, counted(getattr(os, name)))

def forked(asked, variables, name):
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.environ.update(variables)
        log = os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        if asked.get("end"):
            end_at(**asked["end"])
        if asked.get("unprivileged"):
            runpy.run_path(asked["faults"])["unprivileged"]()
        faults = runpy.run_path(asked["faults"])["Faults"](*asked["fault"]) if asked.get("fault") else None
        if faults:
            walked.SECONDS = 0.0  # else not once in so short a stage
            faults.inject()
        if asked.get("code"):
            exec(asked["code"], {"__name__": "ranked"})
            code = 0
        else:
            code = cli.main(asked["arguments"])
        sys.stdout.flush()
        if faults:
            print(faults.operations, flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)

def waited(children, wounds, log):
    began, codes = time.monotonic(), {}
    def due(when):
        return when in open(log).read() if isinstance(when, str) else time.monotonic() - began > when
    while len(codes) < len(children):
        while wounds and due(wounds[0][0]):
            _, rank, number = wounds.pop(0)
            if rank not in codes:
                os.kill(children[rank], number)
        for rank, child in enumerate(children):
            if rank not in codes and (ended := os.waitpid(child, os.WNOHANG if wounds else 0))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.005 if wounds else 0)
    return [codes[rank] for rank in range(len(children))]

gc.freeze()
for line in sys.stdin:
    asked = json.loads(line)
    ranks = asked.get("ranks")
    if ranks is None:
        children = [forked(asked, {}, asked["log"])]
    else:
        children = [forked(asked, variables, f"{asked['log']}.{rank}") for rank, variables in enumerate(ranks)]
    print(json.dumps(waited(children, asked.get("wounds", []), f"{asked['log']}.0")), flush=True)
gc.unfreeze()
"""


@contextmanager
def processes() -> Iterator[Processes]:
    server = subprocess.Popen([sys.executable, "-P", "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Processes(server)
    finally:
        assert server.stdin is not None
        server.stdin.close()
        server.wait(timeout=60)
