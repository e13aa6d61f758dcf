"""Compiled forms of shipped potentials, made on first use and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

import carryall
from carryall.errors import InputError
from carryall.models.registry import model_from_source
from carryall.package.export import cpu_isa, export_model, require_compiler
from carryall.package.manifest import verify
from carryall.package.sources import read_source


def cache_folder() -> Path:
    """`$CARRYALL_CACHE`, else `carryall` in the user's cache folder."""
    if custom := os.environ.get("CARRYALL_CACHE"):
        return Path(custom)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "carryall"


def compiled(source: Path, notify: Callable[[str], None]) -> Path:
    """The `.pt2` of a source file for this CPU, torch and carryall, compiled now if the cache has none that is whole."""
    require_compiler()
    facts = f"{carryall.__version__} {torch.__version__} {cpu_isa()} {platform.machine()}"
    key = hashlib.sha256(source.read_bytes() + facts.encode()).hexdigest()[:16]
    path = cache_folder() / f"{source.name.split('.')[0]}-{key}.pt2"
    try:
        verify(path)
        return path
    except InputError:
        pass
    notify(f"compiling {source.name.split('.')[0]} for this machine, once (about half a minute), into {path}")
    # two processes may do this at once: each writes its own temporary file, the last rename wins
    return export_model(model_from_source(read_source(source)), path)
