"""Atoms of a rank as LAMMPS has them, in memory of one's own, and what of them is other than it was."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import torch

from carryall.engines.lammps.capi import LammpsFunctions, rows_view, view
from carryall.errors import InputError
from carryall.native import library

NOT_FINITE, OTHER_IDS, OTHER_TYPES = 1, 2, 4
"""What a reading finds, as a sum: a position that is no number, other ids or another number of own atoms, other types."""


class AtomReader:
    """Reads local and ghost atoms; what it holds is that of the last reading, tensors the same as long as there are as many."""

    def __init__(self, functions: LammpsFunctions, length: float) -> None:
        """`length`: Å, of LAMMPS' unit."""
        self.functions, self.length = functions, length
        self._native = library()
        self.n_local = -1
        self._hold(0)

    def _hold(self, n_atoms: int) -> None:
        self.positions = torch.empty(n_atoms, 3, dtype=torch.float64)
        """(n_atoms, 3) Å."""
        self.ids = np.full(n_atoms, -1, self.functions.tag_type)
        """(n_atoms,)."""
        self.types = torch.full((n_atoms,), -1, dtype=torch.int32)
        """(n_atoms,) LAMMPS' own, from 1."""
        self._places = self.positions.data_ptr(), self.ids.ctypes.data, self.types.data_ptr()

    def read(self, n_local: int, ids: int, x: int) -> int:
        """Take over the atoms as they are now, whose ids and row pointers of positions are at these addresses.

        Returns what is other than before, and whether a position is no number.
        """
        n_atoms, changed = n_local + self.functions.n_ghost, 0
        if n_atoms != len(self.ids):
            self._hold(n_atoms)
            changed = OTHER_IDS | OTHER_TYPES
        if n_local != self.n_local:
            self.n_local = n_local
            changed |= OTHER_IDS
        if not n_atoms:
            return changed
        types = self.functions.types()
        if self._native is None:
            changed |= self._read_by_numpy(ids, x, types)
        else:
            first = ctypes.c_void_p.from_address(x).value
            width = self.functions.tag_type.itemsize
            changed |= self._native.carryall_lammps_atoms(n_atoms, first, ids, types, width, self.length, *self._places)
        return changed

    def _read_by_numpy(self, ids: int, x: int, types: int) -> int:
        n_atoms = len(self.ids)
        positions, changed = self.positions.numpy(), 0
        np.multiply(rows_view(x, n_atoms), self.length, out=positions)
        if not np.isfinite(positions).all():
            changed |= NOT_FINITE
        for own, place, what in ((self.ids, ids, OTHER_IDS), (self.types.numpy(), types, OTHER_TYPES)):
            new = view(place, n_atoms, own.dtype)
            if not np.array_equal(own, new):
                own[:] = new
                changed |= what
        return changed


def fill_with_nan(n_local: int, forces: int) -> None:
    """Forces that nobody can take for forces."""
    if n_local and (first := ctypes.c_void_p.from_address(forces).value):
        view(first, 3 * n_local, np.dtype(np.float64))[:] = math.nan


def not_finite(what: str, rows: np.ndarray, ids: np.ndarray, unit: str) -> InputError:
    """The error that names the first atom whose row is no number."""
    bad = np.flatnonzero(~np.isfinite(rows).all(1))
    where = (
        f"the {what} of the atom with id {ids[bad[0]]} is {rows[bad[0]].tolist()} {unit}" if len(bad) else f"{what}s overflow"
    )
    return InputError(
        f"{where}: the structure has left what the potential knows (atoms too close, time step too long), or the model is "
        "broken"
    )
