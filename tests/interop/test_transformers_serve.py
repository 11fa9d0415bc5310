"""`transformers serve` on a stage's directory, with the packages that `make interop` installs: plain completions, and chat where the model has a template.

A model without a chat template, as a base model is, gets status 500 from transformers for /v1/chat/completions, dense or not.
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from bitmend.pipelines.run import runner
from bitmend.pipelines.run.generate import generate

from ..pipelines.runs import TEXTS, chosen, stage_directory

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "openai")),
        reason="transformers[serving] is not installed; `make interop` does it",
    ),
]
SERVE = "import bitmend; from transformers.cli.transformers import main; main()"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
STAGES = [{"quantize": {"method": "rtn", "grid": "q4_k"}}, {"fuse": {"backend": "auto"}}]


@contextmanager
def served(directory: Path, log: Path) -> Iterator[int]:
    """The port of a server that answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-P", "-c", SERVE, "serve", str(directory), "--port", str(port), "--device", "cpu"]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        try:
            for _ in range(240):
                assert process.poll() is None, log.read_text()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except (urllib.error.URLError, TimeoutError):
                    time.sleep(0.5)
            yield port
        finally:
            process.terminate()
            process.wait(30)


def asked(port: int, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, {}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, small_model: Path, small_text: Path) -> dict[bool, Path]:
    """Runs of a model with a chat template and without."""
    runs = {}
    for template in (False, True):
        place = tmp_path_factory.mktemp("served")
        model = Path(shutil.copytree(small_model, place / "model"))
        if template:
            (model / "chat_template.jinja").write_text(TEMPLATE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bitmend.reports.page.html", lambda record: "html\n")
            runner.run(chosen(place, model, small_text, STAGES, **TEXTS), place / "run", device="cpu")
        runs[template] = place / "run"
    return runs


@pytest.mark.parametrize("template", [False, True])
def test_completions_and_chat(template: bool, made: dict[bool, Path], tmp_path: Path) -> None:
    run, directory = made[template], stage_directory(made[template], "fuse")
    wanted = "".join(generate(run, "The river", max_new_tokens=8, device="cpu"))
    greedy = {"model": str(directory), "max_tokens": 8, "temperature": 0.0, "stream": False}
    with served(directory, tmp_path / "log") as port:
        status, said = asked(port, "completions", prompt="The river", **greedy)
        assert status == 200 and said["choices"][0]["text"] == wanted
        status, said = asked(port, "chat/completions", messages=[{"role": "user", "content": "The river"}], **greedy)
        assert status == (200 if template else 500)
        assert not template or said["choices"][0]["message"]["content"] == wanted
    assert template or "tokenizer.chat_template is not set" in (tmp_path / "log").read_text()
