"""Thermodynamics of each system, as a CSV file with a row of units."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from carryall.data.batch import Batch
from carryall.dynamics.hooks.measures import COLUMNS, REPORT_STAGES, Schedule, measured, reported_systems
from carryall.errors import InputError

if TYPE_CHECKING:
    from carryall.dynamics.base import BaseDynamics


class CSVLog:
    """One row for each running system every `interval` steps: step, system, time, temperature, energies, pressure.

    The first row names the columns, the second their units. A dynamics that starts anew writes the file anew; one that was
    restored from a checkpoint keeps the rows up to its step and goes on.
    """

    stages = REPORT_STAGES
    frequency = 1

    def __init__(self, path: str | Path, interval: int = 10) -> None:
        self.path = Path(path)
        self._schedule = Schedule(interval, "CSVLog")
        self._file: IO[str] | None = None

    def __call__(self, batch: Batch, dynamics: BaseDynamics) -> None:
        """Write rows when they are due."""
        if self._file is None:
            self._file = self._opened(dynamics)
        if not self._schedule.due(dynamics):
            return
        values = measured(batch, dynamics)
        writer = csv.writer(self._file, lineterminator="\n")
        for index in reported_systems(batch, dynamics):
            writer.writerow([_text(values[name][index]) for name in COLUMNS])
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self, dynamics: BaseDynamics) -> IO[str]:
        if dynamics.step_count and self.path.exists():
            last = _trim(self.path, dynamics.step_count)
            if last is not None:
                self._schedule.seen(dynamics, last)
            return self.path.open("a", newline="")
        file = self.path.open("w", newline="")
        file.write(",".join(COLUMNS) + "\n" + ",".join(COLUMNS.values()) + "\n")
        return file


def read_csv_log(path: str | Path) -> Mapping[str, np.ndarray]:
    """Columns of a CSV log by name, (n_rows,) each."""
    with Path(path).open(newline="") as file:
        rows = list(csv.reader(file))
    if len(rows) < 2 or rows[0] != list(COLUMNS):
        raise InputError(f"{path} is not a log of carryall: its first row should be {','.join(COLUMNS)}")
    table = np.array(rows[2:], dtype=np.float64).reshape(-1, len(COLUMNS))
    return {name: table[:, i].astype(np.int64) if i < 2 else table[:, i] for i, name in enumerate(COLUMNS)}


def _text(value: np.generic) -> str:
    return str(int(value)) if isinstance(value, np.integer) else f"{float(value):.12g}"


def _trim(path: Path, step: int) -> int | None:
    """Drop rows after `step` and a row that was cut off; returns the last step that is left."""
    kept, last = [], None
    with path.open() as file:
        for number, line in enumerate(file):
            if number >= 2:
                cells = line.rstrip("\n").split(",")
                if len(cells) != len(COLUMNS) or not line.endswith("\n") or int(cells[0]) > step:
                    continue
                last = int(cells[0])
            kept.append(line)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    temporary.write_text("".join(kept))
    temporary.replace(path)
    return last
