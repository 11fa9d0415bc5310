"""tests: the suite's device part on the card; failures by name as they come, what was finished is not run again until the program changes.

Knows pytest's outcomes (`progress`); not what is tested.
"""

import json
import sys
import time

from .card_results import CardPart
from .child import Call

COLUMNS = (("test", "failed"), ("line", "first line"), ("seconds", "seconds"))
PLUGIN = f"{__package__}.progress"


def tests(part: CardPart, call: Call) -> None:
    """One process of pytest after another, as long as there is time: one that dies takes only the test with it that it was in."""
    while not call.over() and part.left != []:
        before = len(part.rows)
        if not _one_process(part, call) and len(part.rows) == before:
            return
    counts = [row["outcome"] for row in part.rows.values()]
    part.say(", ".join(f"{counts.count(outcome)} {outcome}" for outcome in ("passed", "failed", "skipped")))


def _one_process(part: CardPart, call: Call) -> bool:
    """Whether it is worth starting another."""
    call.place.mkdir(parents=True, exist_ok=True)
    progress, finished = call.place / "tests.progress", call.place / "tests.finished"
    progress.write_text("", encoding="utf-8")
    finished.write_text(json.dumps(list(part.rows)), encoding="utf-8")
    seen, running = 0, None
    collected: list[str] = []

    def watch() -> None:
        nonlocal seen, running
        lines = progress.read_text(encoding="utf-8").split("\n")[:-1]
        for line in map(json.loads, lines[seen:]):
            if "collected" in line:
                collected[:] = line["collected"]
            elif "begins" in line:
                running = line["begins"], time.monotonic()
            else:
                running = None
                _keep(part, line.pop("test"), line)
        if len(lines) > seen and collected:
            part.remain([test for test in collected if test not in part.rows])
        seen = len(lines)

    seconds = call.until - time.monotonic() - 2 * call.grace
    command = [sys.executable, "-P", "-m", "pytest", *call.plan.tests, "-q", "--tb=short", "--no-header", "--continue-on-collection-errors"]
    command += ["-p", PLUGIN, "--progress", str(progress), "--finished", str(finished), "--seconds", str(seconds)]
    began = time.monotonic()
    code = call.process(command, "tests", watch)
    if running is not None:
        _never_ended(part, running[0], time.monotonic() - running[1], code, time.monotonic() - began)
    if collected:
        part.remain([test for test in collected if test not in part.rows])
    else:
        part.note("pytest", f"pytest collected nothing (exit code {code}): {call.last_line('tests')}")
    return code is not None and bool(collected)


def _keep(part: CardPart, test: str, row: dict[str, object]) -> None:
    part.add(test, row)
    if row["outcome"] == "failed":
        part.say(f"FAILED {test}: {row['line']}")


def _never_ended(part: CardPart, test: str, ran: float, code: int | None, whole: float) -> None:
    """A process that died, or had to be killed: the test it was in failed, unless it had just begun."""
    if code is not None:
        line = f"its process ended with {code}"
    elif ran > whole / 2:
        line = f"it did not end within {ran:.0f} s"
    else:
        return
    _keep(part, test, {"outcome": "failed", "seconds": round(ran, 3), "line": line})
