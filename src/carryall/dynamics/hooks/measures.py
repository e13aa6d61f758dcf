"""What reporters write, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from carryall.data.atomic_data import AtomicData, unchecked
from carryall.data.batch import Batch
from carryall.data.units import GPa, kB
from carryall.dynamics.forces import Snapshot
from carryall.dynamics.hooks.base import HookStageEnum
from carryall.dynamics.status import STATUS, SYSTEM_ID
from carryall.dynamics.thermo import kinetic_energy
from carryall.errors import InputError

if TYPE_CHECKING:
    from carryall.dynamics.base import BaseDynamics
    from carryall.dynamics.engine import Engine

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
    "volume": "Å^3",
    "conserved_energy": "eV",
    "system_step": "",
    "stage": "",
}
"""Measured quantities and their units. step: of the run. time and system_step: of the system, in the stage that it is in."""
WHOLE_NUMBERS = ("step", "system_id", "system_step", "stage")


class Interval:
    """Says yes once for each state of a run that is `interval` steps after the last, counted from step 0."""

    def __init__(self, interval: int, owner: str) -> None:
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise InputError(f"{owner} has interval {interval!r}: expected an integer of at least 1")
        self.interval = interval
        self._last: tuple[Engine, int] | None = None

    def due(self, dynamics: Engine) -> bool:
        """Whether the state after `completed_steps` is to be reported now."""
        done = dynamics.completed_steps
        if done % self.interval:
            return False
        now = (dynamics, done)
        if self._last == now:
            return False
        self._last = now
        return True


class SystemInterval:
    """Says which systems to report: each after 0, `interval`, 2 `interval`, ... steps of its own in its stage, once.

    Steps of a system and of the run go up together, so that systems are looked at only when one of them came, finished or moved
    on to another stage; in other steps the question costs about a microsecond.
    """

    def __init__(self, interval: int, owner: str) -> None:
        self.interval = Interval(interval, owner).interval
        self._looked: tuple[Engine, Snapshot] | None = None
        self._phases: frozenset[int] = frozenset()
        """Steps of the run, modulo the interval, at which some system is due."""
        self._last: tuple[Engine, int, set[int]] | None = None
        """Systems that were reported in the state after a step."""

    def due(self, batch: Batch, dynamics: Engine) -> list[int]:
        """Indices of the systems to report now."""
        done, status, looked = dynamics.completed_steps, batch.get(STATUS), self._looked
        if looked is None or looked[0] is not dynamics or not looked[1].holds(status):
            running = reported_systems(batch, dynamics)
            steps = own_steps(batch, dynamics).tolist()
            self._phases = frozenset((done - steps[index]) % self.interval for index in running)
            # systems that have just entered are not running yet, and do not take part in their first step
            self._looked = (dynamics, Snapshot.of(status)) if dynamics.host.roster.unprimed is None else None
        return self._chosen(batch, dynamics, done) if done % self.interval in self._phases else []

    def _chosen(self, batch: Batch, dynamics: Engine, done: int) -> list[int]:
        steps, names = own_steps(batch, dynamics).tolist(), batch.get(SYSTEM_ID).tolist()
        told: set[int] = set()
        if self._last is not None and self._last[0] is dynamics and self._last[1] == done:
            told = self._last[2]
        found = [
            index
            for index in reported_systems(batch, dynamics)
            if steps[index] % self.interval == 0 and names[index] not in told
        ]
        self._last = (dynamics, done, told | {names[index] for index in found})
        return found

    def seen(self, dynamics: Engine, names: Iterable[int]) -> None:
        """Take systems as reported in the state that a run was restored to: what a resumed file holds already."""
        self._last = (dynamics, dynamics.step_count, set(names))


def continues(path: Path, dynamics: Engine, began: bool) -> bool:
    """Whether a file is gone on with: by the hook that began it, or by a dynamics that was restored from a checkpoint."""
    return path.exists() and (began or dynamics.step_count > 0)


def by_part(batch: Batch, dynamics: Engine, value: Callable[[BaseDynamics], Tensor]) -> Tensor:
    """(n_systems,) what `value(part)` says of each system, `part` the stage that moves it; 0 for those that are done."""
    if len(dynamics.parts) == 1:
        return value(dynamics.parts[0])
    found: Tensor | None = None
    for part, mask in zip(dynamics.parts, dynamics.part_masks(batch.get(STATUS)), strict=True):
        own = value(part)
        found = torch.where(mask, own, torch.zeros_like(own) if found is None else found)
    assert found is not None
    return found


def own_steps(batch: Batch, dynamics: Engine) -> Tensor:
    """(n_systems,) int64 steps that each system has taken in its stage."""
    return by_part(batch, dynamics, lambda part: part.steps(batch))


def measured(batch: Batch, dynamics: Engine) -> dict[str, np.ndarray]:
    """`COLUMNS`, each (n_systems,). Motion that is not in time, as of optimizers, has no kinetic energy."""
    potential = batch.energy.double()
    zeros, all_kinetic = torch.zeros_like(potential), kinetic_energy(batch) if "velocities" in batch else None

    def kinetic_of(part: BaseDynamics) -> Tensor:
        return all_kinetic if all_kinetic is not None and part.has_time else zeros

    def temperature_of(part: BaseDynamics) -> Tensor:
        return 2.0 * kinetic_of(part) / (kB * part.degrees_of_freedom(batch)) if part.has_time else zeros

    def conserved_of(part: BaseDynamics) -> Tensor:
        return part.conserved_energy(batch).double() if part.has_time else zeros + torch.nan

    kinetic, volume = by_part(batch, dynamics, kinetic_of), batch.volume.double()
    trace = batch.get("virial").double().diagonal(dim1=1, dim2=2).sum(1) if "virial" in batch else zeros + torch.nan
    values = {
        "step": torch.full_like(batch.get(SYSTEM_ID), dynamics.completed_steps),
        "system_id": batch.get(SYSTEM_ID),
        "time": by_part(batch, dynamics, lambda part: part.time(batch)),
        "temperature": by_part(batch, dynamics, temperature_of),
        "potential_energy": potential,
        "kinetic_energy": kinetic,
        "total_energy": potential + kinetic,
        "pressure": torch.where(volume > 0, (2.0 * kinetic + trace) / (3.0 * volume) / GPa, torch.nan),
        "volume": torch.where(volume > 0, volume, torch.nan),
        "conserved_energy": by_part(batch, dynamics, conserved_of),
        "system_step": own_steps(batch, dynamics),
        "stage": batch.get(STATUS),
    }
    return {name: value.cpu().numpy() for name, value in values.items()}


def reported_systems(batch: Batch, dynamics: Engine) -> list[int]:
    """Systems that move now: a frozen one has said all, one that has just entered has no forces yet."""
    mask = dynamics.running(batch)
    return list(range(batch.n_systems)) if mask is None else mask.nonzero().squeeze(1).tolist()


def frames(batch: Batch, dynamics: Engine, systems: Iterable[int]) -> list[AtomicData]:
    """Systems as they are now, in the batch's memory; step, system_id, system_step and time (fs) in `info`.

    Velocities and time are there where a system moves in time.
    """
    names, has_cell = batch.get(SYSTEM_ID).tolist(), batch.cell.flatten(1).any(1).tolist()
    steps, ptr = own_steps(batch, dynamics).tolist(), batch.ptr.tolist()
    time = by_part(batch, dynamics, lambda part: part.time(batch)).tolist()
    moving = "velocities" in batch and any(part.has_time for part in dynamics.parts)
    atom = {key: batch.get(key).detach().cpu() for key in ("positions", "atomic_numbers", "forces", "masses")}
    atom |= {"velocities": batch.velocities.detach().cpu()} if moving else {}
    system = {key: batch.get(key).detach().cpu() for key in ("pbc", "energy", "cell", "stress") if key in batch}
    found = []
    for index in systems:
        rows = slice(ptr[index], ptr[index + 1])
        in_time = time[index] == time[index]
        values = {key: value[rows] for key, value in atom.items() if in_time or key != "velocities"}
        values |= {key: value[index] for key, value in system.items() if has_cell[index] or key in ("pbc", "energy")}
        info = {"step": dynamics.completed_steps, "system_id": names[index], "system_step": steps[index]}
        found.append(unchecked(values, {}, info | ({"time": time[index]} if in_time else {})))
    return found
