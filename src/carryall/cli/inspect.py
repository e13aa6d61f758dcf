"""`carryall inspect`: what is in a file, without running anything from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from carryall.cli.arguments import parse
from carryall.cli.console import console, show_settings, show_table

WEIGHTS = "/weights/weight_"
DEFINITIONS = ("input_defs", "output_defs")


@dataclass(frozen=True)
class InspectConfig:
    """Show spec, sizes, provenance and hashes of a packed file or a source file; nothing of it runs."""

    path: Positional[Path]
    """A .pt2, .pte or source file."""
    json: bool = False
    """Print everything as JSON instead of tables."""


def run(argv: Sequence[str]) -> int:
    """The verb."""
    config = parse(InspectConfig, "inspect", argv)
    from carryall.package.inspect import inspect

    facts = inspect(config.path)
    if config.json:
        print(json.dumps(facts, indent=1, default=str))
        return 0
    _show(facts)
    return 0


def _show(facts: dict[str, Any]) -> None:
    out = console()
    note = ", not carryall's: nothing vouches for it" if facts.get("foreign") else ", signed" if facts.get("signed") else ""
    out.print(f"[bold]{facts['path']}[/bold]  {facts['bytes'] / 1e6:.2f} MB{note}")
    metadata = facts["metadata"]
    show_settings({key: value for key, value in metadata.items() if key not in DEFINITIONS})
    for key in DEFINITIONS:
        if metadata.get(key):
            values = [
                (one["name"], one["dtype"], f"({', '.join(map(str, one['shape']))})", one["unit"]) for one in metadata[key]
            ]
            out.print()
            show_table(
                ("name", "dtype", "shape", "unit or meaning"), values, title=f"{key.removesuffix('_defs')}s of the program"
            )
    if facts.get("training"):
        out.print("\n[bold]training[/bold]")
        show_settings(facts["training"])
    if "entries" in facts:
        weights = {name: entry for name, entry in facts["entries"].items() if WEIGHTS in name}
        rows = [
            (name, f"{entry['size']:,}", entry["sha256"][:16])
            for name, entry in facts["entries"].items()
            if name not in weights
        ]
        if weights:
            rows.append(
                (f"{len(weights)} entries of weights", f"{sum(entry['size'] for entry in weights.values()):,}", "see --json")
            )
        out.print()
        title = "entries" if facts.get("foreign") else "entries, all as the manifest says"
        show_table(("entry", "bytes", "SHA-256, first 16"), rows, title=title)
