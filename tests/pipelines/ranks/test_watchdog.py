"""How several ranks end: the verdict that follows from what each says of itself."""

import os
from typing import Any

import pytest
from bitmend.pipelines.ranks.watchdog import GRACE, SILENCE, End, Sign, Verdict, judged, neighbours_of, process_identity

FAILED = End("failed", 3, "error: no such text")
STOPPED = End("interrupted", 130, "interrupted; all is kept")
LOST = End("lost", 1, "error: the ranks lost one another")


def verdict(signs: dict[int, Sign], waited: float = 0.1, silent: dict[int, float] | None = None) -> Verdict | None:
    return judged(signs, {r: 0.0 for r in signs} | (silent or {}), {r: waited for r, sign in signs.items() if sign.end})


CASES: dict[str, tuple[dict[int, Sign], dict[str, Any], int | None, str]] = {
    "all at work": ({0: Sign(), 1: Sign(), 2: Sign()}, {}, None, ""),
    "rank 0 fails": ({0: Sign(end=FAILED), 1: Sign()}, {}, 3, "error: no such text"),
    "another one fails: rank 0 may be about to say the same": ({0: Sign(), 1: Sign(end=FAILED)}, {}, None, ""),
    "it does not": ({0: Sign(), 1: Sign(end=FAILED)}, {"waited": GRACE["failed"] + 0.1}, 3, "error: rank 1: no such text"),
    "the same on all": ({0: Sign(end=FAILED), 1: Sign(end=FAILED)}, {}, 3, "error: no such text"),
    "an error explains what the others lost": ({0: Sign(end=LOST), 1: Sign(end=FAILED)}, {}, 3, "error: rank 1: no such text"),
    "lost: who is gone will show": ({0: Sign(end=LOST), 1: Sign(), 2: Sign(end=LOST)}, {"waited": SILENCE}, None, ""),
    "it has": ({0: Sign(end=LOST), 1: Sign(), 2: Sign(end=LOST, gone=(1,))}, {}, 1, "error: rank 1 is gone (its process is no more)"),
    "all lost one another": ({0: Sign(end=LOST), 1: Sign(end=LOST)}, {}, 1, "error: the ranks lost one another"),
    "no sign of life": ({0: Sign(), 1: Sign()}, {"silent": {1: SILENCE + 1}}, 1, "error: rank 1 is gone (no sign of life for 45 s)"),
    "silent, but not for long": ({0: Sign(), 1: Sign()}, {"silent": {1: SILENCE - 1}}, None, ""),
    "gone after an orderly end": ({0: Sign(gone=(1,)), 1: Sign(done=True)}, {"silent": {1: SILENCE + 1}}, None, ""),
    "all stopped": ({0: Sign(end=STOPPED), 1: Sign(end=STOPPED)}, {}, 130, "interrupted; all is kept"),
    "a launcher stops the others of a killed rank": (
        {0: Sign(end=STOPPED, gone=(1,)), 1: Sign(), 2: Sign(end=STOPPED)}, {}, 1, "error: rank 1 is gone",
    ),
    "one stopped: was it because another is gone?": ({0: Sign(), 1: Sign(end=STOPPED)}, {}, None, ""),
    "no other is": ({0: Sign(), 1: Sign(end=STOPPED)}, {"waited": GRACE["interrupted"] + 0.1}, 130, "interrupted; all is kept"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_verdict_follows_from_the_signs(case: str) -> None:
    signs, how, code, line = CASES[case]
    made = verdict(signs, **how)
    assert made is None if code is None else made is not None and made.code == code and made.line.startswith(line)


def test_a_process_is_itself_and_no_other() -> None:
    mine = process_identity()
    assert mine is not None and mine == process_identity(os.getpid()) and mine != process_identity(os.getppid())
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert process_identity(child) is None, "one that ended and was not waited for is none"
    os.waitpid(child, 0)
    assert process_identity(child) is None
    elsewhere = ["another machine", *mine[1:]]
    assert neighbours_of(1, [mine, mine, elsewhere, None, mine]) == {0: mine, 4: mine}
