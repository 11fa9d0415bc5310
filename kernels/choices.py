"""Measured choices and tuned configurations, remembered on disk per device.

One JSON file per device and torch version in the cache directory. A damaged or foreign file is
measured anew, since nothing in it is more than a saving of time. Knows JSON; not what is chosen.
"""

import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .cache import cache_directory

VERSION = 3
log = logging.getLogger(__name__)


@cache
def processor_name() -> str:
    """The CPU in words, as /proc/cpuinfo has it where there is one."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        fields = dict(line.split(":", 1) for line in information.read_text().split("\n\n")[0].splitlines() if ":" in line)
        named = {k.strip(): v.strip() for k, v in fields.items()}
        model = " ".join(named[k] for k in ("model name", "cpu family", "model", "stepping") if k in named)
        if model:
            return model
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """What distinguishes one machine's measurements from another's: card, or processor, instruction set and threads."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} sm{major}{minor}"
    return f"{processor_name()} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"


def cache_file(device: torch.device) -> Path:
    key = hashlib.sha256(f"{VERSION} {device_name(device)} torch {torch.__version__}".encode()).hexdigest()[:12]
    return cache_directory() / f"kernels-{device.type}-{key}.json"


def entries(device: torch.device) -> dict[str, Any]:
    """Everything remembered about this device: key → {"choice", "reason", …}. Empty when the file is absent or unreadable."""
    path = cache_file(device)
    try:
        stored = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s): measuring again", path, error)
        return {}
    ours = isinstance(stored, dict) and stored.get("version") == VERSION and stored.get("device") == device_name(device)
    return dict(stored["entries"]) if ours and isinstance(stored.get("entries"), dict) else {}


_known: dict[Path, dict[str, Any]] = {}
_unwritable: set[Path] = set()
"""Files that have been warned about."""


def remembered(device: torch.device, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The entry under `key`, from memory, disk, or `measure()`; a new one is written back at once."""
    path = cache_file(device)
    known = _known.setdefault(path, entries(device))
    if key not in known:
        known[key] = measure()
        _write(path, device, entries(device) | known)
    return known[key]


def known(device: torch.device, key: str) -> dict[str, Any] | None:
    """The entry under `key` if memory or disk has it."""
    path = cache_file(device)
    return _known.setdefault(path, entries(device)).get(key)


def forget() -> None:
    """Drop what this process holds in memory; the files stay."""
    _known.clear()
    _unwritable.clear()


def _write(path: Path, device: torch.device, content: dict[str, Any]) -> None:
    """Written aside and renamed, so that two processes never mix their bytes; a directory that cannot be written is only a warning."""
    document = {"version": VERSION, "device": device_name(device), "torch": torch.__version__, "entries": dict(sorted(content.items()))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as scratch:
            json.dump(document, scratch, indent=1)
        os.replace(scratch.name, path)
    except OSError as error:
        if path not in _unwritable:
            log.warning("%s cannot be written (%s): these choices are measured again next time; BITMEND_CACHE=DIR keeps them", path, error)
        _unwritable.add(path)
