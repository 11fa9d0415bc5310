"""A pytest plugin for the card: every test's outcome in a file as soon as it has one, an end in time, and none after the card is lost.

    pytest -p bitmend.pipelines.gpu.progress --progress FILE --finished FILE --seconds N

FILE gets a line of JSON for what was collected, for every test that begins, and for every one that ends. Knows pytest; not results.
"""

import json
import os
import sys
import time
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--progress", type=Path, help="the file that gets the outcomes")
    parser.addoption("--finished", type=Path, help="a JSON list of tests that are left out")
    parser.addoption("--seconds", type=float, default=0.0, help="no test begins after so many")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.progress is not None:
        config.pluginmanager.register(TestOutcomes(config), "bitmend-gpu-progress")


class TestOutcomes:
    def __init__(self, config: pytest.Config) -> None:
        self.file = config.option.progress.open("a", encoding="utf-8")
        self.finished = set(json.loads(config.option.finished.read_text(encoding="utf-8")))
        self.until = time.monotonic() + config.option.seconds
        self.outcome, self.line, self.seconds = "passed", "", 0.0

    def write(self, **line: object) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self.write(collected=[item.nodeid for item in items])
        out = [item for item in items if item.nodeid in self.finished]
        items[:] = [item for item in items if item.nodeid not in self.finished]
        config.hook.pytest_deselected(items=out)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(test=report.nodeid, outcome="failed", seconds=0.0, line=first_line(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.outcome, self.line, self.seconds = "passed", "", 0.0
        self.write(begins=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds += report.duration
        if report.failed and self.outcome != "failed":
            self.outcome, self.line = "failed", first_line(report)
        elif report.skipped and self.outcome == "passed":
            self.outcome = "skipped"

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.write(test=nodeid, outcome=self.outcome, seconds=round(self.seconds, 3), line=self.line)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if time.monotonic() > self.until:
            item.session.shouldstop = "the time is over"
        elif self.outcome == "failed" and not card_answers():
            item.session.shouldstop = "the card no longer answers in this process"


def first_line(report: pytest.CollectReport | pytest.TestReport) -> str:
    """The first line of what went wrong."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    marked = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return (marked or text.strip().splitlines() or ["no message"])[0][:300]


def card_answers() -> bool:
    """After an illegal access every later call in the process fails: the tests that are left need another one."""
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
