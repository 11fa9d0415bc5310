"""What the tests of commands share: a command that runs in this process leaves it as it was."""

import logging
import os
import signal
from collections.abc import Iterator

import pytest
from bitmend.pipelines import logs


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command sets signal handlers, log handlers and variables for its process; here the process goes on."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    logger = logging.getLogger(logs.ROOT)
    handlers, level, variables = list(logger.handlers), logger.level, dict(os.environ)
    monkeypatch.setattr(logs, "_settings", dict(logs._settings))
    yield
    for number, handler in signals.items():
        signal.signal(number, handler)
    logger.handlers[:] = handlers
    logger.setLevel(level)
    for name in set(os.environ) - set(variables) - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
