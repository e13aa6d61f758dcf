"""The HDF5 trajectory as a file: its layout, and what is read from it.

Version 2 is ragged. Each frame has entries, one a system, and each entry has rows, one an atom:
- `step`, `entry_end` (n_frames,): step of the run, ascending; entries up to the end of the frame.
- `system`, `system_step`, `time`, `energy`, `atom_end` (n_entries,), `cell` (n_entries, 3, 3): which of `systems` an entry is
  of; its rows end at `atom_end`.
- `positions` (n_rows, 3), and `velocities` where there are some.
- `systems/system_id`, `systems/atom_end` (n_known,), `systems/pbc` (n_known, 3), `systems/atomic_numbers` and `systems/masses`,
  one row an atom.
- `committed` (1,): how many frames count; rows beyond were being written when the writer was killed, or undone by a restart.

Version 1 has the same systems in every frame: `positions` (n_frames, n_atoms, 3) and so on.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from carryall.data.atomic_data import AtomicData
from carryall.dynamics.sinks.swmr import LIBVER
from carryall.errors import InputError

FORMAT, VERSION = "carryall-trajectory", 2
COMMITTED = "committed"
FRAME_KEYS: dict[str, tuple[str, tuple[int, ...], str]] = {
    "step": ("int64", (), ""),
    "entry_end": ("int64", (), ""),
}
ENTRY_KEYS: dict[str, tuple[str, tuple[int, ...], str]] = {
    "system": ("int64", (), ""),
    "system_step": ("int64", (), ""),
    "time": ("float64", (), "fs"),
    "energy": ("float64", (), "eV"),
    "cell": ("float64", (3, 3), "Å"),
    "atom_end": ("int64", (), ""),
}
ATOM_KEYS = {"positions": "Å", "velocities": "Å sqrt(eV / amu)"}
SYSTEM_KEYS: dict[str, tuple[str, tuple[int, ...], str]] = {
    "system_id": ("int64", (), ""),
    "atom_end": ("int64", (), ""),
    "pbc": ("bool", (3,), ""),
    "atomic_numbers": ("int64", (), ""),
    "masses": ("float64", (), "amu"),
}
"""Data sets with dtype, shape of a row, and unit."""


@dataclass(frozen=True, eq=False)
class SystemTrajectory:
    """The frames of one system, as numpy arrays."""

    system_id: int
    step: np.ndarray
    """(n_frames,) int64, of the run."""
    system_step: np.ndarray
    """(n_frames,) int64, steps that the system had taken in its stage."""
    time: np.ndarray
    """(n_frames,) fs, that it had moved in its stage; NaN where steps are not time."""
    positions: np.ndarray
    """(n_frames, n_atoms, 3) Å."""
    velocities: np.ndarray | None
    """(n_frames, n_atoms, 3) Å per ASE time unit; NaN in frames without."""
    cell: np.ndarray
    """(n_frames, 3, 3) Å; zeros without a cell."""
    energy: np.ndarray
    """(n_frames,) eV."""
    atomic_numbers: np.ndarray
    """(n_atoms,)."""
    masses: np.ndarray
    """(n_atoms,) amu."""
    pbc: np.ndarray
    """(3,) bool."""

    @property
    def n_frames(self) -> int:
        """Number of frames."""
        return len(self.step)

    def structures(self) -> list[AtomicData]:
        """The frames, with energy and velocities."""
        velocities = self.velocities
        moving = np.zeros(self.n_frames, dtype=bool) if velocities is None else np.isfinite(velocities).all((1, 2))
        return [
            AtomicData(
                self.positions[i].astype(np.float64),
                self.atomic_numbers,
                self.cell[i] if self.cell[i].any() else None,
                self.pbc,
                velocities=velocities[i].astype(np.float64) if velocities is not None and moving[i] else None,
                masses=self.masses,
                energy=self.energy[i] if np.isfinite(self.energy[i]) else None,
                info={
                    "step": int(self.step[i]),
                    "system_id": self.system_id,
                    "system_step": int(self.system_step[i]),
                    "time": float(self.time[i]),
                },
            )
            for i in range(self.n_frames)
        ]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What a trajectory file holds, system by system."""

    step: np.ndarray
    """(n_frames,) int64, steps of the run that have a frame."""
    systems: dict[int, SystemTrajectory]
    """By system_id, in the order in which they first appear."""

    @property
    def n_frames(self) -> int:
        """Number of frames."""
        return len(self.step)

    @property
    def system_ids(self) -> list[int]:
        """Systems that have a frame."""
        return list(self.systems)

    def system(self, system_id: int) -> SystemTrajectory:
        """The frames of one system; InputError for one that is not there."""
        if system_id not in self.systems:
            known = ", ".join(map(str, self.system_ids[:10])) + (", ..." if len(self.systems) > 10 else "")
            raise InputError(f"the trajectory has no system {system_id}: it has {known or 'none'}")
        return self.systems[system_id]

    def structures(self, system_id: int) -> list[AtomicData]:
        """The frames of one system, with energy and velocities."""
        return self.system(system_id).structures()


