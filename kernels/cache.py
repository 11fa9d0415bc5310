"""Where this program keeps what it would otherwise measure or fetch again. Knows the environment; imports nothing heavy."""

import os
from pathlib import Path

NO_HOME = Path("/dev/null")
"""Stands for the home of a user who has none: no file is ever read or written below it."""


def cache_directory() -> Path:
    """$BITMEND_CACHE, else $XDG_CACHE_HOME/bitmend, else ~/.cache/bitmend; below NO_HOME where the system knows no home of this user."""
    own, shared = os.environ.get("BITMEND_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    if shared:
        return Path(shared).expanduser() / "bitmend"
    home = os.path.expanduser("~")  # Path.home() raises where there is none
    return (NO_HOME if home == "~" else Path(home)) / ".cache" / "bitmend"
