"""Rows and a bar for a person at a terminal; silent when the output is not one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from carryall.data.batch import Batch
from carryall.dynamics.hooks.base import HookStageEnum
from carryall.dynamics.hooks.measures import REPORT_STAGES, Interval, measured, reported_systems
from carryall.dynamics.thermo import max_force

if TYPE_CHECKING:
    from carryall.dynamics.engine import Engine

ONE_BY_ONE = 5
"""Up to so many systems have a row each; of more, smallest, mean and largest values are shown."""
QUANTITIES: dict[str, tuple[str, int, int]] = {
    "time": ("time/fs", 12, 2),
    "temperature": ("T/K", 9, 1),
    "potential_energy": ("Epot/atom/eV", 14, 6),
    "total_energy": ("Etot/atom/eV", 14, 6),
    "pressure": ("p/GPa", 9, 3),
    "fmax": ("fmax/(eV/A)", 12, 5),
}
"""Heading, width and decimals of each column."""
HEADER = f"{'step':>9} {'system':>10} " + " ".join(f"{name:>{width}}" for name, width, _ in QUANTITIES.values())
SECONDS = 0.1
"""Between two looks of the bar at the run: a person sees no more."""


class LogTable:
    """Every `interval` steps a row for each running system, or, of more than five, rows of their minimum, mean and maximum."""

    stages = REPORT_STAGES
    frequency = 1

    def __init__(self, interval: int = 10, console: Console | None = None) -> None:
        self._interval = Interval(interval, "LogTable")
        self._console = console
        self._has_header = False

    def __enter__(self) -> LogTable:
        self._has_header = False
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def __call__(self, batch: Batch, dynamics: Engine) -> None:
        """Print rows when they are due."""
        if not self._interval.due(dynamics):
            return
        console = self._console or get_console()
        if not console.is_terminal:
            return
        systems = reported_systems(batch, dynamics)
        if not systems:
            return
        lines = _lines(dynamics.completed_steps, *_values(batch, dynamics, systems))
        if not self._has_header:
            console.print(HEADER, style="bold", highlight=False, soft_wrap=True)
            self._has_header = True
        console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _values(batch: Batch, dynamics: Engine, systems: list[int]) -> tuple[np.ndarray, list[int]]:
    """(n, quantities) of the systems, and their ids."""
    found = measured(batch, dynamics)
    atoms = np.maximum(np.array(batch.atom_counts), 1)
    force = batch.get("fmax") if "fmax" in batch else max_force(batch)
    columns = [
        force.cpu().numpy() if name == "fmax" else found[name] / (atoms if name.endswith("energy") else 1)
        for name in QUANTITIES
    ]
    return np.stack(columns, 1)[systems], found["system_id"][systems].tolist()


def _lines(step: int, values: np.ndarray, ids: list[int]) -> list[str]:
    if len(ids) <= ONE_BY_ONE:
        return [_line(step, str(name), row) for name, row in zip(ids, values, strict=True)]
    known = (~np.isnan(values)).sum(0)
    mean = np.where(known > 0, np.nansum(values, 0) / np.maximum(known, 1), np.nan)
    rows = {"min": np.fmin.reduce(values), "mean": mean, "max": np.fmax.reduce(values)}
    return [_line(step, f"{name}/{len(ids)}", row) for name, row in rows.items()]


def _line(step: int, label: str, row: np.ndarray) -> str:
    cells = [
        f"{'-':>{width}}" if np.isnan(value) else f"{value:{width}.{decimals}f}"
        for value, (_, width, decimals) in zip(row.tolist(), QUANTITIES.values(), strict=True)
    ]
    return f"{step:9d} {label:>10} {' '.join(cells)}"


class ProgressBar:
    """Steps done of the steps to do, and how many systems are left; in flight, systems done of the systems to do."""

    stage = HookStageEnum.AFTER_STEP
    frequency = 1

    def __init__(self, label: str = "steps", console: Console | None = None) -> None:
        self.label = label
        self._console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._next = 0.0
        self._last: tuple[int, int | None, str] | None = None
        self._due: tuple[Batch, Engine] | None = None

    def __enter__(self) -> ProgressBar:
        console = self._console or get_console()
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=console)
            self._progress.start()
            self._task, self._next, self._due = None, 0.0, None
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            if self._due is not None:
                self._show(*self._due)
            self._progress.stop()
            self._progress = self._due = None

    def __call__(self, batch: Batch, dynamics: Engine) -> None:
        """Move the bar, several times a second."""
        if self._progress is None:
            return
        now = time.monotonic()
        if now < self._next:
            self._due = (batch, dynamics)
            return
        self._next, self._due = now + SECONDS, None
        self._show(batch, dynamics)

    def _show(self, batch: Batch, dynamics: Engine) -> None:
        assert self._progress is not None
        running = dynamics.n_running(batch)
        done, total, left = dynamics.completed_steps, dynamics.target_steps, f"{running} of {batch.n_systems} systems running"
        sampler = dynamics.host.refill.sampler
        if sampler is not None:
            done, total = sampler.n_drawn - dynamics.host.n_running(batch), sampler.n_total
            left = f"step {dynamics.completed_steps}, {running} systems running"
        if self._task is None:
            self._task = self._progress.add_task(self.label, total=total)
        self._progress.update(self._task, completed=max(0, done), total=total, description=f"{self.label} ({left})")
