"""What a constraint is: projections of forces, virials and velocities, and what they take from the degrees of freedom."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from carryall.data.batch import Batch


class Constraint(Protocol):
    """Given to a dynamics as `constraints=[...]`.

    Forces and virials are projected after every evaluation, velocities wherever a step adds random ones.
    All methods see the whole batch and return whole tensors; the dynamics keeps the rows of systems that do not move. What a
    constraint has to remember of a system is a key of the batch, so that it follows the system through refills and checkpoints.
    `Unconstrained` has every method as it is where there is nothing to do.

    Translations of whole systems count once, whoever removes them: a constraint that keeps centres of mass at rest says so by
    `holds_center_of_mass = True` (its `removed_degrees` are not asked then); one that removes translations among others says
    how many by `lost_translations(batch)` (n_systems,) float64.
    """

    def forces(self, batch: Batch, forces: Tensor) -> Tensor:
        """(n_atoms, 3) eV/Å, projected."""
        ...

    def virial(self, batch: Batch, virial: Tensor) -> Tensor:
        """(n_systems, 3, 3) eV, projected."""
        ...

    def velocities(self, batch: Batch, velocities: Tensor) -> Tensor:
        """(n_atoms, 3), projected."""
        ...

    def removed_degrees(self, batch: Batch) -> Tensor:
        """(n_systems,) float64, degrees of freedom that are gone; those of `move_mask` are counted elsewhere."""
        ...

    def check(self, batch: Batch) -> None:
        """Called when systems begin, before their forces are evaluated: InputError where the constraint does not fit them.

        May add keys to the batch, and bring systems that it sees for the first time to where the constraint holds.
        """
        ...

    def unfit(self, batch: Batch) -> dict[int, str]:
        """Systems that the constraint cannot work on, with the reason: they are set aside, the others go on."""
        ...


class Unconstrained:
    """Does nothing: what a constraint does not need to change, it inherits."""

    def forces(self, batch: Batch, forces: Tensor) -> Tensor:
        """As they are."""
        return forces

    def virial(self, batch: Batch, virial: Tensor) -> Tensor:
        """As it is."""
        return virial

    def velocities(self, batch: Batch, velocities: Tensor) -> Tensor:
        """As they are."""
        return velocities

    def removed_degrees(self, batch: Batch) -> Tensor:
        """None: zeros (n_systems,)."""
        return torch.zeros(batch.n_systems, dtype=torch.float64, device=batch.device)

    def check(self, batch: Batch) -> None:
        """Fits all."""

    def unfit(self, batch: Batch) -> dict[int, str]:
        """None."""
        return {}
