"""`carryall status`: how far a run is, while it works, after it was killed, or when it is done."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from carryall.cli.arguments import parse
from carryall.cli.console import console
from carryall.errors import InputError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from carryall.dynamics.folder_status import RunStatus

TOLD = 5
"""Kinds of failures that are told."""


@dataclass(frozen=True)
class StatusConfig:
    """How far a run of carryall pipeline, of a DistributedPipeline or of carryall relax is; it is only read."""

    folder: Positional[Path]
    """Folder of the run."""
    watch: bool = False
    """Look again and again, until it no longer runs."""
    interval: float = 2.0
    """Seconds between two looks."""
    json: bool = False
    """One line of JSON for each look."""


def run(argv: Sequence[str]) -> int:
    """The verb; exit code 0 whatever the state of the run is."""
    config = parse(StatusConfig, "status", argv)
    from carryall.dynamics.folder_status import RUNNING, folder_status

    if not config.interval > 0:
        raise InputError(f"interval must be more than 0 s, got {config.interval:g}")
    found = folder_status(config.folder)
    if config.json:
        print(json.dumps(found.facts), flush=True)
        while config.watch and found.state == RUNNING:
            time.sleep(config.interval)
            found = folder_status(config.folder)
            print(json.dumps(found.facts), flush=True)
        return 0
    if not config.watch or found.state != RUNNING:
        console().print(shown(config.folder, found))
        return 0
    _watch(config, found)
    return 0


def _watch(config: StatusConfig, found: RunStatus) -> None:
    from rich.live import Live

    from carryall.dynamics.folder_status import RUNNING, folder_status

    with Live(shown(config.folder, found), console=console(), auto_refresh=False) as live:
        try:
            while found.state == RUNNING:
                time.sleep(config.interval)
                found = folder_status(config.folder)
                live.update(shown(config.folder, found), refresh=True)
        except KeyboardInterrupt:
            # it is the look that ends, not the run
            return


def shown(folder: Path, found: RunStatus) -> RenderableType:
    """State, table, and the most frequent failures."""
    from rich.console import Group
    from rich.text import Text

    total = "" if found.inputs is None else f" of {found.inputs}"
    head = Text(f"{folder}: ", style="bold") + Text(f"{found.state}, {found.finished + found.failed}{total} inputs done")
    parts: list[Any] = [head, _table(found), Text(_when(found), style="dim")]
    if found.failures:
        parts.append(Text("failed:", style="red"))
        parts += [Text(f"  {one.count} × {one.reason} (input {one.index})") for one in found.failures[:TOLD]]
        rest = found.failures[TOLD:]
        if rest:
            parts.append(Text(f"  {sum(one.count for one in rest)} for {len(rest)} other reasons: they are in the ledger"))
    return Group(*parts)


def _table(found: RunStatus) -> Any:
    from carryall.dynamics.folder_status import RUNNING
    from carryall.dynamics.pipeline.report import table_of

    facts = {"stages": found.stages, "seconds": found.seconds or 0.0, "seconds_left": found.seconds_left}
    table = table_of(facts)
    if found.state != RUNNING or found.kind == "relax":
        table.caption = None
        table.columns.pop()  # a rate is one of a pipeline that runs
    return table


def _when(found: RunStatus) -> str:
    from carryall.dynamics.folder_status import STOPPED
    from carryall.dynamics.pipeline.report import span

    if found.updated is None:
        return ""
    ago = span(max(0.0, time.time() - found.updated))
    said = f"last update {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(found.updated))}, {ago} ago"
    return said + ("; no process works on it: resume it" if found.state == STOPPED else "")
