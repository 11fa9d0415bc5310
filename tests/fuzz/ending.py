"""The property of every fuzzer: whatever is read, it ends well or in one line with code 2 or 3, within seconds and megabytes."""

import contextlib
import gc
import os
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from bitmend.pipelines import cli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# seconds are the processor's, so that what else the machine runs does not count; what waits for ever meets the test's own timeout
SECONDS, HANG_SECONDS, GROWTH_BYTES, LINE = 2.0, 20, 500_000_000, cli.LONGEST_LINE


def counts(short: int, long: int) -> Any:
    """`count` examples in `make test`, always the same ones, and in `make proofs`, every time others."""
    return pytest.mark.parametrize("count", [short, pytest.param(long, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])


def fuzz(count: int, long: bool, drawn: st.SearchStrategy[Any], work: Callable[[Any], object]) -> Counter[int]:
    """How many of `count` examples ended in which code."""
    codes: Counter[int] = Counter()

    def one(example: Any) -> None:
        codes[ending(lambda: work(example))] += 1

    quiet = settings(max_examples=count, derandomize=not long, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    quiet(given(drawn)(one))()
    print(f"{count} examples: {dict(sorted(codes.items()))} by exit code")
    return codes


def ending(work: Callable[[], object]) -> int:
    """The exit code that the work ends in. AssertionError for any other than 0, 2 and 3, for a hang and for what takes too much."""
    code, line, trace = 0, "", ""
    gc.disable()  # a long fuzzer's own objects take a second and more to go over, which is not the work's
    before, start = _peak_bytes(), time.process_time()
    try:
        with _no_hang():
            work()
    except Exception as error:
        (code, line), trace = cli.explain(error), "".join(traceback.format_exception(error))
    finally:
        seconds, grown = time.process_time() - start, _peak_bytes() - before
        gc.enable()
    assert code in (0, 2, 3), f"{code}: {line}\n{trace}"
    assert code == 0 or 0 < len(line) <= LINE, f"a line of {len(line)} characters: {line}"
    assert seconds <= SECONDS, f"{seconds:.1f} s; ended in {code}: {line}"
    assert grown <= GROWTH_BYTES, f"{grown / 1e6:.0f} MB; ended in {code}: {line}"
    return code


class Hang(BaseException):
    """No Exception: nothing that the program catches."""


@contextlib.contextmanager
def _no_hang() -> Iterator[None]:
    def late(*_: object) -> None:
        raise Hang(f"not at an end after {HANG_SECONDS} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _peak_bytes() -> int:
    scale = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
