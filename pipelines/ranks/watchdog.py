"""Watchdog: detects lost ranks by heartbeats through the store, from a thread per rank, and ends all ranks with one message and exit code.

A rank that fails says so here; rank 0 then says it in one line, and every rank leaves with its exit code. A rank that says nothing for
`SILENCE`, or whose process is no more, ends all in the same way. Everything on disk is whole at every moment, so that nothing is lost by
leaving at once. A signal that asks one rank to stop reaches all. Knows the store and processes; no collectives, no work.
"""

import _thread
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

BEAT = 1.0
"""Seconds between two signs of life."""
SILENCE = 45.0
"""Without one for so long, a rank is gone."""
HEARING = 5.0
"""How long rank 0 waits for the others to read how it all ends."""
GRACE = {"failed": 2.0, "interrupted": 4.0, "lost": SILENCE + 15.0}
"""How long an end waits for what may explain it better: rank 0's own words for the same, or who is gone."""
GONE = "what was finished is kept; the same command goes on from there, with any number of ranks"

Kind = Literal["failed", "interrupted", "lost"]


@dataclass(frozen=True)
class End:
    """How a rank ended: by an error, by a signal, or because a collective lost another rank."""

    kind: Kind
    code: int
    line: str


@dataclass(frozen=True)
class Sign:
    """A rank's heartbeat: `gone` are ranks of its machine whose process is no more, `heard` that it has read the verdict."""

    beat: int = 0
    stop_requested: bool = False
    end: End | None = None
    done: bool = False
    gone: tuple[int, ...] = ()
    heard: bool = False

    @classmethod
    def read(cls, text: bytes) -> "Sign":
        fields = json.loads(text)
        return cls(**{**fields, "end": End(**fields["end"]) if fields["end"] else None, "gone": tuple(fields["gone"])})


@dataclass(frozen=True)
class Verdict:
    """How all ranks end; no line where it has been printed."""

    code: int
    line: str


def judged(signs: Mapping[int, Sign], silent: Mapping[int, float], ended: Mapping[int, float]) -> Verdict | None:
    """How it all ends, if it does. `silent`: seconds since a rank's last sign; `ended`: since it reported that it ended."""
    over = {rank for rank, sign in signs.items() if sign.done or sign.end}
    for rank in signs:
        seen = [other for other, sign in signs.items() if rank in sign.gone]
        if rank not in over and (seen or silent[rank] > SILENCE):
            why = "its process is no more" if seen else f"no sign of life for {SILENCE:.0f} s"
            return Verdict(1, f"error: rank {rank} is gone ({why}); {GONE}")
    ends = {rank: sign.end for rank, sign in signs.items() if sign.end}
    for kind, grace in GRACE.items():
        of_kind = {rank: end for rank, end in ends.items() if end.kind == kind}
        if not of_kind:
            continue
        waited = max(ended[rank] for rank in of_kind)
        if len(over) == len(signs) or waited > grace or (kind == "failed" and 0 in of_kind):
            rank, end = min(of_kind.items())
            return Verdict(end.code, end.line if rank == 0 or kind == "interrupted" else _of_rank(rank, end.line))
    return None


def _of_rank(rank: int, line: str) -> str:
    return f"error: rank {rank}: {line.removeprefix('error: ')}"


