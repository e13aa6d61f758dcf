"""Programs made from source on first use and kept in the user's cache: shipped potentials, files that do not fit here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import carryall
from carryall.cache_folder import cache_folder as cache_folder
from carryall.errors import InputError
from carryall.package.compile import require_compiler
from carryall.package.cpu import cpu_level, machine
from carryall.package.export import export_model
from carryall.package.from_source import load_model
from carryall.package.load import PackedPotential, load_packed
from carryall.package.rebuild import rebuild
from carryall.package.sources import read_root

Notify = Callable[[str], None]


def compiled(source: Path, notify: Notify) -> PackedPotential:
    """The `.pt2` of a shipped source file for this CPU, torch and carryall."""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    return _cached(source, digest, {"device": "cpu"}, lambda path: export_model(load_model(source), path), notify)


def rebuilt(path: Path, device: str, notify: Notify) -> PackedPotential:
    """The `.pt2` of the source inside a packed file, for this machine; nothing of the file itself runs."""
    digest = hashlib.sha256(json.dumps(read_root(path), sort_keys=True, default=repr_of).encode()).hexdigest()
    return _cached(path, digest, {"device": device}, lambda new: rebuild(path, new, device=device, notify=notify), notify)


def repr_of(array: Any) -> list[Any]:
    """An array as JSON has it, for a digest."""
    return [array.dtype.name, list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]


def _cached(
    origin: Path, digest: str, settings: dict[str, str], build: Callable[[Path], Path], notify: Notify
) -> PackedPotential:
    """From the cache, or built now where it has none that is whole."""
    require_compiler()
    facts = [digest, carryall.__version__, torch.__version__, cpu_level(), machine(), settings]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    name = origin.name.split(".")[0]
    path = cache_folder() / f"{name}-{key}.pt2"
    try:
        return load_packed(path, settings["device"])
    except InputError:
        pass
    notify(f"compiling {name} for this machine, once (about half a minute), into {path}")
    # two processes may do this at once: each writes its own temporary file, the last rename wins
    return load_packed(build(path), settings["device"])
