"""`carryall.rebuild`: a packed file made again from the source inside it, without running anything of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from carryall.errors import InputError
from carryall.package.manifest import METADATA, SCRIPT, is_packed, read_json
from carryall.package.metadata import Metadata, read_metadata
from carryall.package.pack import pack


def rebuild(
    path: str | Path,
    new: str | Path,
    *,
    device: str | None = None,
    cpu_level: str | None = None,
    check: bool = True,
    notify: Callable[[str], None] | None = None,
) -> Path:
    """Write `new` from the source inside `path`, in the same dtype and with the same options; returns its path.

    For a file that was made for another CPU, device or torch, in an older format, by someone whose code shall not run here, or
    by DeePMD: only its source dict is read. `device` and `cpu_level` None: the file's device, this CPU's level.
    """
    path = Path(path)
    if path.suffix not in (".pt2", ".pte"):
        raise InputError(f"{path}: expected a packed file, .pt2 or .pte; carryall pack makes one of anything else")
    facts = _facts(path)
    options: dict[str, Any] = {"dtype": None}
    if facts is not None:
        options = {"dtype": facts.dtype, "compress": facts.compressed, "training_config": read_json(path, SCRIPT)}
        options["compression_tolerance"] = facts.compression_tolerance
        device = device or facts.device
    return pack(path, new, device=device or "cpu", cpu_level=cpu_level, check=check, notify=notify, **options)


def _facts(path: Path) -> Metadata | None:
    """The facts of a file of ours; None of another's."""
    return read_metadata(path, read_json(path, METADATA)) if is_packed(path) else None
