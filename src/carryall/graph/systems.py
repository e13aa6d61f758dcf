"""The systems of one model call."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from carryall.data.batch import Batch

OPTIONAL = ("system_id", "fparam", "aparam", "spins", "charge_spin")
"""Keys of a batch for the fields of `Systems` from `ids` on."""


@dataclass(frozen=True, eq=False)
class Systems:
    """The systems of one model call: what a neighbour search and a potential read."""

    positions: Tensor
    """(n_atoms, 3) float64, Å; systems are contiguous and in order."""
    atomic_numbers: Tensor
    """(n_atoms,) int64."""
    system: Tensor
    """(n_atoms,) int64, which system an atom belongs to."""
    ptr: Tensor
    """(n_systems + 1,) int64; the atoms of system i are the rows ptr[i]:ptr[i + 1]."""
    cell: Tensor
    """(n_systems, 3, 3) float64, Å, rows are lattice vectors; zeros where a system has none."""
    pbc: Tensor
    """(n_systems, 3) bool."""
    ids: Tensor | None = None
    """(n_systems,) int64, names a system from call to call; None: by its place in the call."""
    # what potentials take beside the geometry, under the names that `carryall.data.extra_inputs` reads
    fparam: Tensor | None = None
    aparam: Tensor | None = None
    spins: Tensor | None = None
    charge_spin: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch) -> Systems:
        """All systems of a batch, named by its key "system_id" where it has one."""
        geometry = (batch.positions, batch.atomic_numbers, batch.system, batch.ptr, batch.cell, batch.pbc)
        return cls(*geometry, *(getattr(batch, name, None) for name in OPTIONAL))

    @property
    def n_systems(self) -> int:
        """Systems in the call."""
        return self.cell.shape[0]

    @property
    def n_atoms(self) -> int:
        """Atoms in the call."""
        return self.positions.shape[0]