def read_trajectory(path: str | Path, system_ids: Collection[int] | None = None) -> Trajectory:
    """The trajectory that `HDF5Trajectory` wrote, also while it is writing; system_ids: only of these systems.

    Files of version 1 are read too.
    """
    with opened_trajectory(Path(path)) as file:
        return _read_first_version(file, system_ids) if int(file.attrs["version"]) == 1 else _read(file, system_ids)


def opened_trajectory(path: Path) -> Any:
    """The file for reading; InputError when it is none."""
    if not path.exists():
        raise InputError(f"{path}: no such file")
    try:
        # files of version 1 cannot be read while they are written
        with path.open("rb") as raw:
            swmr = raw.read(9)[8:] == b"\3"
        file = h5py.File(path, "r", libver=LIBVER if swmr else None, swmr=swmr)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be opened as HDF5: {error}") from None
    if file.attrs.get("format") != FORMAT or not 1 <= int(file.attrs.get("version", 0)) <= VERSION:
        found = dict(file.attrs)
        file.close()
        raise InputError(f"{path} is not a trajectory of carryall (version {VERSION} or older): its attributes are {found}")
    return file


def _read(file: Any, wanted: Collection[int] | None) -> Trajectory:
    n_frames = int(file[COMMITTED][0])
    frame = {key: file[key][:n_frames] for key in FRAME_KEYS}
    n_entries = int(frame["entry_end"][-1]) if n_frames else 0
    entry = {key: file[key][:n_entries] for key in ENTRY_KEYS}
    step = np.repeat(frame["step"], np.diff(frame["entry_end"], prepend=0))
    known = {key: data[()] for key, data in file["systems"].items()}
    starts, first = np.concatenate([[0], known["atom_end"]]), np.concatenate([[0], entry["atom_end"]])
    rows = {key: file[key] for key in ATOM_KEYS if key in file}
    if wanted is None:
        rows = {key: data[: first[-1]] for key, data in rows.items()}
    found = {}
    order = np.argsort(entry["system"], kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(entry["system"][order])) + 1) if n_entries else []
    for chosen in groups:
        number = int(entry["system"][chosen[0]])
        name, atoms = int(known["system_id"][number]), slice(starts[number], starts[number + 1])
        if wanted is not None and name not in wanted:
            continue
        moving = {key: np.stack([data[first[i] : first[i + 1]] for i in chosen]) for key, data in rows.items()}
        found[name] = SystemTrajectory(
            system_id=name,
            step=step[chosen],
            positions=moving["positions"],
            velocities=moving.get("velocities"),
            pbc=known["pbc"][number],
            **{key: entry[key][chosen] for key in ("system_step", "time", "cell", "energy")},
            **{key: known[key][atoms] for key in ("atomic_numbers", "masses")},
        )
    return Trajectory(np.unique(frame["step"]), found)


def _read_first_version(file: Any, wanted: Collection[int] | None) -> Trajectory:
    step, ptr, time = file["step"][()], file["ptr"][()], file["time"][()]
    found = {}
    for index, name in enumerate(file["system_id"][()].tolist()):
        if wanted is not None and name not in wanted:
            continue
        rows = slice(ptr[index], ptr[index + 1])
        found[name] = SystemTrajectory(
            name,
            step,
            step,
            time[:, index],
            file["positions"][:, rows],
            file["velocities"][:, rows] if "velocities" in file else None,
            file["cell"][:, index],
            file["energy"][:, index],
            file["atomic_numbers"][rows],
            file["masses"][rows],
            file["pbc"][index],
        )
    return Trajectory(step, found)
