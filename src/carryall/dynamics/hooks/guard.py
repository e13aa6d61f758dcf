"""Systems that must not go on, atoms that left the cell, and energy that should not have changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.dynamics.hooks.base import HookStageEnum
from carryall.dynamics.hooks.measures import REPORT_STAGES, Schedule
from carryall.dynamics.status import atom_rows, keep_frozen
from carryall.dynamics.thermo import kinetic_energy, max_force
from carryall.errors import InputError

if TYPE_CHECKING:
    from carryall.dynamics.base import BaseDynamics

REFERENCE_ENERGY = "reference_energy"
"""(n_systems,) eV: total energy that drift is counted from."""


class ForceGuard:
    """Sets a system aside when the force on one of its atoms exceeds `max_force`, eV/Å.

    Energies and forces that are not finite are caught by every dynamics, with or without this hook.
    """

    stages = (HookStageEnum.BEFORE_STEP, HookStageEnum.AFTER_COMPUTE)

    def __init__(self, max_force: float = 100.0, frequency: int = 1) -> None:
        if not max_force > 0:
            raise InputError(f"max_force must be positive, got {max_force}")
        self.max_force, self.frequency = max_force, frequency

    def __call__(self, batch: Batch, dynamics: BaseDynamics) -> None:
        """Look at the forces of running systems."""
        largest = max_force(batch)
        mask = dynamics.running(batch)
        bad = largest > self.max_force if mask is None else (largest > self.max_force) & mask
        for index in bad.nonzero().squeeze(1).tolist():
            dynamics.set_aside(
                batch, index, f"largest force {float(largest[index]):.3g} eV/Å exceeds the limit of {self.max_force:g} eV/Å"
            )


class WrapPositions:
    """Brings atoms back into the cell along periodic axes; energies and forces stay as they are."""

    stage = HookStageEnum.AFTER_STEP

    def __init__(self, frequency: int = 1) -> None:
        self.frequency = frequency

    def __call__(self, batch: Batch, dynamics: BaseDynamics) -> None:
        """Wrap the running systems."""
        current, mask = dynamics.forces_are_current(batch), dynamics.running(batch)
        wrapped = wrapped_positions(batch)
        batch.positions = keep_frozen(None if mask is None else atom_rows(mask, batch), wrapped, batch.positions)
        if current:
            dynamics.mark_forces_current(batch)


def wrapped_positions(batch: Batch) -> Tensor:
    """(n_atoms, 3) positions with fractional coordinates in [0, 1) along periodic axes."""
    # The pseudo-inverse gives the coordinates along the vectors that there are, when some are zero.
    inverse = torch.linalg.pinv(batch.cell)
    fractional = torch.einsum("ni,nij->nj", batch.positions, atom_rows(inverse, batch))
    whole = torch.where(atom_rows(batch.pbc, batch), torch.floor(fractional), 0.0)
    return batch.positions - torch.einsum("ni,nij->nj", whole, atom_rows(batch.cell, batch))


class EnergyDriftMonitor:
    """Total energy against its value when first seen, eV per atom; a system that drifts more than `max_drift` is set aside."""

    stages = REPORT_STAGES
    frequency = 1

    def __init__(self, interval: int = 10, max_drift: float | None = None) -> None:
        if max_drift is not None and not max_drift > 0:
            raise InputError(f"max_drift must be positive, got {max_drift}")
        self._schedule = Schedule(interval, "EnergyDriftMonitor")
        self.max_drift = max_drift
        self.drift: Tensor | None = None
        """(n_systems,) eV per atom, signed, as last seen."""
        self.largest: Tensor | None = None
        """(n_systems,) eV per atom, largest size seen."""

    def __call__(self, batch: Batch, dynamics: BaseDynamics) -> None:
        """Measure the drift when it is due."""
        if not self._schedule.due(dynamics):
            return
        total = batch.energy + kinetic_energy(batch) if "velocities" in batch else batch.energy
        if REFERENCE_ENERGY not in batch:
            batch.set(REFERENCE_ENERGY, total.clone(), level="system")
        atoms = (batch.ptr[1:] - batch.ptr[:-1]).clamp(min=1)
        self.drift = (total - batch.get(REFERENCE_ENERGY)) / atoms
        size = self.drift.abs()
        self.largest = size if self.largest is None or len(self.largest) != len(size) else torch.maximum(size, self.largest)
        if self.max_drift is None:
            return
        mask = dynamics.running(batch)
        bad = size > self.max_drift if mask is None else (size > self.max_drift) & mask
        for index in bad.nonzero().squeeze(1).tolist():
            drift = float(self.drift[index])
            dynamics.set_aside(batch, index, f"total energy drifted by {drift:.3g} eV/atom, limit {self.max_drift:g} eV/atom")
