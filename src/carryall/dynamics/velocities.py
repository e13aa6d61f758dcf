"""Initial velocities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.units import kB
from carryall.dynamics.noise import Stream, check_seed
from carryall.dynamics.parameters import Parameter, PerSystem
from carryall.dynamics.status import atom_rows, ensure_keys
from carryall.dynamics.system_noise import system_noise
from carryall.dynamics.thermo import degrees_of_freedom, kinetic_energy, masses, mobile

if TYPE_CHECKING:
    from carryall.dynamics.constraints import Constraint


def initialize_velocities(
    batch: Batch,
    temperature: PerSystem,
    seed: int = 0,
    *,
    remove_translation: bool = True,
    exact: bool = False,
    constraints: Sequence[Constraint] = (),
) -> Batch:
    """Give every system velocities of the Maxwell-Boltzmann distribution, in place; returns the batch.

    temperature: K, one number or one for each system. The numbers depend on the seed, the system's `system_id` and the atom's
    index in it only. remove_translation: the centre of mass rests (not where atoms are held by `move_mask`). exact: scaled to
    exactly that temperature, by the degrees of freedom that are left: 3 N - 3 where the centre of mass rests, less what the
    constraints take. constraints: those of the dynamics to come, which the velocities then obey.
    """
    ensure_keys(batch)
    target = Parameter.of("temperature", temperature).at(batch)
    for constraint in constraints:
        constraint.check(batch)
    mass = masses(batch).double()
    noise = system_noise(batch, check_seed(seed), Stream.INITIAL_VELOCITIES, torch.zeros_like(batch.ptr[:-1]))
    velocities = noise * torch.sqrt(kB * atom_rows(target, batch) / mass)[:, None]
    free = mobile(batch)
    if free is not None:
        velocities = torch.where(free, velocities, 0.0)
    if remove_translation:
        velocities = _at_rest(batch, velocities, mass, free)
    for constraint in constraints:
        velocities = constraint.velocities(batch, velocities)
    batch.velocities = velocities
    if exact:
        degrees = degrees_of_freedom(batch, 3 if remove_translation else 0, constraints)
        found = 2.0 * kinetic_energy(batch) / (kB * degrees)
        scale = torch.where(found > 0, torch.sqrt(target / found.clamp(min=1e-300)), 1.0)
        batch.velocities = velocities * atom_rows(scale, batch)[:, None]
    return batch


def _at_rest(batch: Batch, velocities: Tensor, mass: Tensor, free: Tensor | None) -> Tensor:
    """Without the velocity of the centre of mass; single atoms, and systems with held atoms, keep theirs."""
    zeros = velocities.new_zeros(batch.n_systems, 3)
    momentum = zeros.index_add(0, batch.system, velocities * mass[:, None])
    total = mass.new_zeros(batch.n_systems).index_add(0, batch.system, mass)
    drift = momentum / total.clamp(min=1e-300)[:, None]
    keep = (batch.ptr[1:] - batch.ptr[:-1]) < 2
    if free is not None:
        held = (~free.all(1)).long()
        keep = keep | (torch.zeros_like(keep, dtype=torch.int64).index_add(0, batch.system, held) > 0)
    drift = torch.where(keep[:, None], 0.0, drift)
    return velocities - atom_rows(drift, batch)
