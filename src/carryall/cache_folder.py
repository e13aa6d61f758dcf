"""Where carryall keeps what it made on this machine and can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$CARRYALL_CACHE`, else `carryall` in the user's cache folder."""
    if custom := os.environ.get("CARRYALL_CACHE"):
        return Path(custom)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "carryall"
