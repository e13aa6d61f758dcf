"""Molecular dynamics of one structure or many: in one batch where it fits, else in several, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from carryall.data.atomic_data import AtomicData
from carryall.data.batch import Batch
from carryall.data.units import kB
from carryall.dynamics.base import BaseDynamics
from carryall.dynamics.ensembles import Conditions
from carryall.dynamics.hooks.checkpoint import Checkpoint, load_checkpoint, read_checkpoint, save_checkpoint
from carryall.dynamics.hooks.console import LogTable, ProgressBar
from carryall.dynamics.hooks.csv_log import CSVLog
from carryall.dynamics.hooks.guard import ForceGuard
from carryall.dynamics.hooks.trajectory import trajectory_writer
from carryall.dynamics.inflight import moving_batch
from carryall.dynamics.integrators.nve import NVE
from carryall.dynamics.memory import BatchLimits, automatic_limits
from carryall.dynamics.parameters import PerSystem, Ramp, Setting
from carryall.dynamics.results import OUTCOMES
from carryall.dynamics.samplers import size_bins
from carryall.dynamics.status import OUTCOME, REASON, Outcome, atom_rows
from carryall.dynamics.stopping import StopOnRequest, StopRequested
from carryall.dynamics.structures import (
    Input,
    Structures,
    check_all,
    check_errors_argument,
    check_structure,
    checked_input,
    each,
    finished_structure,
    structure_iterable,
)
from carryall.dynamics.thermo import kinetic_energy
from carryall.dynamics.velocities import initialize_velocities
from carryall.errors import InputError
from carryall.graph.potential import Potential
from carryall.interrupt import stop_between_steps

SAMPLES = 64
"""Structures that tell how much memory a batch needs."""


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
    """K, at the end, by the degrees of freedom that the dynamics has."""
    structure: AtomicData | None
    """The structure with its last positions, cell, velocities, energy and forces."""


@dataclass(frozen=True, eq=False)
class MDResult:
    """What became of a run."""

    systems: list[MDSystem]
    """In input order."""
    ensemble: str
    steps: int
    """Steps of the run, those before a restart too."""
    logs: tuple[Path, ...]
    """One for each batch; none where none was asked for."""
    trajectories: tuple[Path, ...]
    checkpoints: tuple[Path, ...]

    @property
    def structures(self) -> list[AtomicData | None]:
        """Last structure of each system, in input order."""
        return [one.structure for one in self.systems]

    @property
    def log(self) -> Path | None:
        """The log of the first batch."""
        return next(iter(self.logs), None)

    @property
    def trajectory(self) -> Path | None:
        """The trajectory of the first batch."""
        return next(iter(self.trajectories), None)

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint of the first batch."""
        return next(iter(self.checkpoints), None)


@dataclass(frozen=True, eq=False)
class _Files:
    """Files of a batch, and every how many steps each is written."""

    log: Path | None
    trajectory: Path | None
    checkpoint: Path | None
    intervals: tuple[int, int, int]

    def of(self, batch: int, n_batches: int) -> _Files:
        """The files of one of several batches: with its number in the name."""
        if n_batches == 1:
            return self
        log, trajectory, checkpoint = (
            None if one is None else _numbered(one, batch) for one in (self.log, self.trajectory, self.checkpoint)
        )
        return _Files(log, trajectory, checkpoint, self.intervals)


