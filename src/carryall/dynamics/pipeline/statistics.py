"""What a stage makes of each system, measured while it works; the numbers travel with the system and survive a kill."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.sharing import system_sizes, system_sums
from carryall.data.units import GPa, kB
from carryall.dynamics.hooks.base import HookStageEnum
from carryall.dynamics.status import keep_frozen
from carryall.dynamics.thermo import kinetic_energy
from carryall.errors import InputError

if TYPE_CHECKING:
    from carryall.dynamics.base import BaseDynamics

START, SAMPLES, MEAN, SCATTER = "stage_start", "stage_samples", "stage_mean", "stage_scatter"
"""Keys of the batch: positions when a system came into its stage; number, mean and summed squares (about it) of the samples."""
SAMPLED = {"temperature": "K", "potential_energy": "eV", "pressure": "GPa"}


class StageStatistics:
    """Notes in `batch.info`, when a system leaves its stage: `NAME_energy` (eV), `NAME_volume` (Å^3), `NAME_displacement` (Å).

    The displacement is the root of the mean square over the atoms, from where they came into the stage, without wrapping. With
    an `interval` also `NAME_temperature_mean` (K), `NAME_temperature_std`, and so on for potential_energy (eV) and pressure
    (GPa), of samples every `interval` steps of the system; pressure only where the potential gives a virial.

    The accumulators are keys of the batch, changed by operations on each system alone, so that the numbers are bit for bit the
    same whatever batch and rank a system was in. Give `start` to the dynamics as `init_fn`, or call it there.
    """

    stages = (HookStageEnum.AFTER_STEP, HookStageEnum.ON_CONVERGE)
    frequency = 1

    def __init__(self, name: str, interval: int | None = None) -> None:
        """name: of the stage; interval: steps between samples, None where steps are not time."""
        if interval is not None and (isinstance(interval, bool) or not isinstance(interval, int) or interval < 1):
            raise InputError(f"StageStatistics has interval {interval!r}: expected an integer of at least 1")
        self.name, self.interval = name, interval

    def start(self, batch: Batch) -> None:
        """Systems come into the stage."""
        batch.set(START, batch.positions.detach().double().clone(), level="atom")
        if self.interval is None:
            return
        zeros = torch.zeros(batch.n_systems, len(SAMPLED), dtype=torch.float64, device=batch.device)
        batch.set(SAMPLES, torch.zeros(batch.n_systems, dtype=torch.int64, device=batch.device), level="system")
        batch.set(MEAN, zeros, level="system")
        batch.set(SCATTER, zeros.clone(), level="system")

    def __call__(self, batch: Batch, dynamics: BaseDynamics) -> None:
        """Take samples that are due; note what systems that leave have become."""
        if dynamics.current_hook_stage is HookStageEnum.ON_CONVERGE:
            self._note(batch, dynamics)
        elif self.interval is not None:
            self._sample(batch, dynamics, self.interval)

    def _sample(self, batch: Batch, dynamics: BaseDynamics, interval: int) -> None:
        # the count of samples says which step is next: a system that re-enters between two steps is not sampled twice
        due = dynamics.steps(batch) == (batch.get(SAMPLES) + 1) * interval
        running = dynamics.running(batch)
        due = due if running is None else due & running
        if not bool(due.any()):
            return
        values = self._measured(batch, dynamics)
        count = batch.get(SAMPLES) + due
        away = values - batch.get(MEAN)
        mean = batch.get(MEAN) + away / count.clamp(min=1)[:, None]
        scatter = batch.get(SCATTER) + away * (values - mean)
        batch.set(SAMPLES, count)
        batch.set(SCATTER, keep_frozen(due, scatter, batch.get(SCATTER)))
        batch.set(MEAN, keep_frozen(due, mean, batch.get(MEAN)))

    def _measured(self, batch: Batch, dynamics: BaseDynamics) -> Tensor:
        """(n_systems, 3) the quantities of SAMPLED."""
        kinetic, volume = kinetic_energy(batch), batch.volume.double()
        heat = 2.0 * kinetic / (kB * dynamics.degrees_of_freedom(batch))
        pressure = torch.full_like(heat, torch.nan)
        if "virial" in batch:
            trace = batch.get("virial").double().diagonal(dim1=1, dim2=2).sum(1)
            pressure = torch.where(volume > 0, (2.0 * kinetic + trace) / (3.0 * volume) / GPa, torch.nan)
        return torch.stack([heat, batch.energy.double(), pressure], 1)

    def _note(self, batch: Batch, dynamics: BaseDynamics) -> None:
        rows = dynamics.newly_converged
        assert rows is not None
        moved = (batch.positions.double() - batch.get(START)).square()
        squares = system_sums(batch, moved[:, 0] + moved[:, 1] + moved[:, 2]) / system_sizes(batch).double()
        found = {
            "energy": batch.energy.double(),
            "volume": torch.where(batch.volume > 0, batch.volume.double(), torch.nan),
            "displacement": squares.sqrt(),
        }
        if self.interval is not None:
            taken = batch.get(SAMPLES)
            mean = torch.where((taken > 0)[:, None], batch.get(MEAN), torch.nan)
            spread = (batch.get(SCATTER) / taken.clamp(min=1)[:, None]).clamp(min=0.0).sqrt()
            for column, quantity in enumerate(SAMPLED):
                found[f"{quantity}_mean"] = mean[:, column]
                found[f"{quantity}_std"] = torch.where(taken > 0, spread[:, column], torch.nan)
        values = {name: value.tolist() for name, value in found.items()}
        for row in rows.tolist():
            batch.info[row] |= {f"{self.name}_{name}": value[row] for name, value in values.items() if value[row] == value[row]}
