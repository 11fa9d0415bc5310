"""Where this program keeps what it would otherwise measure or fetch again. Knows the environment; imports nothing heavy."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """$BITMEND_CACHE, else $XDG_CACHE_HOME/bitmend, else ~/.cache/bitmend."""
    own, shared = os.environ.get("BITMEND_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "bitmend"
