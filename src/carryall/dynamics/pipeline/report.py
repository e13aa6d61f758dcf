"""Where the systems of a pipeline are: numbers for the ledger, a table for people."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

LIVE = "live"
"""Fact of the ledger with the last numbers."""


@dataclass(frozen=True)
class StageCount:
    """Systems of one stage."""

    name: str
    waiting: int | None
    """None where nobody knows how many inputs there are."""
    in_flight: int
    done: int
    """They have passed the stage, in earlier runs too."""
    failed: int
    done_now: int
    """They have passed it in this run."""


def live_facts(counts: Sequence[StageCount], seconds: float) -> dict[str, Any]:
    """What the ledger keeps: counts, rate and time left of each stage, seconds of the run, and when."""
    left = seconds_left(counts, seconds)
    stages = [
        {
            "name": one.name,
            "waiting": one.waiting,
            "in_flight": one.in_flight,
            "done": one.done,
            "failed": one.failed,
            "rate": one.done_now / seconds if seconds > 0 else 0.0,
        }
        for one in counts
    ]
    return {"stages": stages, "seconds": seconds, "seconds_left": left, "time": time.time()}


def seconds_left(counts: Sequence[StageCount], seconds: float) -> float | None:
    """Seconds until all is done if each stage keeps its rate; None while that cannot be known."""
    coming: float = 0
    longest = 0.0
    for one in counts:
        if one.waiting is None:
            return None
        coming += one.waiting + one.in_flight
        if not coming:
            continue
        if not one.done_now:
            return None
        longest = max(longest, coming * seconds / one.done_now)
    return longest


def table_of(facts: Mapping[str, Any]) -> Table:
    """The table of `live_facts`."""
    table = Table(box=None, pad_edge=False)
    for name in ("stage", "waiting", "in flight", "done", "failed", "rate"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for one in facts["stages"]:
        waiting = "?" if one["waiting"] is None else str(one["waiting"])
        failed = f"[red]{one['failed']}[/red]" if one["failed"] else "0"
        table.add_row(one["name"], waiting, str(one["in_flight"]), str(one["done"]), failed, f"{one['rate']:.2f}/s")
    left = "unknown" if facts["seconds_left"] is None else span(facts["seconds_left"])
    table.caption = f"{span(facts['seconds'])} of this run, {left} left"
    return table


def span(seconds: float) -> str:
    """Hours, minutes and seconds as `1:02:03`."""
    whole = int(seconds + 0.5)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


@contextmanager
def live_table(wanted: bool) -> Iterator[Callable[[list[StageCount], float], None]]:
    """A table that is renewed at each call, at a terminal; nothing elsewhere."""
    console = Console(stderr=True)
    if not (wanted and console.is_terminal):
        yield lambda counts, seconds: None
        return
    with Live(console=console, auto_refresh=False) as live:

        def show(counts: list[StageCount], seconds: float) -> None:
            live.update(table_of(live_facts(counts, seconds)), refresh=True)

        yield show
