"""Joining and leaving the ranks that torchrun or srun started.

Knows a launcher's variables, stores and groups of torch.distributed, and the watchdog that finds who is missing; no models, no stages.
"""

import json
import logging
import os
import socket
import struct
import time
from datetime import timedelta
from typing import Any

from ..errors import UsageError
from .exchange import ONE, Ranks, collective
from .watchdog import Watchdog, neighbours_of, process_identity

log = logging.getLogger("bitmend")
PATIENCE = timedelta(days=30)
"""Of a collective: a lost rank is detected by the watchdog, not by those who wait."""
JOINING = timedelta(seconds=50)
"""How long the ranks wait for one another at the start."""
MISSED = timedelta(seconds=20)
"""After how long rank 0 says whom it waits for, and the others that they wait for the store."""
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def world() -> tuple[int, int, int] | None:
    """(rank, size, local rank) where a launcher started several processes. UsageError for contradictory variables."""
    variables = {name: os.environ.get(name, "") for name in VARIABLES}
    if variables["WORLD_SIZE"] in ("", "1"):
        return None
    size, rank, local, port = (_number(name, variables[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"))
    if not variables["MASTER_ADDR"]:
        raise UsageError(f"WORLD_SIZE is {size} and MASTER_ADDR is not set; start with torchrun, or set what it sets: {', '.join(VARIABLES)}")
    if not 0 <= rank < size or not 0 < port < 1 << 16:
        raise UsageError(f"RANK {rank}, WORLD_SIZE {size}, MASTER_PORT {port}: ranks are 0 to {max(size - 1, 0)}, ports 1 to 65535")
    return rank, size, local


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        what = f"is {text!r}, which is no number" if text else "is not set"
        raise UsageError(f"WORLD_SIZE is set and {name} {what}; start with torchrun, or set what it sets: {', '.join(VARIABLES)}")
    return int(text)


def join() -> Ranks:
    """This process among the ranks that a launcher started, from now on `joined()`; one process alone where none did. Collectives of tensors on
    a card go through NCCL where this torch has it, all else through gloo. UsageError names the port that is taken, or the ranks that did not
    come."""
    launched = world()
    if launched is None:
        return joined()
    import torch
    import torch.distributed as dist

    rank, size, local = launched
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = _store(rank, host, port)
    watchdog = Watchdog(rank, size, store.clone(), f"{host}:{port}")
    watchdog.here()
    watchdog.begin(neighbours_of(rank, _processes(store, rank, size)))
    _present.append((Ranks(rank, size, local), watchdog))  # a rank that is lost while the groups are made is detected, too
    _prefer_interface(host, port)
    cards = torch.cuda.is_available() and dist.is_nccl_available()
    options: dict[str, Any] = {"store": dist.PrefixStore("groups", store), "rank": rank, "world_size": size, "timeout": PATIENCE}
    with collective():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cards else "gloo", **options)
        control = dist.new_group(backend="gloo", timeout=PATIENCE) if cards else dist.group.WORLD
    _present[-1] = Ranks(rank, size, local, control), watchdog
    return joined()


_present: list[tuple[Ranks, Watchdog]] = []
"""This process among its ranks, from `join` to `leave`."""


def joined() -> Ranks:
    return _present[-1][0] if _present else ONE


def watching() -> Watchdog | None:
    """The watchdog to which a rank reports how it ends; None for one process."""
    return _present[-1][1] if _present else None


def leave() -> None:
    """The orderly end: every rank comes here, or none."""
    if not _present:
        return
    import torch.distributed as dist

    ranks, watchdog = _present[-1]
    watchdog.depart()
    ranks.barrier()
    dist.destroy_process_group()
    _present.clear()


def _store(rank: int, host: str, port: int) -> Any:
    """Where torchrun keeps one, that; else rank 0's."""
    import torch.distributed as dist

    launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank or launched:
        _await_store(rank, host, port)
    try:
        plain = dist.TCPStore(host, port, None, rank == 0 and not launched, JOINING, wait_for_workers=False)
        return dist.PrefixStore(f"bitmend-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", plain)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        taken = "EADDRINUSE" in reason or "in use" in reason
        way = "it is in use; choose another MASTER_PORT (torchrun: --master-port)" if taken else f"not reached ({reason})"
        raise UsageError(f"rank {rank}: MASTER_ADDR {host}, MASTER_PORT {port}: {way}") from error


def _await_store(rank: int, host: str, port: int) -> None:
    """Until somebody listens there. Asked here, since a TCPStore waits up to twice its time for one that never comes. UsageError after JOINING."""
    began, warned = time.monotonic(), False
    while True:
        try:
            socket.create_connection((host, port), timeout=JOINING.total_seconds()).close()
            return
        except OSError as error:
            waited, reason = time.monotonic() - began, error.strerror or str(error)
        if waited > JOINING.total_seconds():
            raise UsageError(f"rank {rank}: MASTER_ADDR {host}, MASTER_PORT {port}: not reached within {JOINING.seconds} s ({reason}); start rank 0, too")
        if waited > MISSED.total_seconds() and not warned:
            warned = True
            log.warning("rank %d waits for rank 0 at %s:%d (%s), until %d s", rank, host, port, reason, JOINING.seconds)
        time.sleep(0.2)


def _processes(store: Any, rank: int, size: int) -> list[list[str] | None]:
    """What names every rank's process, once all have come."""
    names = [f"process-{other}" for other in range(size)]
    try:
        store.set(names[rank], json.dumps(process_identity()))
        try:
            store.wait(names, MISSED)
        except RuntimeError:
            if rank == 0:
                log.warning("waiting for rank %s of %d, until %d s", _missing(store, names), size, JOINING.seconds)
            store.wait(names, JOINING - MISSED)
        return [json.loads(text) for text in store.multi_get(names)]
    except RuntimeError as error:
        raise UsageError(
            f"rank {_missing(store, names)} of {size} did not come within {JOINING.seconds} s; start all of WORLD_SIZE, with one MASTER_ADDR"
        ) from error


def _missing(store: Any, names: list[str]) -> str:
    """Who has not come; without the store, whoever kept it has left."""
    try:
        return ", ".join(str(rank) for rank, name in enumerate(names) if not store.check([name]))
    except RuntimeError:
        return "0 (or whoever keeps the store)"


def _prefer_interface(host: str, port: int) -> None:
    """Have gloo use the network interface that leads to rank 0; by itself it takes that of the machine's name, which may be none that others
    reach."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, port))  # sends nothing
        except OSError:
            return
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
            except OSError:
                continue
            if socket.inet_ntoa(reply[20:24]) == address or (name == "lo" and address.startswith("127.")):
                os.environ["GLOO_SOCKET_IFNAME"] = name
                return