def process_identity(pid: int | str = "self") -> list[str] | None:
    """What names a process on its machine: the machine, the namespaces (processes, network), its number, when it began. None where /proc does not
    say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot, space = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), " ".join(os.readlink(f"/proc/self/ns/{n}") for n in ("pid", "net"))
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else [boot, space, stat.split()[0], fields[19]]


@dataclass
class Watchdog:
    """Of one rank: `store` is a connection of its own, `store_name` where it is. `neighbours`: the other ranks on this machine by their process."""

    rank: int
    size: int
    store: Any
    store_name: str
    neighbours: dict[int, list[str]] = field(default_factory=dict)
    waking: Any = None
    sign: Sign = field(default_factory=Sign)
    leaving: bool = False
    relayed: bool = False
    fresh: float = field(default_factory=time.monotonic)
    poke: threading.Event = field(default_factory=threading.Event)
    lock: Any = field(default_factory=threading.RLock)
    changed: dict[int, tuple[int, float]] = field(default_factory=dict)
    ended: dict[int, float] = field(default_factory=dict)

    def here(self) -> None:
        """The first sign, before any rank looks for it."""
        if self.rank == 0:
            self.store.set("verdict", "")
        self._give()

    def begin(self, neighbours: dict[int, list[str]]) -> None:
        """Once every rank's first sign is there. In the main thread: a signal wakes the watchdog although a collective may be waiting."""
        self.neighbours, self.fresh = neighbours, time.monotonic()
        reading, writing = socket.socketpair()
        writing.setblocking(False)
        self.waking = reading, writing
        signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        for work in (self._beats, self._guards, self._signals):
            threading.Thread(target=work, daemon=True).start()

    def change(self, **what: Any) -> None:
        with self.lock:
            self.sign = replace(self.sign, **what)
        self.poke.set()

    def end(self, kind: Kind, code: int, line: str) -> int:
        """This rank is at its end: it leaves with all others, by the verdict. Returns only where no verdict comes."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        self.change(end=End(kind, code, line))
        time.sleep(SILENCE + GRACE["lost"] + HEARING)
        return code

    def depart(self) -> None:
        """Before the last barrier of an orderly end: whoever is not seen any more has left."""
        self.leaving = True
        self.change(done=True)
        self._give()
        signal.set_wakeup_fd(-1)

    # -- the threads ---------------------------------------------------------------------------------------------------------------

    def _give(self) -> None:
        with self.lock:
            self.sign = replace(self.sign, beat=self.sign.beat + 1)
            self.store.set(_key(self.rank), json.dumps(asdict(self.sign)))

    def _beats(self) -> None:
        while not self.leaving:
            try:
                self._beat()
            except RuntimeError:
                self._store_is_gone("it does not answer")
            self.poke.wait(BEAT)
            self.poke.clear()

    def _beat(self) -> None:
        alive = self._alive()
        gone = tuple(rank for rank in self.neighbours if rank not in alive)
        with self.lock:
            self.sign = replace(self.sign, gone=gone)
        self._give()
        wanted = list(range(self.size)) if self.rank == 0 else [0]
        signs, verdict = self._read(wanted)
        now = time.monotonic()
        self.fresh = now
        for rank, sign in signs.items():
            if self.changed.get(rank, (-1, 0.0))[0] != sign.beat:
                self.changed[rank] = sign.beat, now
            if sign.end:
                self.ended.setdefault(rank, now)
        silent = {rank: now - since for rank, (_, since) in self.changed.items()}
        if verdict is not None:
            self.change(heard=True)
            self._give()
            _leave(verdict.code, "")
        if self.rank == 0:
            self._relay(any(sign.stop_requested for sign in signs.values()))
            if (made := judged(signs, silent, {rank: now - at for rank, at in self.ended.items()})) and not self.leaving:
                self._pronounce(made)
        else:
            self._relay(signs[0].stop_requested)
            if (0 in gone or silent[0] > SILENCE) and not (self.leaving or signs[0].done):
                first = self.store.add("reported", 1) == 1
                why = "its process is no more" if 0 in gone else f"no sign of life for {SILENCE:.0f} s"
                _leave(1, f"error: rank 0 is gone ({why}); {GONE}" if first else "")

    def _read(self, ranks: list[int]) -> tuple[dict[int, Sign], Verdict | None]:
        *signs, verdict = self.store.multi_get([*map(_key, ranks), "verdict"])
        return dict(zip(ranks, map(Sign.read, signs), strict=True)), Verdict(**json.loads(verdict)) if verdict else None

    def _signals(self) -> None:
        """A signal that asks this rank to stop: the others hear of it, also while a collective keeps this rank's handler waiting."""
        while numbers := self.waking[0].recv(64):
            if any(number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) for number in numbers):
                self.relayed = True
                self.change(stop_requested=True)

    def _relay(self, stop_requested: bool) -> None:
        """A stop that was requested of another rank is requested of this one as well, as if it had had the signal."""
        if stop_requested and not self.relayed:
            self.relayed = True
            self.change(stop_requested=True)
            _thread.interrupt_main(signal.SIGTERM)

    def _pronounce(self, verdict: Verdict) -> None:
        self.leaving = True  # nothing more is printed, whatever becomes of the store
        _say(verdict.line)
        until = time.monotonic() + HEARING
        others = [rank for rank in range(1, self.size) if rank not in self.sign.gone]
        with contextlib.suppress(RuntimeError):
            self.store.set("verdict", json.dumps(asdict(verdict)))
            while time.monotonic() < until and not all(sign.heard for sign in self._read(others)[0].values()):
                time.sleep(0.05)
        _leave(verdict.code, "")

    def _guards(self) -> None:
        """A store behind a network that is cut answers neither yes nor no."""
        while not self.leaving:
            if time.monotonic() - self.fresh > SILENCE:
                self._store_is_gone(f"no answer for {SILENCE:.0f} s")
            time.sleep(1.0)

    def _store_is_gone(self, why: str) -> None:
        """Whoever is the lowest rank on its machine says it, and leaves last, lest the next one takes itself for the lowest."""
        with self.lock:
            if self.leaving:
                return
            self.leaving = True
        until = time.monotonic() + HEARING
        if all(rank > self.rank for rank in self._alive()):
            what = f"the store at {self.store_name} is gone" if self.rank == 0 else f"rank 0 is gone, and with it the store at {self.store_name}"
            _say(f"error: {what} ({why}); {GONE}")
            while self._alive() and time.monotonic() < until:
                time.sleep(0.05)
        _leave(1, "")

    def _alive(self) -> list[int]:
        """Of the other ranks on this machine, those whose process is there."""
        return [rank for rank, known in self.neighbours.items() if process_identity(known[2]) == known]


def _key(rank: int) -> str:
    return f"sign-{rank}"


def _say(line: str) -> None:
    if line:
        os.write(2, f"{line}\n".encode())


def _leave(code: int, line: str) -> None:
    _say(line)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    os._exit(code)


def neighbours_of(rank: int, processes: list[list[str] | None]) -> dict[int, list[str]]:
    """Of every rank's process identity, those on the machine of `rank`, without itself."""
    mine = processes[rank]
    return {other: p for other, p in enumerate(processes) if mine and p and other != rank and p[:2] == mine[:2]}
