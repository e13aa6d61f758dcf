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
from carryall.dynamics.hooks.measures import REPORT_STAGES, SystemInterval, continues, frames
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
    """Frames of the running systems, each every `interval` of its steps, one after the other.

    In the comment: step (of the run), system_id, system_step (of the system, in its stage), time. Systems may come and go.
    Begun anew or gone on with as `CSVLog` is.
    """

    stages = REPORT_STAGES
    frequency = 1

    def __init__(self, path: str | Path, interval: int = 10) -> None:
        self.path = Path(path)
        self._interval = SystemInterval(interval, "ExtXYZTrajectory")
        self._file: IO[str] | None = None
        self._began = False

    def __call__(self, batch: Batch, dynamics: Engine) -> None:
        """Write frames when they are due."""
        if self._file is None:
            self._file = self._opened(dynamics)
        systems = self._interval.due(batch, dynamics)
        if systems:
            self._file.writelines(format_frame(data) for data in frames(batch, dynamics, systems))
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
            self._interval.seen(dynamics, _trim(self.path, dynamics.step_count))
        return self.path.open("a", encoding="utf-8")


def _trim(path: Path, step: int) -> set[int]:
    """Drop frames after `step` and one that was cut off; returns the systems that have a frame of `step`."""
    told = set()
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    with path.open(encoding="utf-8") as source, temporary.open("w", encoding="utf-8") as target:
        for found, name, text in _frame_texts(source):
            if found <= step:
                target.write(text)
            if found == step:
                told.add(name)
    temporary.replace(path)
    return told


def _frame_texts(file: IO[str]) -> Iterator[tuple[int, int, str]]:
    """Step, system_id and text of each whole frame."""
    while count := file.readline():
        if not count.strip().isdigit():
            return
        lines = [count, *(file.readline() for _ in range(int(count) + 1))]
        step, name = (re.search(rf"(?:^|\s){key}=(\d+)", lines[1]) for key in ("step", "system_id"))
        if step is None or name is None or not lines[-1].endswith("\n"):
            return
        yield int(step.group(1)), int(name.group(1)), "".join(lines)