def md(
    structures: Structures,
    potential: Potential,
    ensemble: str = "nvt",
    temperature: Setting = 300.0,
    timestep: PerSystem = 1.0,
    n_steps: int = 1000,
    *,
    thermostat: str | None = None,
    barostat: str | None = None,
    cell_mode: str = "isotropic",
    pressure: Setting = 0.0,
    friction: PerSystem = 1.0,
    tau: PerSystem = 100.0,
    barostat_tau: PerSystem = 1000.0,
    compressibility: PerSystem | None = None,
    constraints: Sequence[Any] = (),
    max_atoms_per_batch: int | None = None,
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
    """Molecular dynamics of all structures, each `n_steps` steps; results are in input order.

    ensemble: "nve", "nvt", "npt" or "nph". thermostat (of "nvt"): "langevin" (the default; friction, 1/ps), "nose_hoover" or
    "velocity_rescaling" (tau, fs). barostat (of "npt"): "stochastic_cell_rescaling" (the default; compressibility, 1/GPa, by
    default water's), which comes with velocity rescaling, or "mtk", with Nosé-Hoover chains; both have barostat_tau (fs); "nph"
    is MTK's. cell_mode: "isotropic", "anisotropic" or "triclinic". temperature: K, of the thermostat, and of the initial
    velocities of structures that have none. pressure: GPa. timestep: fs. Each of these numbers may be one for each structure;
    temperature and pressure may be a `Ramp`. seed: of velocities and noise.

    Structures that have more atoms than `max_atoms_per_batch` together (None: as many as fit into memory) are run in several
    batches, one after the other; the number of a batch is in the names of its files then (log-0.csv).

    log: CSV file. trajectory: .h5, .hdf5, .extxyz or .xyz. checkpoint: file, written every `checkpoint_interval` steps and at
    the end. resume: go on from the checkpoint, if there is one, up to `n_steps` in all; log and trajectory are continued.
    max_force: eV/Å beyond which a system is set aside; the others go on. errors: as in `relax`. progress: table and bar at a
    terminal. hooks: for the run of each batch. skin: Å, of the neighbour list.
    """
    check_errors_argument(errors)
    _check_numbers(n_steps, max_atoms_per_batch)
    if resume and checkpoint is None:
        raise InputError("resume=True needs checkpoint=, the file to go on from")
    conditions = Conditions(
        ensemble, thermostat, barostat, cell_mode, temperature, pressure, timestep, friction, tau, barostat_tau, compressibility
    )
    given = [None if path is None else Path(path) for path in (log, trajectory, checkpoint)]
    files = _Files(given[0], given[1], given[2], (log_interval, trajectory_interval, checkpoint_interval))

    def make() -> BaseDynamics:
        return conditions.dynamics(potential, seed, skin=skin, constraints=tuple(constraints))

    check = partial(check_structure, potential=potential)
    inputs = [checked_input(i, one, check) for i, one in enumerate(each(structure_iterable(structures)))]
    if not inputs:
        raise InputError("no structures: give at least one")
    conditions.check_counts(len(inputs))
    make()  # the settings are checked before any work
    limits = _limits(lambda: NVE(potential, skin=skin), inputs, max_atoms_per_batch, files.checkpoint if resume else None)
    inputs = [_fitting(one, limits, potential.spec.cutoff) for one in inputs]
    if errors == "raise":
        check_all(inputs)
    bins = _bins(inputs, limits.max_atoms)
    systems = [_unusable(one) for one in inputs if one.reason is not None]
    extra = {"max_atoms_per_batch": limits.max_atoms}
    parts = [files.of(k, len(bins)) for k in range(len(bins))]
    steps = 0
    for k, (members, own) in enumerate(zip(bins, parts, strict=True)):
        dynamics = make()
        label = ensemble.upper() + (f" {k + 1}/{len(bins)}" if len(bins) > 1 else "")
        reporters: list[Any] = [ForceGuard(max_force), *hooks]
        reporters += [LogTable(log_interval), ProgressBar(label)] if progress else []
        batch = started_batch(dynamics, members, conditions, seed, own.checkpoint if resume else None)
        _run(dynamics, batch, n_steps, [*reporters, *_file_hooks(own, extra)], own.checkpoint, extra)
        systems += ended_systems(members, batch, dynamics)
        steps = dynamics.step_count
    systems.sort(key=lambda one: one.index)
    found = ([path for path in (getattr(one, name) for one in parts) if path] for name in ("log", "trajectory", "checkpoint"))
    return MDResult(systems, ensemble, steps, *map(tuple, found))


def _run(
    dynamics: BaseDynamics, batch: Batch, n_steps: int, hooks: Iterable[Any], checkpoint: Path | None, extra: dict[str, Any]
) -> None:
    """Up to `n_steps` in all; a wish to stop is granted between two steps, with a checkpoint."""
    for hook in hooks:
        dynamics.register_hook(hook)
    with stop_between_steps() as stop:
        dynamics.register_hook(StopOnRequest(stop))
        try:
            dynamics.run(batch, max(0, n_steps - dynamics.step_count))
        except StopRequested:
            if checkpoint:
                save_checkpoint(checkpoint, batch, dynamics, extra)
            raise
    if checkpoint:
        save_checkpoint(checkpoint, batch, dynamics, extra)


def _file_hooks(files: _Files, extra: dict[str, Any]) -> list[Any]:
    """Log, trajectory and checkpoint, the checkpoint last."""
    every_log, every_frame, every_state = files.intervals
    found: list[Any] = [] if files.log is None else [CSVLog(files.log, every_log)]
    found += [] if files.trajectory is None else [trajectory_writer(files.trajectory, every_frame)]
    return found if files.checkpoint is None else [*found, Checkpoint(files.checkpoint, every_state, extra)]


def _limits(
    probe: Callable[[], BaseDynamics], inputs: Sequence[Input], max_atoms: int | None, checkpoint: Path | None
) -> BatchLimits:
    """What a batch may hold: as in the checkpoint to go on from, as asked for, or as measured."""
    saved = next((path for path in _states(checkpoint) if path.exists()), None)
    if saved is not None:
        before = read_checkpoint(saved).extra.get("max_atoms_per_batch")
        if max_atoms is not None and before is not None and max_atoms != before:
            raise InputError(f"{saved} is of a run with max_atoms_per_batch={before}, got {max_atoms}: give the same, or none")
        max_atoms = before or max_atoms
    if max_atoms is not None:
        return BatchLimits(max_atoms, None)
    usable = [one.data for one in inputs if one.reason is None and one.data is not None]
    return automatic_limits(probe, usable[:SAMPLES], whole=sum(one.n_atoms for one in usable), for_speed=False)


def _states(checkpoint: Path | None) -> tuple[Path, ...]:
    """Where a run keeps the state of its first batch: alone, or one of several."""
    return () if checkpoint is None else (checkpoint, _numbered(checkpoint, 0))


def _fitting(one: Input, limits: BatchLimits, cutoff: float) -> Input:
    """The input, or why it does not even fit alone."""
    if one.reason is not None or one.data is None or one.data.n_atoms <= limits.max_atoms:
        return one
    return replace(one, reason=limits.refusal(one.data, cutoff))


def _bins(inputs: Sequence[Input], max_atoms: int) -> list[list[Input]]:
    """Usable inputs by batches; one that has more atoms than a batch may is alone."""
    usable = [one for one in inputs if one.reason is None and one.data is not None]
    small = [one for one in usable if one.data is not None and one.data.n_atoms <= max_atoms]
    places = size_bins([one.data.n_atoms for one in small if one.data is not None], max_atoms)
    found = [[small[i] for i in bin] for bin in places]
    found += [[one] for one in usable if one.data is not None and one.data.n_atoms > max_atoms]
    return sorted(found, key=lambda members: members[0].index)


def started_batch(
    dynamics: BaseDynamics, inputs: Sequence[Input], conditions: Conditions, seed: int, checkpoint: Path | None
) -> Batch:
    """The batch at the start, or as the checkpoint has it."""
    structures = [one.data for one in inputs if one.data is not None]
    batch = moving_batch(structures, [one.index for one in inputs])
    if checkpoint is not None and checkpoint.exists():
        saved = load_checkpoint(checkpoint, dynamics)
        same = torch.equal(saved.ptr, batch.ptr) and torch.equal(saved.atomic_numbers, batch.atomic_numbers)
        if not same:
            raise InputError(f"{checkpoint} holds other structures than those given: {saved} and {batch}")
        return saved
    own = batch.velocities if "velocities" in batch else torch.zeros_like(batch.positions)
    start = conditions.temperature
    initialize_velocities(batch, start.values[0] if isinstance(start, Ramp) else start, seed)
    has_own = torch.tensor([one.velocities is not None for one in structures])
    batch.velocities = torch.where(atom_rows(has_own, batch)[:, None], own, dynamics.constrained(batch, batch.velocities))
    return batch


def ended_systems(inputs: Sequence[Input], batch: Batch, dynamics: BaseDynamics) -> list[MDSystem]:
    outcomes, steps, time = (value.tolist() for value in (batch.get(OUTCOME), dynamics.steps(batch), dynamics.time(batch)))
    kinetic = kinetic_energy(batch)
    heat = (2.0 * kinetic / (kB * dynamics.degrees_of_freedom(batch))).tolist()
    found = []
    for i, one in enumerate(inputs):
        assert one.data is not None
        failed = outcomes[i] == Outcome.FAILED
        found.append(
            MDSystem(
                index=one.index,
                outcome=OUTCOMES[Outcome(outcomes[i])],
                reason=batch.info[i].get(REASON) if failed else None,
                steps=steps[i],
                time=time[i],
                potential_energy=None if failed else float(batch.energy[i]),
                kinetic_energy=None if failed else float(kinetic[i]),
                temperature=None if failed else heat[i],
                structure=finished_structure(one.data, batch, i),
            )
        )
    return found


def _unusable(one: Input) -> MDSystem:
    return MDSystem(one.index, "failed", one.reason, 0, 0.0, None, None, None, one.data)


def _numbered(path: Path, number: int) -> Path:
    """`log-0.csv` for `log.csv`."""
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def _check_numbers(n_steps: int, max_atoms: int | None) -> None:
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 0:
        raise InputError(f"n_steps must be a non-negative integer, got {n_steps!r}")
    if max_atoms is not None and (isinstance(max_atoms, bool) or not isinstance(max_atoms, int) or max_atoms < 1):
        raise InputError(f"max_atoms_per_batch must be a positive integer or None, got {max_atoms!r}")
