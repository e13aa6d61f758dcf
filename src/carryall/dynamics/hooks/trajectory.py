"""Trajectories: extended XYZ, and one HDF5 file for a whole batch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import h5py
import numpy as np

from carryall.data.atomic_data import AtomicData
from carryall.data.batch import Batch
from carryall.data.extxyz import format_frame
from carryall.dynamics.hooks.measures import REPORT_STAGES, Schedule, frames
from carryall.dynamics.status import SYSTEM_ID
from carryall.errors import InputError

if TYPE_CHECKING:
    from carryall.dynamics.base import BaseDynamics

FORMAT, VERSION = "carryall-trajectory", 1
HDF5_SUFFIXES = (".h5", ".hdf5")
EXTXYZ_SUFFIXES = (".extxyz", ".xyz")
STATIC = ("atomic_numbers", "ptr", "pbc", "masses", "system_id")
FRAME_KEYS = {"positions": "Å", "velocities": "Å sqrt(eV / amu)", "cell": "Å", "energy": "eV", "time": "fs", "step": ""}


def trajectory_writer(path: str | Path, interval: int = 10) -> ExtXYZTrajectory | HDF5Trajectory:
    """The trajectory hook for a file name: .h5 or .hdf5, .extxyz or .xyz."""
    suffix = Path(path).suffix.lower()
    if suffix in HDF5_SUFFIXES:
        return HDF5Trajectory(path, interval)
    if suffix in EXTXYZ_SUFFIXES:
        return ExtXYZTrajectory(path, interval)
    known = ", ".join(HDF5_SUFFIXES + EXTXYZ_SUFFIXES)
    raise InputError(f"{path}: a trajectory is written as one of {known}, got the suffix {suffix!r}")


class ExtXYZTrajectory:
    """Frames of the running systems every `interval` steps, one after the other, with step, time and system_id in the comment.

    Started anew or resumed as `CSVLog` is.
    """

    stages = REPORT_STAGES
    frequency = 1

    def __init__(self, path: str | Path, interval: int = 10) -> None:
        self.path = Path(path)
        self._schedule = Schedule(interval, "ExtXYZTrajectory")
        self._file: IO[str] | None = None

    def __call__(self, batch: Batch, dynamics: BaseDynamics) -> None:
        """Write frames when they are due."""
        if self._file is None:
            self._file = self._opened(dynamics)
        if self._schedule.due(dynamics):
            for data in frames(batch, dynamics):
                if data.n_atoms:
                    self._file.write(format_frame(data))
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self, dynamics: BaseDynamics) -> IO[str]:
        if not dynamics.step_count or not self.path.exists():
            return self.path.open("w", encoding="utf-8")
        last = None
        temporary = self.path.with_name(f".{os.getpid()}.{self.path.name}")
        with self.path.open(encoding="utf-8") as source, temporary.open("w", encoding="utf-8") as target:
            for step, text in _frame_texts(source):
                if step <= dynamics.step_count:
                    target.write(text)
                    last = step
        temporary.replace(self.path)
        if last is not None:
            self._schedule.seen(dynamics, last)
        return self.path.open("a", encoding="utf-8")


def _frame_texts(file: IO[str]) -> Iterator[tuple[int, str]]:
    """Step and text of each whole frame."""
    while count := file.readline():
        lines = [count, *(file.readline() for _ in range(int(count) + 1))]
        found = re.search(r"(?:^|\s)step=(\d+)", lines[1])
        if found is None or not lines[-1].endswith("\n"):
            return
        yield int(found.group(1)), "".join(lines)


class HDF5Trajectory:
    """Positions, velocities, cell and energy of all systems every `interval` steps in one file; see `read_trajectory`.

    Started anew or resumed as `CSVLog` is. The systems of a file stay the same from its first frame to its last.
    """

    stages = REPORT_STAGES
    frequency = 1

    def __init__(self, path: str | Path, interval: int = 10, dtype: str = "float64") -> None:
        if dtype not in ("float32", "float64"):
            raise InputError(f"dtype of a trajectory must be float32 or float64, got {dtype!r}")
        self.path, self.dtype = Path(path), dtype
        self._schedule = Schedule(interval, "HDF5Trajectory")
        self._file: Any = None

    def __call__(self, batch: Batch, dynamics: BaseDynamics) -> None:
        """Write a frame when it is due."""
        if self._file is None:
            self._file = self._opened(batch, dynamics)
        if not self._schedule.due(dynamics):
            return
        values: dict[str, Any] = {"step": dynamics.completed_steps, "time": dynamics.time(batch).cpu().numpy()}
        values |= {key: batch.get(key).detach().cpu().numpy() for key in ("positions", "cell", "energy")}
        if "velocities" in self._file:
            values["velocities"] = batch.velocities.detach().cpu().numpy()
        n_frames = len(self._file["step"])
        for key, value in values.items():
            self._file[key].resize(n_frames + 1, axis=0)
            self._file[key][n_frames] = value
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self, batch: Batch, dynamics: BaseDynamics) -> Any:
        static = _static(batch)
        if dynamics.step_count and self.path.exists():
            file = _open_h5(self.path, "r+")
            if any(not np.array_equal(file[key][()], value) for key, value in static.items()):
                file.close()
                raise InputError(f"{self.path} holds other systems than the batch: give the trajectory another name")
            steps = file["step"][()]
            kept = int((steps <= dynamics.step_count).sum())
            for key in FRAME_KEYS:
                if key in file:
                    file[key].resize(kept, axis=0)
            if kept:
                self._schedule.seen(dynamics, int(steps[kept - 1]))
            return file
        file = h5py.File(self.path, "w")
        file.attrs.update({"format": FORMAT, "version": VERSION})
        for key, value in static.items():
            file.create_dataset(key, data=value)
        shapes: dict[str, tuple[int, ...]] = {"positions": (batch.n_atoms, 3), "cell": (batch.n_systems, 3, 3)}
        shapes |= {"energy": (batch.n_systems,), "time": (batch.n_systems,), "step": ()}
        if "velocities" in batch and dynamics.has_time:
            shapes["velocities"] = (batch.n_atoms, 3)
        for key, shape in shapes.items():
            dtype = "int64" if key == "step" else self.dtype if key in ("positions", "velocities") else "float64"
            data = file.create_dataset(
                key, shape=(0, *shape), maxshape=(None, *shape), chunks=(_chunk(shape), *shape), dtype=dtype
            )
            data.attrs["unit"] = FRAME_KEYS[key]
        return file


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Frames of a batch, as numpy arrays."""

    step: np.ndarray
    """(n_frames,) int64."""
    time: np.ndarray
    """(n_frames, n_systems) fs."""
    positions: np.ndarray
    """(n_frames, n_atoms, 3) Å, all systems one after the other."""
    velocities: np.ndarray | None
    """(n_frames, n_atoms, 3) Å per ASE time unit."""
    cell: np.ndarray
    """(n_frames, n_systems, 3, 3) Å."""
    energy: np.ndarray
    """(n_frames, n_systems) eV."""
    atomic_numbers: np.ndarray
    """(n_atoms,)."""
    masses: np.ndarray
    """(n_atoms,) amu."""
    pbc: np.ndarray
    """(n_systems, 3)."""
    ptr: np.ndarray
    """(n_systems + 1,); the atoms of system i are ptr[i]:ptr[i + 1]."""
    system_id: np.ndarray
    """(n_systems,)."""

    @property
    def n_frames(self) -> int:
        """Number of frames."""
        return len(self.step)

    def structures(self, system: int = 0) -> list[AtomicData]:
        """The frames of one system, with energy and velocities."""
        rows = slice(self.ptr[system], self.ptr[system + 1])
        return [
            AtomicData(
                self.positions[i, rows].astype(np.float64),
                self.atomic_numbers[rows],
                self.cell[i, system] if self.cell[i, system].any() else None,
                self.pbc[system],
                velocities=None if self.velocities is None else self.velocities[i, rows].astype(np.float64),
                masses=self.masses[rows],
                energy=self.energy[i, system] if np.isfinite(self.energy[i, system]) else None,
                info={"step": int(self.step[i]), "time": float(self.time[i, system])},
            )
            for i in range(self.n_frames)
        ]


