"""Constant energy: velocity Verlet."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.sharing import system_sums
from carryall.data.units import fs
from carryall.dynamics.base import BaseDynamics, DynamicsOptions
from carryall.dynamics.parameters import Parameter, PerSystem
from carryall.dynamics.status import atom_rows, keep_frozen
from carryall.graph.potential import Potential


def kicked(velocities: Tensor, forces: Tensor, masses: Tensor, time: Tensor) -> Tensor:
    """v + F t / m: velocities and forces (n_atoms, 3), masses and time (n_atoms,)."""
    return velocities + forces * (time / masses)[:, None]


def drifted(positions: Tensor, velocities: Tensor, time: Tensor) -> Tensor:
    """r + v t, time (n_atoms,)."""
    return positions + velocities * time[:, None]


class NVE(BaseDynamics):
    """Velocity Verlet (Swope et al., J. Chem. Phys. 76, 637 (1982)): half kick, drift, forces, half kick.

    timestep: fs, one or one for each system. Velocities start at rest unless the batch has them (`initialize_velocities`).
    `conserved_energy` is the kinetic and potential energy.
    """

    __provides_keys__: ClassVar[frozenset[str]] = frozenset({"positions", "velocities"})
    prefix = "nve"
    has_time = True
    removed_degrees = 3

    def __init__(self, model: Potential, timestep: PerSystem = 1.0, **options: Unpack[DynamicsOptions]) -> None:
        super().__init__(model, **options)
        self._timestep = Parameter.of("timestep", timestep, fs, positive=True)

    def prepare(self, batch: Batch) -> None:
        """Also gives atoms without velocities zero ones."""
        super().prepare(batch)
        ensure_velocities(batch)

    def state_defaults(self, batch: Batch) -> dict[str, Tensor]:
        """dt, in Å sqrt(amu / eV)."""
        return {"dt": self._timestep.at(batch)}

    def pre_update(self, batch: Batch, mask: Tensor | None = None) -> None:
        """Half kick, then drift."""
        kick_and_drift(batch, atom_rows(batch.get(self.key("dt")), batch), mask)

    def post_update(self, batch: Batch, mask: Tensor | None = None) -> None:
        """Half kick with the new forces."""
        half_kick(batch, 0.5 * atom_rows(batch.get(self.key("dt")), batch), mask)

    def describe(self) -> dict[str, Any]:
        """timestep, fs."""
        return {"timestep": self._timestep.shown()}


def kick_and_drift(batch: Batch, time: Tensor, mask: Tensor | None) -> None:
    """Kick the batch's velocities for half of `time` (n_atoms,), then move its atoms for all of it, where `mask` is true."""
    atoms = None if mask is None else atom_rows(mask, batch)
    velocities = kicked(batch.velocities, batch.forces, batch.masses, 0.5 * time)
    positions = drifted(batch.positions, velocities, time)
    batch.velocities = keep_frozen(atoms, velocities, batch.velocities)
    batch.positions = keep_frozen(atoms, positions, batch.positions)


def half_kick(batch: Batch, time: Tensor, mask: Tensor | None) -> None:
    """Kick the batch's velocities for `time` (n_atoms,) where `mask` (n_systems,) is true."""
    velocities = kicked(batch.velocities, batch.forces, batch.masses, time)
    batch.velocities = keep_frozen(None if mask is None else atom_rows(mask, batch), velocities, batch.velocities)


def ensure_velocities(batch: Batch) -> None:
    """Zero velocities where the batch has none."""
    if "velocities" not in batch:
        batch.velocities = torch.zeros_like(batch.positions)


def at_rest(batch: Batch) -> list[bool]:
    """For each system whether no atom of it has a velocity."""
    if "velocities" not in batch:
        return [True] * batch.n_systems
    moving = (batch.velocities != 0).any(1).long()
    return (system_sums(batch, moving) == 0).tolist()
