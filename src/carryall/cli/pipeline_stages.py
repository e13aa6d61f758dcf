"""The stages of a pipeline that a configuration describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from carryall.cli.inputs import made_constraints
from carryall.cli.md import schedule
from carryall.dynamics import ConvergenceHook, ForceGuard, PipelineStage, Room, initialize_velocities, optimizers
from carryall.dynamics.ensembles import Conditions
from carryall.dynamics.parameters import Ramp
from carryall.dynamics.pipeline.config import MDConfig, PipelineConfig, RelaxConfig
from carryall.dynamics.pipeline.statistics import StageStatistics
from carryall.dynamics.relax import OPTIMIZERS
from carryall.dynamics.status import atom_rows

if TYPE_CHECKING:
    from carryall.data import Batch
    from carryall.dynamics import Constraint
    from carryall.dynamics.parameters import PerSystem
    from carryall.graph import Potential

OWN_VELOCITIES = "own_velocities"
"""Key of the batch: 1 for systems that have velocities, of their file or of an earlier stage."""
CELL = ("cell_filter", "pressure", "cell_mask", "hydrostatic_strain", "constant_volume")


def stages_of(config: PipelineConfig, potentials: Mapping[str, Potential]) -> list[PipelineStage]:
    """A stage for each relax and md; `potentials` by the names that the configuration has for them."""
    found = []
    for place, (name, one) in enumerate(config.work):
        potential = potentials[str(one.model or config.model)]
        make: Callable[..., Any] = _relax if isinstance(one, RelaxConfig) else _md
        limits = None if one.max_atoms_per_batch is None else Room(None, one.max_atoms_per_batch, one.max_edges_per_batch)
        found.append(PipelineStage(make(name, one, potential, place), one.ranks, limits, name))
    return found


def _relax(name: str, config: RelaxConfig, potential: Potential, place: int) -> Any:
    numbers = StageStatistics(name)
    return getattr(optimizers, OPTIMIZERS[config.optimizer])(
        potential,
        convergence_hook=ConvergenceHook.from_fmax(config.fmax),
        n_steps=config.max_steps,
        constraints=made_constraints(config.constraints, relaxing=True),
        hooks=[numbers],
        init_fn=_Start(numbers),
        **{key: getattr(config, key) for key in CELL},
    )


def _md(name: str, config: MDConfig, potential: Potential, place: int) -> Any:
    numbers = StageStatistics(name, config.sample_interval)
    # two stages with one seed would have the same noise
    seed = place if config.seed is None else config.seed
    constraints = made_constraints(config.constraints, relaxing=False)
    conditions = Conditions(
        config.ensemble,
        config.thermostat,
        config.barostat,
        config.cell_mode,
        schedule("temperature", config.temperature, config.n_steps),
        schedule("pressure", config.pressure, config.n_steps),
        config.timestep,
        config.friction,
        config.tau,
        config.barostat_tau,
        config.compressibility,
    )
    start = conditions.temperature
    return conditions.dynamics(
        potential,
        seed,
        n_steps=config.n_steps,
        constraints=constraints,
        hooks=[ForceGuard(config.max_force), numbers],
        init_fn=_MDStart(numbers, start.values[0] if isinstance(start, Ramp) else start, seed, tuple(constraints)),
    )


@dataclass(frozen=True)
class _Start:
    """Called with systems that begin a stage."""

    numbers: StageStatistics

    def __call__(self, batch: Batch) -> None:
        self.numbers.start(batch)
        if OWN_VELOCITIES not in batch:
            # noted before systems with and without velocities share a batch, where those without get zeros
            own = torch.full((batch.n_systems,), int("velocities" in batch), dtype=torch.int64, device=batch.device)
            batch.set(OWN_VELOCITIES, own, level="system")


@dataclass(frozen=True)
class _MDStart(_Start):
    """Begins molecular dynamics: velocities for systems that have none."""

    temperature: PerSystem
    seed: int
    constraints: tuple[Constraint, ...]

    def __call__(self, batch: Batch) -> None:
        super().__call__(batch)
        has_own = batch.get(OWN_VELOCITIES) > 0
        own = batch.velocities if "velocities" in batch else torch.zeros_like(batch.positions)
        initialize_velocities(batch, self.temperature, self.seed, constraints=self.constraints)
        batch.velocities = torch.where(atom_rows(has_own, batch)[:, None], own, batch.velocities)
        batch.set(OWN_VELOCITIES, torch.ones_like(batch.get(OWN_VELOCITIES)))
