"""Molecular dynamics of one large structure over ranks, with the files of `carryall.dynamics.md`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from carryall.data.atomic_data import AtomicData
from carryall.data.batch import Batch
from carryall.dynamics.base import BaseDynamics
from carryall.dynamics.constraints import FixAtoms
from carryall.dynamics.ensembles import Conditions
from carryall.dynamics.hooks.console import ProgressBar
from carryall.dynamics.md import MDResult, ended_systems, started_batch
from carryall.dynamics.parameters import PerSystem, Setting
from carryall.dynamics.stopping import StopOnRequest, StopRequested
from carryall.dynamics.structures import check_all, check_structure, checked_input
from carryall.engines.domain.bricks import Grid
from carryall.engines.domain.reports import SharedCheckpoint, SharedLog, save_whole, shared_trajectory
from carryall.engines.domain.system import evaluator_of, gather, spread
from carryall.errors import InputError
from carryall.exchange import Transport
from carryall.graph.potential import Potential
from carryall.interrupt import stop_between_steps


def md(
    structure: AtomicData,
    potential: Potential,
    transport: Transport,
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
    seed: int = 0,
    log: str | Path | None = None,
    log_interval: int = 10,
    trajectory: str | Path | None = None,
    trajectory_interval: int = 10,
    checkpoint: str | Path | None = None,
    checkpoint_interval: int = 1000,
    resume: bool = False,
    max_force: float = 1000.0,
    progress: bool = True,
    hooks: Iterable[Any] = (),
    skin: float = 0.5,
    grid: Grid | None = None,
    balance: str = "atoms",
) -> MDResult | None:
    """As `carryall.dynamics.md` for one structure, whose atoms the ranks of `transport` share; the result is on rank 0.

    The trajectory is that of one process, to rounding. Every rank gives the same arguments. Files are written by rank 0, and a
    checkpoint of any number of ranks, or of `carryall.dynamics.md`, is gone on with by any other. Ctrl-C or SIGTERM of one rank
    stops all of them between two steps, with a checkpoint. A force above max_force (eV/Å), or anything that is not finite, ends
    the run with an InputError on every rank. grid, balance: of the bricks, see `Decomposition`.
    """
    if resume and checkpoint is None:
        raise InputError("resume=True needs checkpoint=, the file to go on from")
    conditions = Conditions(
        ensemble, thermostat, barostat, cell_mode, temperature, pressure, timestep, friction, tau, barostat_tau, compressibility
    )
    conditions.check_counts(1)
    one = checked_input(0, structure, partial(check_structure, potential=potential))
    check_all([one])

    # held atoms become the key move_mask of the whole, by their places there
    fixed = [held for held in constraints if isinstance(held, FixAtoms)]
    kept = tuple(held for held in constraints if not isinstance(held, FixAtoms))

    def make() -> BaseDynamics:
        return conditions.dynamics(potential, seed, skin=skin, constraints=kept)

    paths = [None if path is None else Path(path) for path in (log, trajectory, checkpoint)]
    state = paths[2]
    # a dynamics of its own takes the whole: none of its state is left in the one that runs
    before = make()
    whole = started_batch(before, [one], conditions, seed, state if resume else None)
    for held in fixed:
        held.check(whole)
    dynamics = make()
    with stop_between_steps() as stop:
        part = spread(whole, dynamics, transport, grid=grid, balance=balance, max_force=max_force, wish=stop)
        if before.step_count:
            dynamics.restore(part, before.step_count, before.forces_are_current(whole))
        del whole
        reporters: list[Any] = list(hooks)
        reporters += [ProgressBar(ensemble.upper())] if progress and transport.rank == 0 else []
        reporters += [SharedLog(paths[0], log_interval, transport.rank)] if paths[0] else []
        reporters += [shared_trajectory(paths[1], trajectory_interval, transport.rank)] if paths[1] else []
        reporters += [SharedCheckpoint(state, checkpoint_interval, {})] if state else []
        evaluator = evaluator_of(dynamics)
        for hook in (*reporters, StopOnRequest(lambda: evaluator.stopping)):
            dynamics.register_hook(hook)
        _run(dynamics, part, n_steps, state)
    ended = gather(part, dynamics)
    if ended is None:
        return None
    found = ((path,) if path else () for path in paths)
    return MDResult(ended_systems([one], ended, dynamics), ensemble, dynamics.step_count, *found)


def _run(dynamics: BaseDynamics, part: Batch, n_steps: int, checkpoint: Path | None) -> None:
    """Up to `n_steps` in all; all ranks stop after the same step when one of them wants to."""
    try:
        dynamics.run(part, max(0, n_steps - dynamics.step_count))
    except StopRequested:
        if checkpoint:
            save_whole(checkpoint, part, dynamics, {})
        raise
    if checkpoint:
        save_whole(checkpoint, part, dynamics, {})
