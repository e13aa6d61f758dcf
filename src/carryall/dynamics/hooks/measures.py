"""What reporters write, and when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from carryall.data.atomic_data import AtomicData, unchecked
from carryall.data.batch import Batch
from carryall.dynamics.hooks.base import HookStageEnum
from carryall.dynamics.status import SYSTEM_ID
from carryall.dynamics.thermo import kinetic_energy, pressure, temperature
from carryall.errors import InputError

if TYPE_CHECKING:
    from carryall.dynamics.base import BaseDynamics

REPORT_STAGES = (HookStageEnum.BEFORE_STEP, HookStageEnum.AFTER_STEP)
"""Before the first step for the state at the start, after each step for the state that it led to."""

COLUMNS = {
    "step": "",
    "system_id": "",
    "time": "fs",
    "temperature": "K",
    "potential_energy": "eV",
    "kinetic_energy": "eV",
    "total_energy": "eV",
    "pressure": "GPa",
}
"""Measured quantities and their units."""


class Schedule:
    """Says yes once for each state that is `interval` steps after the last, counted from step 0."""

    def __init__(self, interval: int, owner: str) -> None:
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise InputError(f"{owner} has interval {interval!r}: expected an integer of at least 1")
        self.interval = interval
        self._last: tuple[BaseDynamics, int] | None = None

    def due(self, dynamics: BaseDynamics) -> bool:
        """Whether the state after `completed_steps` is to be reported now."""
        now = (dynamics, dynamics.completed_steps)
        if dynamics.completed_steps % self.interval or self._last == now:
            return False
        self._last = now
        return True

    def seen(self, dynamics: BaseDynamics, step: int) -> None:
        """Take the state after `step` as reported: what a resumed file holds already."""
        self._last = (dynamics, step)


def measured(batch: Batch, dynamics: BaseDynamics) -> dict[str, np.ndarray]:
    """`COLUMNS`, each (n_systems,)."""
    moving = "velocities" in batch and dynamics.has_time
    potential = batch.energy.double()
    kinetic = kinetic_energy(batch) if moving else potential.new_zeros(batch.n_systems)
    heat = temperature(batch, dynamics.removed_degrees) if moving else kinetic
    values = {
        "system_id": batch.get(SYSTEM_ID),
        "time": dynamics.time(batch),
        "temperature": heat,
        "potential_energy": potential,
        "kinetic_energy": kinetic,
        "total_energy": potential + kinetic,
        "pressure": pressure(batch),
    }
    step = np.full(batch.n_systems, dynamics.completed_steps)
    return {"step": step, **{name: value.cpu().numpy() for name, value in values.items()}}


def reported_systems(batch: Batch, dynamics: BaseDynamics) -> list[int]:
    """Systems that are still running: a frozen one has said all."""
    mask = dynamics.running(batch)
    return list(range(batch.n_systems)) if mask is None else mask.nonzero().squeeze(1).tolist()


def frames(batch: Batch, dynamics: BaseDynamics) -> list[AtomicData]:
    """The running systems as they are now, with step, time (fs) and system_id in `info`."""
    ptr, time = batch.ptr.tolist(), dynamics.time(batch).tolist()
    names, has_cell = batch.get(SYSTEM_ID).tolist(), batch.cell.flatten(1).any(1).tolist()
    found = []
    for index in reported_systems(batch, dynamics):
        rows = slice(ptr[index], ptr[index + 1])
        atom_keys = ["positions", "atomic_numbers", "forces", *(["velocities"] if dynamics.has_time else [])]
        values = {key: batch.get(key)[rows].detach().cpu() for key in (*atom_keys, "masses")}
        values |= {key: batch.get(key)[index].detach().cpu() for key in ("pbc", "energy")}
        if has_cell[index]:
            values |= {key: batch.get(key)[index].detach().cpu() for key in ("cell", "stress") if key in batch}
        info = {"step": dynamics.completed_steps, "system_id": names[index]}
        found.append(unchecked(values, {}, info | ({"time": time[index]} if dynamics.has_time else {})))
    return found
