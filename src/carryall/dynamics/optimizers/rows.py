"""A vector for every system, as optimizers see it: a row for each atom and, where the cell may change, three for the cell."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carryall.data.batch import Batch


@dataclass(frozen=True, eq=False)
class Rows:
    """Displacements, generalised forces or velocities of all systems; the two parts are kept apart, without padding."""

    atoms: Tensor
    """(n_atoms, 3)."""
    cell: Tensor | None = None
    """(n_systems, 3, 3); None where the cell is fixed."""


@dataclass(frozen=True, eq=False)
class Segments:
    """Where the systems are in the rows of atoms."""

    system: Tensor
    """(n_atoms,) int64."""
    ptr: Tensor
    """(n_systems + 1,) int64."""
    components: Tensor
    """(n_systems + 1,) int64, of the rows laid out as one line."""

    @classmethod
    def of(cls, batch: Batch) -> Segments:
        """Those of a batch."""
        return cls(batch.system, batch.ptr, batch.ptr * 3)


def dot(a: Rows, b: Rows, of: Segments) -> Tensor:
    """(n_systems,) scalar products; each adds up in the order of its atoms, whatever else is in the batch."""
    line = (a.atoms * b.atoms).reshape(-1)
    total = torch.segment_reduce(line, "sum", offsets=of.components, initial=0.0, unsafe=True)
    if a.cell is None or b.cell is None:
        return total
    x, y, z = (a.cell * b.cell).unbind(2)
    x, y, z = ((x + y) + z).unbind(1)
    return total + ((x + y) + z)


def longest(a: Rows, of: Segments) -> Tensor:
    """(n_systems,) length of the longest row; 0 without rows."""
    x, y, z = (a.atoms * a.atoms).unbind(1)
    squared = torch.segment_reduce((x + y) + z, "max", offsets=of.ptr, initial=0.0, unsafe=True)
    if a.cell is not None:
        x, y, z = (a.cell * a.cell).unbind(2)
        squared = torch.maximum(squared, ((x + y) + z).amax(1))
    return squared.sqrt()


def scaled(a: Rows, factor: Tensor, of: Segments) -> Rows:
    """Every system's rows times its `factor` (n_systems,)."""
    atoms = a.atoms * factor.index_select(0, of.system)[:, None]
    return Rows(atoms, None if a.cell is None else a.cell * factor[:, None, None])


def added(a: Rows, b: Rows) -> Rows:
    """a + b."""
    return Rows(a.atoms + b.atoms, None if a.cell is None or b.cell is None else a.cell + b.cell)


def subtracted(a: Rows, b: Rows) -> Rows:
    """a - b."""
    return Rows(a.atoms - b.atoms, None if a.cell is None or b.cell is None else a.cell - b.cell)