def read_trajectory(path: str | Path) -> Trajectory:
    """The trajectory that `HDF5Trajectory` wrote."""
    with _open_h5(Path(path), "r") as file:
        get: Callable[[str], np.ndarray] = lambda key: file[key][()]  # noqa: E731
        velocities = get("velocities") if "velocities" in file else None
        keys = [key for key in (*FRAME_KEYS, *STATIC) if key != "velocities"]
        return Trajectory(velocities=velocities, **{key: get(key) for key in keys})


def _open_h5(path: Path, mode: str) -> Any:
    if not path.exists():
        raise InputError(f"{path}: no such file")
    try:
        file = h5py.File(path, mode)
    except OSError as error:
        raise InputError(f"{path} cannot be opened as HDF5: {error}") from None
    if file.attrs.get("format") != FORMAT or int(file.attrs.get("version", 0)) > VERSION:
        found = dict(file.attrs)
        file.close()
        raise InputError(f"{path} is not a trajectory of carryall (version {VERSION} or older): its attributes are {found}")
    return file


def _static(batch: Batch) -> dict[str, np.ndarray]:
    values = {"atomic_numbers": batch.atomic_numbers, "ptr": batch.ptr, "pbc": batch.pbc, "masses": batch.masses}
    return {key: value.cpu().numpy() for key, value in {**values, "system_id": batch.get(SYSTEM_ID)}.items()}


def _chunk(shape: tuple[int, ...]) -> int:
    """Frames of about 256 kB to a chunk."""
    return max(1, min(1024, 262144 // (8 * max(1, int(np.prod(shape, dtype=np.int64))))))
