"""Rows and a bar for a person at a terminal; silent when the output is not one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from carryall.data.batch import Batch
from carryall.dynamics.hooks.base import HookStageEnum
from carryall.dynamics.hooks.measures import REPORT_STAGES, Schedule, measured, reported_systems
from carryall.dynamics.thermo import max_force

if TYPE_CHECKING:
    from carryall.dynamics.base import BaseDynamics

HEADER = f"{'step':>9} {'running':>8} {'time/fs':>12} {'T/K':>9} {'Epot/atom/eV':>14} {'Etot/atom/eV':>14} {'fmax/(eV/A)':>12}"


class LogTable:
    """A row every `interval` steps: means over the running systems, and the largest force among them."""

    stages = REPORT_STAGES
    frequency = 1

    def __init__(self, interval: int = 10, console: Console | None = None) -> None:
        self._schedule = Schedule(interval, "LogTable")
        self._console = console
        self._has_header = False

    def __enter__(self) -> LogTable:
        self._has_header = False
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def __call__(self, batch: Batch, dynamics: BaseDynamics) -> None:
        """Print a row when it is due."""
        console = self._console or get_console()
        if not console.is_terminal or not self._schedule.due(dynamics):
            return
        systems = reported_systems(batch, dynamics)
        if not systems:
            return
        values = {name: column[systems] for name, column in measured(batch, dynamics).items()}
        atoms = np.maximum(np.array(batch.atom_counts)[systems], 1)
        numbers = (
            f"{dynamics.completed_steps:9d} {len(systems):8d} {values['time'].mean():12.2f} "
            f"{values['temperature'].mean():9.1f} "
            f"{(values['potential_energy'] / atoms).mean():14.6f} {(values['total_energy'] / atoms).mean():14.6f} "
            f"{max_force(batch).cpu().numpy()[systems].max():12.5f}"
        )
        if not self._has_header:
            console.print(HEADER, style="bold", highlight=False, soft_wrap=True)
            self._has_header = True
        console.print(numbers, highlight=False, soft_wrap=True)


class ProgressBar:
    """Steps done of the steps to do, and how many systems are left."""

    stage = HookStageEnum.AFTER_STEP
    frequency = 1

    def __init__(self, label: str = "steps", console: Console | None = None) -> None:
        self.label = label
        self._console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressBar:
        console = self._console or get_console()
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=console)
            self._progress.start()
            self._task = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __call__(self, batch: Batch, dynamics: BaseDynamics) -> None:
        """Move the bar."""
        if self._progress is None:
            return
        if self._task is None:
            self._task = self._progress.add_task(self.label, total=dynamics.target_steps)
        left = f"{self.label} ({dynamics.n_running(batch)} of {batch.n_systems} systems running)"
        self._progress.update(self._task, completed=dynamics.completed_steps, description=left)
