"""Thermodynamics of each system, as a CSV file with a row of units."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from carryall.data.batch import Batch
from carryall.dynamics.hooks.measures import (
    COLUMNS,
    REPORT_STAGES,
    WHOLE_NUMBERS,
    SystemInterval,
    continues,
    measured,
)
from carryall.errors import InputError

if TYPE_CHECKING:
    from carryall.dynamics.engine import Engine


class CSVLog:
    """One row for each running system every `interval` of its steps: energies, temperature, pressure and more (`COLUMNS`).

    The first row names the columns, the second their units. The file is begun anew by a dynamics that starts anew, unless this
    very hook has begun it (a second run with it adds rows); a dynamics that was restored from a checkpoint keeps the rows up to
    its step and goes on.
    """

    stages = REPORT_STAGES
    frequency = 1

    def __init__(self, path: str | Path, interval: int = 10) -> None:
        self.path = Path(path)
        self._interval = SystemInterval(interval, "CSVLog")
        self._file: IO[str] | None = None
        self._began = False

    def __call__(self, batch: Batch, dynamics: Engine) -> None:
        """Write rows when they are due."""
        systems = self.due(batch, dynamics)
        if systems:
            self.write(measured(batch, dynamics), systems)

    def due(self, batch: Batch, dynamics: Engine) -> list[int]:
        """Systems to write a row of now; opens the file."""
        if self._file is None:
            self._file = self._opened(dynamics)
        return self._interval.due(batch, dynamics)

    def write(self, values: Mapping[str, np.ndarray], systems: Sequence[int]) -> None:
        """A row of what was measured, for each of the systems."""
        assert self._file is not None
        rows = list(systems)
        columns = [[_text(value) for value in values[name][rows].tolist()] for name in COLUMNS]
        csv.writer(self._file, lineterminator="\n").writerows(zip(*columns, strict=True))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self, dynamics: Engine) -> IO[str]:
        if continues(self.path, dynamics, self._began):
            if not self._began:
                self._interval.seen(dynamics, _trim(self.path, dynamics.step_count))
            file = self.path.open("a", newline="")
        else:
            file = self.path.open("w", newline="")
            file.write(",".join(COLUMNS) + "\n" + ",".join(COLUMNS.values()) + "\n")
        self._began = True
        return file


def read_csv_log(path: str | Path) -> Mapping[str, np.ndarray]:
    """Columns of a CSV log by name, (n_rows,) each; a log of an older version has fewer."""
    with Path(path).open(newline="") as file:
        rows = list(csv.reader(file))
    if len(rows) < 2 or rows[0][:2] != ["step", "system_id"] or not set(rows[0]) <= set(COLUMNS):
        raise InputError(f"{path} is not a log of carryall: its first row should be {','.join(COLUMNS)}")
    table = np.array(rows[2:], dtype=np.float64).reshape(-1, len(rows[0]))
    return {name: table[:, i].astype(np.int64) if name in WHOLE_NUMBERS else table[:, i] for i, name in enumerate(rows[0])}


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def _trim(path: Path, step: int) -> set[int]:
    """Drop rows after `step` and a row that was cut off; returns the systems that have a row of `step`."""
    kept, told = [], set()
    with path.open() as file:
        for number, line in enumerate(file):
            if number == 0 and line.rstrip("\n").split(",") != list(COLUMNS):
                raise InputError(f"{path} has other columns than a log has now, or is no log: give the log another name")
            if number >= 2:
                cells = line.rstrip("\n").split(",")
                if len(cells) != len(COLUMNS) or not line.endswith("\n") or int(cells[0]) > step:
                    continue
                if int(cells[0]) == step:
                    told.add(int(cells[1]))
            kept.append(line)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    temporary.write_text("".join(kept))
    temporary.replace(path)
    return told
