"""Systems that must not go on: forces that are too large, energy that should not have changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.sharing import system_sizes
from carryall.dynamics.forces import Snapshot
from carryall.dynamics.hooks.base import HookStageEnum
from carryall.dynamics.hooks.measures import REPORT_STAGES, SystemInterval
from carryall.dynamics.status import STATUS, keep_frozen
from carryall.dynamics.thermo import max_force
from carryall.errors import InputError

if TYPE_CHECKING:
    from carryall.dynamics.base import BaseDynamics
    from carryall.dynamics.engine import Engine


class ForceGuard:
    """Sets a system aside when the force on one of its atoms exceeds `max_force`, eV/Å.

    Energies and forces that are not finite are caught by every dynamics, with or without this hook.
    """

    stages = (HookStageEnum.BEFORE_STEP, HookStageEnum.AFTER_COMPUTE)

    def __init__(self, max_force: float = 100.0, frequency: int = 1) -> None:
        if not max_force > 0:
            raise InputError(f"max_force must be positive, got {max_force}")
        self.max_force, self.frequency = max_force, frequency
        self._seen: tuple[Engine, Snapshot] | None = None

    def __call__(self, batch: Batch, dynamics: Engine) -> None:
        """Look at the forces of running systems, unless they are those that were looked at last."""
        now = (batch.forces, batch.get(STATUS))
        if self._seen is not None and self._seen[0] is dynamics and self._seen[1].holds(*now):
            return
        # systems that have just entered are not running yet: they are looked at before their first step
        self._seen = (dynamics, Snapshot.of(*now)) if dynamics.host.roster.unprimed is None else None
        largest = max_force(batch)
        bad = _within(largest > self.max_force, dynamics.running(batch))
        for index in bad.nonzero().squeeze(1).tolist():
            dynamics.set_aside(
                batch, index, f"largest force {float(largest[index]):.3g} eV/Å exceeds the limit of {self.max_force:g} eV/Å"
            )


class EnergyDriftMonitor:
    """What a dynamics should conserve, against its value when a system began, in eV per atom.

    That is the total energy in NVE, and what `conserved_energy` says elsewhere. A system that drifts by more than `max_drift`
    is set aside. The numbers are keys of the batch that go with a system to wherever it goes, `drift` and `largest_drift` after
    the prefix of the dynamics (`nve_drift`); a system that enters a stage anew begins anew.
    """

    stages = REPORT_STAGES
    frequency = 1

    def __init__(self, interval: int = 10, max_drift: float | None = None) -> None:
        if max_drift is not None and not max_drift > 0:
            raise InputError(f"max_drift must be positive, got {max_drift}")
        self._interval = SystemInterval(interval, "EnergyDriftMonitor")
        self.max_drift = max_drift
        self.drift: Tensor | None = None
        """(n_systems,) eV per atom, signed, of the batch as last seen; NaN for systems that were never seen."""
        self.largest: Tensor | None = None
        """(n_systems,) eV per atom, largest size seen."""

    def __call__(self, batch: Batch, dynamics: Engine) -> None:
        """Measure the drift when it is due."""
        systems = self._interval.due(batch, dynamics)
        if systems:
            chosen = torch.zeros(batch.n_systems, dtype=torch.bool, device=batch.device)
            chosen[systems] = True
            for part in dynamics.parts:
                self._measure(batch, part, dynamics, _within(chosen, part.running(batch)))

    def _measure(self, batch: Batch, part: BaseDynamics, dynamics: Engine, mask: Tensor) -> None:
        reference, seen, drift, largest = (
            part.key(name) for name in ("reference_energy", "reference_step", "drift", "largest_drift")
        )
        for key in (reference, seen, drift, largest):
            if key not in batch:
                batch.set(
                    key, torch.full((batch.n_systems,), torch.nan, dtype=torch.float64, device=batch.device), level="system"
                )
        energy, steps = part.conserved_energy(batch).double(), part.steps(batch).double()
        # fewer steps than when last seen: the system has begun again
        begins = batch.get(reference).isnan() | ~(steps >= batch.get(seen))
        batch.set(reference, keep_frozen(mask, torch.where(begins, energy, batch.get(reference)), batch.get(reference)))
        batch.set(seen, keep_frozen(mask, steps, batch.get(seen)))
        atoms = system_sizes(batch).clamp(min=1)
        away = (energy - batch.get(reference)) / atoms
        worst = torch.where(begins, away.abs(), torch.maximum(away.abs(), batch.get(largest)))
        batch.set(drift, keep_frozen(mask, away, batch.get(drift)))
        batch.set(largest, keep_frozen(mask, worst, batch.get(largest)))
        self.drift, self.largest = batch.get(drift), batch.get(largest)
        if self.max_drift is None:
            return
        bad = _within(self.drift.abs() > self.max_drift, mask)
        for index in bad.nonzero().squeeze(1).tolist():
            size = float(self.drift[index])
            dynamics.set_aside(batch, index, f"total energy drifted by {size:.3g} eV/atom, limit {self.max_drift:g} eV/atom")


def _within(found: Tensor, mask: Tensor | None) -> Tensor:
    return found if mask is None else found & mask
