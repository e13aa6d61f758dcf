"""A vector for every system, as optimizers see it: a row for each atom and, where the cell may change, three for the cell."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.sharing import SharedAtoms


class Rows(NamedTuple):
    """Displacements, generalised forces or velocities of all systems; the two parts are kept apart, without padding."""

    atoms: Tensor
    """(n_atoms, 3)."""
    cell: Tensor | None = None
    """(n_systems, 3, 3); None where the cell is fixed."""


class Segments(NamedTuple):
    """Where the systems are in the rows of atoms."""

    system: Tensor | None
    """(n_atoms,) int64; None where there is one system, and everything broadcasts."""
    ptr: Tensor
    """(n_systems + 1,) int64."""
    components: Tensor
    """(n_systems + 1,) int64, of the rows laid out as one line."""
    shared: SharedAtoms | None = None
    """The ranks that have the system's atoms; None where this process has all."""

    @classmethod
    def of(cls, batch: Batch) -> Segments:
        """Those of a batch."""
        return cls(None if batch.n_systems == 1 else batch.system, batch.ptr, batch.ptr * 3, batch._shared)


def dot(a: Rows, b: Rows, of: Segments) -> Tensor:
    """(n_systems,) scalar products; each adds up in the order of its atoms, whatever else is in the batch."""
    total = _totals((a.atoms * b.atoms).reshape(-1), of.components)
    total = total if of.shared is None else of.shared.total(total)
    if a.cell is None or b.cell is None:
        return total
    line = (a.cell * b.cell).reshape(-1)
    return total.add_(_totals(line, torch.arange(0, len(line) + 1, 9, device=line.device)))


def longest(a: Rows, of: Segments) -> Tensor:
    """(n_systems,) length of the longest row; 0 without rows."""
    x, y, z = (a.atoms * a.atoms).unbind(1)
    squared = torch.segment_reduce((x + y) + z, "max", offsets=of.ptr, initial=0.0, unsafe=True)
    squared = squared if of.shared is None else of.shared.largest(squared)
    if a.cell is not None:
        x, y, z = (a.cell * a.cell).unbind(2)
        squared = torch.maximum(squared, ((x + y) + z).amax(1))
    return squared.sqrt()


def scaled(a: Rows, factor: Tensor, of: Segments) -> Rows:
    """Every system's rows times its `factor` (n_systems,)."""
    atoms = a.atoms * (factor if of.system is None else factor.index_select(0, of.system)[:, None])
    return Rows(atoms, None if a.cell is None else a.cell * factor[:, None, None])


def added(a: Rows, b: Rows) -> Rows:
    """a + b."""
    return Rows(a.atoms + b.atoms, None if a.cell is None or b.cell is None else a.cell + b.cell)


def subtracted(a: Rows, b: Rows) -> Rows:
    """a - b."""
    return Rows(a.atoms - b.atoms, None if a.cell is None or b.cell is None else a.cell - b.cell)


def transformed(atoms: Tensor, matrices: Tensor, of: Segments) -> Tensor:
    """(n_atoms, 3) rows times the matrices (n_systems, 3, 3) of their systems, term by term."""
    # gathered as flat rows: rows of a transposed tensor are gathered fifteen times more slowly
    own = matrices if of.system is None else matrices.reshape(-1, 9).index_select(0, of.system).view(-1, 3, 3)
    x, y, z = (atoms[:, :, None] * own).unbind(1)
    return (x + y) + z


def _totals(line: Tensor, offsets: Tensor) -> Tensor:
    return torch.segment_reduce(line, "sum", offsets=offsets, initial=0.0, unsafe=True)
