"""`carryall rebuild`: a packed file made again from the source inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from carryall.cli.arguments import parse
from carryall.cli.console import console, show_settings
from carryall.cli.pack import show_packed


@dataclass(frozen=True)
class RebuildConfig:
    """Make a packed file again from the source inside it, for this machine; nothing of the old file runs."""

    path: Positional[Path]
    """Packed file (.pt2, .pte), of carryall or DeePMD."""
    new: Positional[Path]
    """File to write: .pt2 (compiled) or .pte (portable)."""
    device: str | None = None
    """Where the program will run; left out: the old file's device."""
    cpu_level: str | None = None
    """Lowest CPU that a .pt2 shall run on, as in carryall pack; left out: this one's."""


def run(argv: Sequence[str]) -> int:
    """The verb."""
    config = parse(RebuildConfig, "rebuild", argv)
    from carryall.package.rebuild import rebuild

    show_settings(vars(config))
    with console().status("reading the source, tracing, compiling and checking against the model"):
        path = rebuild(config.path, config.new, device=config.device, cpu_level=config.cpu_level, notify=console().print)
    show_packed(path)
    return 0
