"""What a batch of moving atoms has: kinetic energy, temperature, pressure, each (n_systems,) float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.elements import MASSES
from carryall.data.sharing import largest_over_ranks, system_sizes, system_sums
from carryall.data.units import GPa, kB
from carryall.dynamics.status import FMAX, keep_frozen
from carryall.errors import InputError

if TYPE_CHECKING:
    from carryall.dynamics.constraints import Constraint

MOVE_MASK = "move_mask"
"""(n_atoms, 3) or (n_atoms,) bool: false where an atom may not move."""


def standard_masses(atomic_numbers: Tensor) -> Tensor:
    """(n_atoms,) amu, standard atomic weights."""
    return torch.from_numpy(MASSES.copy()).to(atomic_numbers.device)[atomic_numbers]


def masses(batch: Batch) -> Tensor:
    """(n_atoms,) amu: the batch's own, else standard atomic weights."""
    return batch.masses if "masses" in batch else standard_masses(batch.atomic_numbers)


def mobile(batch: Batch) -> Tensor | None:
    """(n_atoms, 3) bool, true where an atom may move; None when all may."""
    if MOVE_MASK not in batch:
        return None
    mask = batch.get(MOVE_MASK).to(torch.bool)
    return mask.reshape(batch.n_atoms, -1).expand(-1, 3)


def kinetic_energy(batch: Batch) -> Tensor:
    """eV, sum of m v² / 2."""
    squared = batch.velocities.double().square()
    per_atom = 0.5 * masses(batch).double() * (squared[:, 0] + squared[:, 1] + squared[:, 2])
    return system_sums(batch, per_atom)


def degrees_of_freedom(batch: Batch, removed: int = 0, constraints: Sequence[Constraint] = ()) -> Tensor:
    """3 N less what is held fixed, less what constraints take, less `removed` (3 where the centre of mass rests). At least 1.

    A system so small that `removed` would leave nothing, or that has fixed atoms (which hold its centre of mass), keeps all.
    """
    if removed not in (0, 3):
        raise InputError(f"removed must be 0 or 3 degrees of freedom, got {removed}")
    centered = [one for one in constraints if getattr(one, "holds_center_of_mass", False)]
    removed = 3 if centered else removed
    free = 3.0 * system_sizes(batch).double()
    total = free
    mask = mobile(batch)
    if mask is not None:
        total = system_sums(batch, mask.double().sum(1))
    total = torch.where((total == free) & (total > removed), total - removed, total)
    for constraint in constraints:
        if constraint not in centered:
            total = total - constraint.removed_degrees(batch)
        # a crystal's symmetry takes translations that the centre of mass has taken already
        if removed and hasattr(constraint, "lost_translations"):
            total = total + constraint.lost_translations(batch)
    return total.clamp(min=1.0)


def temperature(batch: Batch, removed: int = 0) -> Tensor:
    """K, 2 E_kin / (k_B n_dof) with the degrees of freedom of `degrees_of_freedom(batch, removed)`."""
    return 2.0 * kinetic_energy(batch) / (kB * degrees_of_freedom(batch, removed))


def pressure(batch: Batch) -> Tensor:
    """GPa, (2 E_kin + trace of the virial) / (3 V); NaN where a system has no cell or no virial was computed."""
    volume = batch.volume.double()
    if "virial" not in batch:
        return torch.full_like(volume, torch.nan)
    trace = batch.get("virial").diagonal(dim1=1, dim2=2).sum(1)
    kinetic = kinetic_energy(batch) if "velocities" in batch else torch.zeros_like(trace)
    return torch.where(volume > 0, (2.0 * kinetic + trace) / (3.0 * volume) / GPa, torch.nan)


def kinetic_components(batch: Batch, velocities: Tensor) -> Tensor:
    """(n_systems, 6) eV: xx, yy, zz, xz, yx, zy of the sum of m v ⊗ v, for velocities (n_atoms, 3)."""
    momenta = velocities * masses(batch).double()[:, None]
    rows = torch.cat([velocities * momenta, velocities * momenta.roll(1, 1)], 1)
    return system_sums(batch, rows)


SQUARE = (0, 4, 3, 4, 1, 5, 3, 5, 2)
"""Where the elements of a 3 x 3 matrix are among those of `kinetic_components`."""


def kinetic_tensor(batch: Batch) -> Tensor:
    """(n_systems, 3, 3) eV, sum of m v ⊗ v: symmetric, its trace is twice the kinetic energy."""
    return kinetic_components(batch, batch.velocities.double())[:, list(SQUARE)].reshape(-1, 3, 3)


def pressure_tensor(batch: Batch) -> Tensor:
    """(n_systems, 3, 3) GPa, (sum of m v ⊗ v + virial) / V; NaN where a system has no cell or no virial was computed."""
    volume = batch.volume.double()[:, None, None]
    if "virial" not in batch:
        return torch.full((batch.n_systems, 3, 3), torch.nan, dtype=torch.float64, device=batch.device)
    virial = batch.get("virial")
    kinetic = kinetic_tensor(batch) if "velocities" in batch else torch.zeros_like(virial)
    return torch.where(volume > 0, (kinetic + virial) / volume / GPa, torch.nan)


def max_force(batch: Batch) -> Tensor:
    """eV/Å, largest force on an atom of each system; 0 without atoms."""
    size = batch.forces.norm(dim=1)
    found = size.new_zeros(batch.n_systems).scatter_reduce(0, batch.system, size, "amax", include_self=True)
    return largest_over_ranks(batch, found)


def refresh_fmax(batch: Batch, mask: Tensor | None) -> None:
    """Measure the key `fmax` by the atoms' forces, of the systems of `mask` (None: all), where a stage before left it.

    A stage that relaxes the cell keeps its own measure there, which is not that of the stages after it.
    """
    if FMAX in batch:
        batch.set(FMAX, keep_frozen(mask, max_force(batch), batch.get(FMAX)))
