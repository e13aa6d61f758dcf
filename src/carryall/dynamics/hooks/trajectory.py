"""Trajectories: the hook for a file name, and extended XYZ."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from carryall.data.batch import Batch
from carryall.data.extxyz import format_frame
from carryall.dynamics.hooks.hdf5_trajectory import HDF5Trajectory
from carryall.dynamics.hooks.measures import REPORT_STAGES, Interval, continues, frames
from carryall.errors import InputError

if TYPE_CHECKING:
    from carryall.dynamics.engine import Engine
    from carryall.dynamics.hooks.ase import ASETrajectory

HDF5_SUFFIXES = (".h5", ".hdf5")
EXTXYZ_SUFFIXES = (".extxyz", ".xyz")
ASE_SUFFIXES = (".traj",)


def trajectory_writer(path: str | Path, interval: int = 10) -> ExtXYZTrajectory | HDF5Trajectory | ASETrajectory:
    """The trajectory hook for a file name: .h5 or .hdf5, .extxyz or .xyz, .traj (which needs ASE)."""
    suffix = Path(path).suffix.lower()
    if suffix in HDF5_SUFFIXES:
        return HDF5Trajectory(path, interval)
    if suffix in EXTXYZ_SUFFIXES:
        return ExtXYZTrajectory(path, interval)
    if suffix in ASE_SUFFIXES:
        from carryall.dynamics.hooks.ase import ASETrajectory

        return ASETrajectory(path, interval)
    known = ", ".join(HDF5_SUFFIXES + EXTXYZ_SUFFIXES + ASE_SUFFIXES)
    raise InputError(f"{path}: a trajectory is written as one of {known}, got the suffix {suffix!r}")


class ExtXYZTrajectory:
    """Frames of the running systems every `interval` steps of the run, one after the other.

    In the comment: step (of the run), system_id, system_step (of the system, in its stage), time. Systems may come and go.
    Begun anew or gone on with as `CSVLog` is.
    """

    stages = REPORT_STAGES
    frequency = 1

    def __init__(self, path: str | Path, interval: int = 10) -> None:
        self.path = Path(path)
        self._interval = Interval(interval, "ExtXYZTrajectory")
        self._file: IO[str] | None = None
        self._began = False

    def __call__(self, batch: Batch, dynamics: Engine) -> None:
        """Write frames when they are due."""
        if self._file is None:
            self._file = self._opened(dynamics)
        if self._interval.due(dynamics):
            self._file.writelines(format_frame(data) for data in frames(batch, dynamics) if data.n_atoms)
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self, dynamics: Engine) -> IO[str]:
        began, self._began = self._began, True
        if not continues(self.path, dynamics, began):
            return self.path.open("w", encoding="utf-8")
        if not began:
            last = _trim(self.path, dynamics.step_count)
            if last is not None:
                self._interval.seen(dynamics, last)
        return self.path.open("a", encoding="utf-8")


def _trim(path: Path, step: int) -> int | None:
    """Drop frames after `step` and one that was cut off; returns the last step that is left."""
    last = None
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    with path.open(encoding="utf-8") as source, temporary.open("w", encoding="utf-8") as target:
        for found, text in _frame_texts(source):
            if found <= step:
                target.write(text)
                last = found
    temporary.replace(path)
    return last


def _frame_texts(file: IO[str]) -> Iterator[tuple[int, str]]:
    """Step and text of each whole frame."""
    while count := file.readline():
        if not count.strip().isdigit():
            return
        lines = [count, *(file.readline() for _ in range(int(count) + 1))]
        found = re.search(r"(?:^|\s)step=(\d+)", lines[1])
        if found is None or not lines[-1].endswith("\n"):
            return
        yield int(found.group(1)), "".join(lines)
