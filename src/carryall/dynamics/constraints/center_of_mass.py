"""A centre of mass that stays where it is."""

from __future__ import annotations

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.sharing import system_sizes, system_sums
from carryall.dynamics.constraints.base import Unconstrained
from carryall.dynamics.status import atom_rows
from carryall.dynamics.thermo import masses, mobile

AT_REST = 1e-6
"""A centre of mass counts as moving when its momentum exceeds this part of the momenta's sizes; rounding stays far below."""


class FixCenterOfMass(Unconstrained):
    """Keeps each system's centre of mass at rest; three degrees of freedom are gone.

    Forces lose the part that accelerates the centre: f_i - m_i sum(f) / sum(m), the constraint force of a rigid centre of mass.
    Optimizers move all atoms as if they weighed the same; `unit_masses=True` is for them: then forces are projected on steps
    that keep the centre of mass, f_i - m_i sum(m f) / sum(m²), as in ASE's FixCom (Eqs. 3 and 7 of J. Phys. Chem. A 101, 8823
    (1997)). The virial stays as it is: the removed force does not depend on where the atoms are.

    A system with fixed atoms keeps everything: they hold its centre. So does a single atom.
    """

    holds_center_of_mass = True
    """A dynamics removes three degrees of freedom once, for this or for its own reasons."""

    def __init__(self, unit_masses: bool = False) -> None:
        self.unit_masses = unit_masses

    def forces(self, batch: Batch, forces: Tensor) -> Tensor:
        """(n_atoms, 3) without the pull on the centre of mass."""
        mass = masses(batch).double()[:, None]
        weight = mass if self.unit_masses else torch.ones_like(mass)
        pull = system_sums(batch, weight * forces) / system_sums(batch, weight * mass).clamp(min=1e-300)
        return forces - mass * atom_rows(torch.where(_free(batch)[:, None], pull, 0.0), batch)

    def velocities(self, batch: Batch, velocities: Tensor) -> Tensor:
        """(n_atoms, 3) without the velocity of the centre of mass."""
        return velocities - atom_rows(torch.where(_free(batch)[:, None], _center_velocity(batch, velocities), 0.0), batch)

    def removed_degrees(self, batch: Batch) -> Tensor:
        """3 of each system whose centre is held by this constraint."""
        return 3.0 * _free(batch).double()

    def check(self, batch: Batch) -> None:
        """Bring a moving centre of mass to rest."""
        if "velocities" not in batch:
            return
        speed, mass = batch.velocities.double().abs(), masses(batch).double()[:, None]
        size = system_sums(batch, mass * speed)
        moving = (_center_velocity(batch, batch.velocities).abs() * system_sums(batch, mass) > AT_REST * size).any(1)
        if bool((moving & _free(batch)).any()):
            rows = atom_rows(moving, batch)[:, None]
            batch.velocities = torch.where(rows, self.velocities(batch, batch.velocities), batch.velocities)


def _free(batch: Batch) -> Tensor:
    """(n_systems,) bool: more than one atom, none of them fixed."""
    free = system_sizes(batch) > 1
    moves = mobile(batch)
    if moves is None:
        return free
    return free & (system_sums(batch, (~moves.all(1)).long()) == 0)


def _center_velocity(batch: Batch, velocities: Tensor) -> Tensor:
    mass = masses(batch).double()[:, None]
    return system_sums(batch, mass * velocities) / system_sums(batch, mass).clamp(min=1e-300)
