"""The systems of a batch as spglib takes them, on the host."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from carryall.data.batch import Batch
from carryall.dynamics.status import SYSTEM_ID
from carryall.dynamics.thermo import masses, mobile

REFERENCE_POSITIONS = "symmetry_positions"
"""(n_atoms, 3) Å: a system as it was when its symmetry was found; follows it through refills and checkpoints."""
REFERENCE_CELL = "symmetry_cell"
"""(n_systems, 3, 3) Å; NaN where no symmetry was looked for."""


@dataclass(frozen=True, eq=False)
class Crystal:
    """One structure."""

    cell: np.ndarray
    """(3, 3) Å."""
    positions: np.ndarray
    """(n_atoms, 3) Å."""
    facts: np.ndarray
    """(n_atoms, 3) element, mass, whether it is free: equal rows for atoms that operations may exchange."""

    @property
    def digest(self) -> bytes:
        """Equal for equal structures only."""
        found = hashlib.blake2b(digest_size=16)
        for value in (self.cell, self.positions, self.facts):
            found.update(np.ascontiguousarray(value).data)
        return found.digest()

    @property
    def kinds(self) -> np.ndarray:
        """(n_atoms,) int64: equal where the facts are."""
        return np.unique(self.facts, axis=0, return_inverse=True)[1].reshape(-1)

    @property
    def free(self) -> np.ndarray:
        """(n_atoms,) bool."""
        return self.facts[:, 2] > 0


@dataclass(frozen=True, eq=False)
class Crystals:
    """All systems of a batch."""

    ids: list[int]
    ptr: list[int]
    pbc: np.ndarray
    cell: np.ndarray
    positions: np.ndarray
    facts: np.ndarray
    partly_free: np.ndarray
    """(n_atoms,) bool: free along some axes only."""
    reference_cell: np.ndarray | None
    reference_positions: np.ndarray | None

    @classmethod
    def of(cls, batch: Batch) -> Crystals:
        """Copies from the batch, which must have `system_id`."""
        moves = mobile(batch)
        free = np.ones((batch.n_atoms, 3), dtype=bool) if moves is None else moves.cpu().numpy()
        weights = masses(batch).detach().double().cpu().numpy()
        facts = [batch.atomic_numbers.cpu().numpy().astype(float), weights, free.all(1).astype(float)]
        has_reference = REFERENCE_CELL in batch and REFERENCE_POSITIONS in batch
        return cls(
            batch.get(SYSTEM_ID).tolist(),
            batch.ptr.tolist(),
            batch.pbc.cpu().numpy(),
            _array(batch, "cell"),
            _array(batch, "positions"),
            np.stack(facts, 1),
            np.asarray(free.any(1) & ~free.all(1)),
            _array(batch, REFERENCE_CELL) if has_reference else None,
            _array(batch, REFERENCE_POSITIONS) if has_reference else None,
        )

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: int) -> slice:
        """Atoms of a system."""
        return slice(self.ptr[index], self.ptr[index + 1])

    def now(self, index: int) -> Crystal:
        """A system as it is."""
        rows = self.rows(index)
        return Crystal(self.cell[index], self.positions[rows], self.facts[rows])

    def reference(self, index: int) -> Crystal | None:
        """A system as it was when its symmetry was found; None where it was not."""
        if self.reference_cell is None or self.reference_positions is None or np.isnan(self.reference_cell[index]).any():
            return None
        rows = self.rows(index)
        return Crystal(self.reference_cell[index], self.reference_positions[rows], self.facts[rows])

    def unusable(self, index: int) -> str | None:
        """Why a system has no space group to keep."""
        rows = self.rows(index)
        if not self.pbc[index].all() or not np.linalg.det(self.cell[index]):
            return "FixSymmetry needs a cell with volume that is periodic along three axes"
        if not np.isfinite(self.positions[rows]).all() or not np.isfinite(self.cell[index]).all():
            return "positions or cell are not finite"
        if self.partly_free[rows].any():
            return "FixSymmetry cannot keep atoms that are free along some axes only: fix them along all, or none"
        return None


def _array(batch: Batch, key: str) -> np.ndarray:
    # a copy: the batch may go on
    return np.array(batch.get(key).detach().cpu().numpy(), dtype=np.float64)
