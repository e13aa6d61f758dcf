"""Trajectories in one HDF5 file, ragged: systems may come and go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from carryall.data.batch import Batch
from carryall.dynamics.hooks.measures import REPORT_STAGES, SystemInterval, by_part, continues, own_steps
from carryall.dynamics.hooks.trajectory_file import (
    ATOM_KEYS,
    COMMITTED,
    ENTRY_KEYS,
    FORMAT,
    FRAME_KEYS,
    SYSTEM_KEYS,
    VERSION,
    opened_trajectory,
)
from carryall.dynamics.sinks.swmr import changed_in_copy, opened_for_writing
from carryall.dynamics.sinks.tables import write_rows
from carryall.dynamics.status import SYSTEM_ID
from carryall.errors import InputError

if TYPE_CHECKING:
    from carryall.dynamics.engine import Engine

CHUNK_BYTES = 65536


class HDF5Trajectory:
    """Positions, velocities, cell and energy of the running systems, each every `interval` of its steps; see `read_trajectory`.

    Systems may come and go; what does not change of a system is written once. The writer may be killed at any moment: frames
    that were written can be read, and gone on with. Begun anew or gone on with as `CSVLog` is. dtype: of positions, velocities.
    """

    stages = REPORT_STAGES
    frequency = 1

    def __init__(self, path: str | Path, interval: int = 10, dtype: str = "float64") -> None:
        if dtype not in ("float32", "float64"):
            raise InputError(f"dtype of a trajectory must be float32 or float64, got {dtype!r}")
        self.path, self.dtype = Path(path), dtype
        self._interval = SystemInterval(interval, "HDF5Trajectory")
        self._writer: _Writer | None = None
        self._began = False

    def __call__(self, batch: Batch, dynamics: Engine) -> None:
        """Write a frame when it is due."""
        if self._writer is None:
            self._writer = self._opened(batch, dynamics)
        systems = self._interval.due(batch, dynamics)
        if systems:
            self._writer.add(batch, dynamics, systems)

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _opened(self, batch: Batch, dynamics: Engine) -> _Writer:
        began, self._began = self._began, True
        if not continues(self.path, dynamics, began):
            moving = "velocities" in batch and any(part.has_time for part in dynamics.parts)
            changed_in_copy(self.path, lambda file: _begin(file, self.dtype, moving), empty=True)
            return _Writer(self.path, None)
        with opened_trajectory(self.path) as file:
            if int(file.attrs["version"]) != VERSION:
                raise InputError(
                    f"{self.path} is a trajectory of an older version, which is not gone on with: give another name"
                )
        writer = _Writer(self.path, None if began else dynamics.step_count)
        if not began:
            self._interval.seen(dynamics, writer.told(dynamics.step_count))
        return writer


class _Writer:
    """An open file, and how many of its rows count."""

    def __init__(self, path: Path, last: int | None) -> None:
        """last: step after which frames are undone; None for none."""
        self.path = path
        self._file = opened_for_writing(path)
        self._known: dict[int, tuple[int, bytes]] = {}
        steps = self._file["step"][: int(self._file[COMMITTED][0])]
        self.n_frames = len(steps) if last is None else int(np.searchsorted(steps, last, side="right"))
        self._steps = steps[: self.n_frames]
        self.n_entries = int(self._file["entry_end"][self.n_frames - 1]) if self.n_frames else 0
        self.n_rows = int(self._file["atom_end"][self.n_entries - 1]) if self.n_entries else 0
        self._read_known()
        self._commit()

    def add(self, batch: Batch, dynamics: Engine, systems: list[int]) -> None:
        """Write a frame with these systems of the batch."""
        counts = np.array(batch.atom_counts)
        numbers = self._numbers(batch, systems)
        ptr = batch.ptr.cpu().numpy()
        rows = np.concatenate([np.arange(ptr[index], ptr[index + 1]) for index in systems])
        time = by_part(batch, dynamics, lambda part: part.time(batch))
        entries = {
            "system": np.array(numbers),
            "system_step": own_steps(batch, dynamics).cpu().numpy()[systems],
            "time": time.cpu().numpy()[systems],
            **{key: batch.get(key).detach().cpu().numpy()[systems] for key in ("energy", "cell")},
            "atom_end": self.n_rows + np.cumsum(counts[systems]),
        }
        for key, value in entries.items():
            write_rows(self._file[key], self.n_entries, value)
        write_rows(self._file["positions"], self.n_rows, batch.positions.detach().cpu().numpy()[rows])
        if "velocities" in self._file:
            moving = np.repeat(~np.isnan(entries["time"]), counts[systems])[:, None]
            write_rows(self._file["velocities"], self.n_rows, np.where(moving, _velocities(batch)[rows], np.nan))
        self.n_entries, self.n_rows = self.n_entries + len(systems), self.n_rows + len(rows)
        write_rows(self._file["step"], self.n_frames, np.array([dynamics.completed_steps]))
        write_rows(self._file["entry_end"], self.n_frames, np.array([self.n_entries]))
        self.n_frames += 1
        self._commit()

    def told(self, step: int) -> list[int]:
        """Systems that had a frame of a step when the file was opened."""
        first, last = (int(np.searchsorted(self._steps, step, side)) for side in ("left", "right"))
        ends = [0, *self._file["entry_end"][: self.n_frames].tolist()]
        names = {number: name for name, (number, _) in self._known.items()}
        return [names[number] for number in self._file["system"][ends[first] : ends[last]].tolist()]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _commit(self) -> None:
        # what counts is written before it counts
        self._file.flush()
        self._file[COMMITTED][0] = self.n_frames
        self._file.flush()

    def _read_known(self) -> None:
        """The systems that frames which count are of."""
        used = self._file["system"][: self.n_entries]
        count = int(used.max()) + 1 if len(used) else 0
        group = {key: data[()] for key, data in self._file["systems"].items()}
        ends = [0, *group["atom_end"][:count].tolist()]
        for number in range(count):
            rows = slice(ends[number], ends[number + 1])
            facts = _facts(group["pbc"][number], group["atomic_numbers"][rows], group["masses"][rows])
            self._known[int(group["system_id"][number])] = (number, facts)
        self._n_atoms_known = ends[-1]

    def _numbers(self, batch: Batch, systems: list[int]) -> list[int]:
        """Where the systems are in the table of systems, new ones added; InputError for another system of a known name."""
        names, ptr = batch.get(SYSTEM_ID).tolist(), batch.ptr.tolist()
        pbc, numbers, masses = (batch.get(key).detach().cpu().numpy() for key in ("pbc", "atomic_numbers", "masses"))
        found = []
        for index in systems:
            rows = slice(ptr[index], ptr[index + 1])
            facts = _facts(pbc[index], numbers[rows], masses[rows])
            if names[index] not in self._known:
                self._add_system(names[index], facts, pbc[index], numbers[rows], masses[rows])
            number, known = self._known[names[index]]
            if known != facts:
                raise InputError(
                    f"{self.path} holds another system as number {names[index]}: give the trajectory another name, "
                    "or the systems other ids"
                )
            found.append(number)
        return found

    def _add_system(self, name: int, facts: bytes, pbc: np.ndarray, numbers: np.ndarray, masses: np.ndarray) -> None:
        group, number = self._file["systems"], len(self._known)
        write_rows(group["atomic_numbers"], self._n_atoms_known, numbers)
        write_rows(group["masses"], self._n_atoms_known, masses)
        self._n_atoms_known += len(numbers)
        for key, value in {"system_id": name, "atom_end": self._n_atoms_known, "pbc": pbc}.items():
            write_rows(group[key], number, np.array(value)[None])
        self._known[name] = (number, facts)


def _begin(file: Any, dtype: str, moving: bool) -> None:
    file.attrs.update({"format": FORMAT, "version": VERSION})
    file.create_dataset(COMMITTED, data=np.zeros(1, dtype=np.int64))
    atoms = {key: (dtype, (3,), unit) for key, unit in ATOM_KEYS.items() if moving or key != "velocities"}
    for group, keys in ((file, FRAME_KEYS | ENTRY_KEYS | atoms), (file.create_group("systems"), SYSTEM_KEYS)):
        for key, (kind, row, unit) in keys.items():
            length = max(1, CHUNK_BYTES // (np.dtype(kind).itemsize * int(np.prod(row, dtype=np.int64))))
            data = group.create_dataset(key, shape=(0, *row), maxshape=(None, *row), chunks=(length, *row), dtype=kind)
            data.attrs["unit"] = unit


def _facts(pbc: np.ndarray, numbers: np.ndarray, masses: np.ndarray) -> bytes:
    """What makes a system another one."""
    return pbc.tobytes() + numbers.astype(np.int64).tobytes() + masses.astype(np.float64).tobytes()


def _velocities(batch: Batch) -> np.ndarray:
    if "velocities" not in batch:
        return np.full((batch.n_atoms, 3), np.nan)
    return batch.velocities.detach().cpu().numpy()
