"""Molecular dynamics of one structure or many, in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from carryall.data.atomic_data import AtomicData
from carryall.data.batch import Batch
from carryall.dynamics.base import BaseDynamics
from carryall.dynamics.hooks.base import HookStageEnum
from carryall.dynamics.hooks.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from carryall.dynamics.hooks.console import LogTable, ProgressBar
from carryall.dynamics.hooks.csv_log import CSVLog
from carryall.dynamics.hooks.guard import ForceGuard
from carryall.dynamics.hooks.trajectory import trajectory_writer
from carryall.dynamics.integrators.langevin import NVTLangevin
from carryall.dynamics.integrators.nve import NVE
from carryall.dynamics.parameters import Parameter, PerSystem, Ramp, Setting
from carryall.dynamics.relax import OUTCOMES
from carryall.dynamics.status import OUTCOME, REASON, Outcome, atom_rows
from carryall.dynamics.structures import (
    Input,
    Structures,
    check_errors_argument,
    check_inputs,
    checked_input,
    finished_structure,
    structure_list,
    working_batch,
)
from carryall.dynamics.thermo import kinetic_energy
from carryall.dynamics.thermo import temperature as temperature_of
from carryall.dynamics.velocities import initialize_velocities
from carryall.errors import InputError, nearest
from carryall.graph.potential import Potential
from carryall.interrupt import stop_between_steps

ENSEMBLES = ("nve", "nvt")


@dataclass(frozen=True, eq=False)
class MDSystem:
    """What became of one system."""

    index: int
    """Place of the structure in the input."""
    outcome: str
    """"step_budget" (it took all its steps) or "failed"."""
    reason: str | None
    """Why it failed."""
    steps: int
    """Steps taken, those before a restart too."""
    time: float
    """fs."""
    potential_energy: float | None
    """eV, at the end; None when the system failed."""
    kinetic_energy: float | None
    """eV, at the end; None when the system failed."""
    temperature: float | None
    """K, at the end; by 3 N - 3 degrees of freedom for "nve", 3 N for "nvt"."""
    structure: AtomicData | None
    """The structure with its last positions, velocities, energy and forces."""


@dataclass(frozen=True, eq=False)
class MDResult:
    """What became of a run."""

    systems: list[MDSystem]
    """In input order."""
    ensemble: str
    steps: int
    """Steps of the run, those before a restart too."""
    log: Path | None
    trajectory: Path | None
    checkpoint: Path | None

    @property
    def structures(self) -> list[AtomicData | None]:
        """Last structure of each system, in input order."""
        return [one.structure for one in self.systems]


def md(
    structures: Structures,
    potential: Potential,
    ensemble: str = "nvt",
    temperature: Setting = 300.0,
    timestep: PerSystem = 1.0,
    n_steps: int = 1000,
    *,
    friction: PerSystem = 1.0,
    seed: int = 0,
    log: str | Path | None = None,
    log_interval: int = 10,
    trajectory: str | Path | None = None,
    trajectory_interval: int = 10,
    checkpoint: str | Path | None = None,
    checkpoint_interval: int = 1000,
    resume: bool = False,
    max_force: float = 1000.0,
    errors: str = "raise",
    progress: bool = True,
    hooks: Iterable[Any] = (),
    skin: float = 0.5,
) -> MDResult:
    """Molecular dynamics of all structures in one batch.

    ensemble: "nvt" (Langevin) or "nve". temperature: K, of the thermostat, and of the initial velocities of structures that
    have none. timestep: fs. friction: 1/ps. These three are one number or one for each structure. seed: of velocities and
    noise. log: CSV file. trajectory: .h5, .hdf5, .extxyz or .xyz. checkpoint: file, written every `checkpoint_interval` steps
    and at the end. resume: go on from the checkpoint, if there is one, up to `n_steps` in all; log and trajectory are
    continued. max_force: eV/Å beyond which a system is set aside; the others go on. errors: as in `relax`. progress: table
    and bar at a terminal.
    """
    check_errors_argument(errors)
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 0:
        raise InputError(f"n_steps must be a non-negative integer, got {n_steps!r}")
    paths = tuple(None if path is None else Path(path) for path in (log, trajectory, checkpoint))
    if resume and paths[2] is None:
        raise InputError("resume=True needs checkpoint=, the file to go on from")
    given = structure_list(structures)
    if not given:
        raise InputError("no structures: give at least one")
    if errors == "raise":
        check_inputs(given, potential)
    inputs = [checked_input(i, one, potential) for i, one in enumerate(given)]
    usable = [one for one in inputs if one.reason is None]
    settings: dict[str, Setting] = {"temperature": temperature, "timestep": timestep, "friction": friction}
    _check_counts(settings, len(inputs))
    if not usable:
        return MDResult([_unusable(one) for one in inputs], ensemble, 0, *paths)
    dynamics = _dynamics(ensemble, potential, settings, seed, skin)
    batch = _started(dynamics, usable, settings, seed, paths[2] if resume else None)
    reporters: list[Any] = [ForceGuard(max_force), *hooks]
    reporters += [LogTable(log_interval), ProgressBar(ensemble.upper())] if progress else []
    reporters += _file_hooks(paths, (log_interval, trajectory_interval, checkpoint_interval))
    for hook in reporters:
        dynamics.register_hook(hook)
    with stop_between_steps() as stop:
        dynamics.register_hook(StopOnRequest(stop))
        try:
            dynamics.run(batch, max(0, n_steps - dynamics.step_count))
        except StopRequested:
            if paths[2]:
                save_checkpoint(paths[2], batch, dynamics)
            raise
    if paths[2]:
        save_checkpoint(paths[2], batch, dynamics)
    systems = _systems(usable, batch, dynamics) + [_unusable(one) for one in inputs if one.reason is not None]
    return MDResult(sorted(systems, key=lambda one: one.index), ensemble, dynamics.step_count, *paths)


class StopRequested(KeyboardInterrupt):
    """Raised between two steps: the state is whole."""


class StopOnRequest:
    """Ends a run between two steps when Ctrl-C or SIGTERM has come."""

    stage = HookStageEnum.BEFORE_STEP
    frequency = 1

    def __init__(self, requested: Callable[[], bool]) -> None:
        self._requested = requested

    def __call__(self, batch: Batch, dynamics: BaseDynamics) -> None:
        """Raise StopRequested; the step before is complete."""
        if self._requested():
            raise StopRequested


def _file_hooks(paths: Sequence[Path | None], intervals: Sequence[int]) -> list[Any]:
    """Log, trajectory and checkpoint, the checkpoint last."""
    makers: tuple[Callable[[Path, int], Any], ...] = (CSVLog, trajectory_writer, Checkpoint)
    return [make(path, interval) for make, path, interval in zip(makers, paths, intervals, strict=True) if path is not None]


def _dynamics(ensemble: str, potential: Potential, settings: dict[str, Any], seed: int, skin: float) -> BaseDynamics:
    if ensemble == "nve":
        return NVE(potential, settings["timestep"], skin=skin)
    if ensemble == "nvt":
        return NVTLangevin(potential, settings["temperature"], settings["timestep"], settings["friction"], seed=seed, skin=skin)
    raise InputError(f"ensemble must be one of {', '.join(ENSEMBLES)}, got {ensemble!r}{nearest(str(ensemble), ENSEMBLES)}")


def _check_counts(settings: dict[str, Setting], n_structures: int) -> None:
    """InputError for a setting with some other number of values than one or one for each structure."""
    for name, value in settings.items():
        count = len(Parameter.of(name, value, positive=name == "timestep").values[0])
        if count not in (1, n_structures):
            raise InputError(f"{name} has {count} values for {n_structures} structures: give one, or one for each")


def _started(
    dynamics: BaseDynamics, usable: Sequence[Input], settings: dict[str, Any], seed: int, checkpoint: Path | None
) -> Batch:
    """The batch at the start, or as the checkpoint has it."""
    batch = working_batch(usable, velocities=True)
    if checkpoint is not None and checkpoint.exists():
        saved = load_checkpoint(checkpoint, dynamics)
        same = torch.equal(saved.ptr, batch.ptr) and torch.equal(saved.atomic_numbers, batch.atomic_numbers)
        if not same:
            raise InputError(f"{checkpoint} holds other structures than those given: {saved} and {batch}")
        return saved
    own = batch.velocities
    start = settings["temperature"]
    initialize_velocities(batch, start.values[0] if isinstance(start, Ramp) else start, seed)
    has_own = torch.tensor([one.data is not None and one.data.velocities is not None for one in usable])
    batch.velocities = torch.where(atom_rows(has_own, batch)[:, None], own, batch.velocities)
    return batch


def _systems(usable: Sequence[Input], batch: Batch, dynamics: BaseDynamics) -> list[MDSystem]:
    outcomes, steps, time = (value.tolist() for value in (batch.get(OUTCOME), dynamics.steps(batch), dynamics.time(batch)))
    potential, kinetic = batch.energy.tolist(), kinetic_energy(batch).tolist()
    heat = temperature_of(batch, dynamics.removed_degrees).tolist()
    found = []
    for i, one in enumerate(usable):
        assert one.data is not None
        failed = outcomes[i] == Outcome.FAILED
        found.append(
            MDSystem(
                index=one.index,
                outcome=OUTCOMES[Outcome(outcomes[i])],
                reason=batch.info[i].get(REASON) if failed else None,
                steps=steps[i],
                time=time[i],
                potential_energy=None if failed else potential[i],
                kinetic_energy=None if failed else kinetic[i],
                temperature=None if failed else heat[i],
                structure=finished_structure(one.data, batch, i),
            )
        )
    return found


def _unusable(one: Input) -> MDSystem:
    return MDSystem(one.index, "failed", one.reason, 0, 0.0, None, None, None, one.data)
