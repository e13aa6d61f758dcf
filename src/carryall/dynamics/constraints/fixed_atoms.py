"""Atoms that never move."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.dynamics.constraints.base import Unconstrained
from carryall.dynamics.constraints.selection import AtomSelection, Mask, Where
from carryall.dynamics.status import atom_rows
from carryall.dynamics.thermo import MOVE_MASK, mobile


class FixAtoms(Unconstrained):
    """Holds atoms where they are: no force acts on them, and they have no velocity.

    Exactly one of four ways to say which: `indices` (of every system, counted within it, negative from its end), `mask` (true
    where an atom is fixed; for systems that all have that many atoms), `elements` (symbols or atomic numbers), or `where`, a
    function of a batch that returns (n_atoms,) bool, asked once about each system, when it begins. What fits no rule is given
    by the data: a structure's own `move_mask`, (n_atoms,) or (n_atoms, 3) bool, works without this constraint, and with it.

    The atoms are false in the batch's key `move_mask`, which the evaluation of forces, thermostats and the count of degrees of
    freedom read: in a fused stage they are held from a system's beginning to its end, whichever stage has the constraint.
    name: of the key that remembers which systems `where` was asked about; two functions need two names.
    """

    def __init__(
        self,
        indices: Iterable[int] | None = None,
        mask: Mask | None = None,
        elements: Iterable[str | int] | None = None,
        where: Where | None = None,
        name: str = "fix_atoms",
    ) -> None:
        self.selection = AtomSelection.of("FixAtoms", indices, mask, elements, where)
        self._asked = f"{name}_asked"

    def check(self, batch: Batch) -> None:
        """Write `move_mask`; InputError for a mask of another length than a system, or an index that it has not."""
        fixed = self._fixed(batch)
        known = batch.get(MOVE_MASK).to(torch.bool) if MOVE_MASK in batch else torch.ones_like(fixed)
        moves = known & ~(fixed if known.dim() == 1 else fixed[:, None])
        if MOVE_MASK not in batch or not torch.equal(moves, known):
            batch.set(MOVE_MASK, moves, level="atom")
        if "velocities" in batch:
            batch.velocities = self.velocities(batch, batch.velocities)

    def forces(self, batch: Batch, forces: Tensor) -> Tensor:
        """None on fixed atoms."""
        return _masked(batch, forces)

    def velocities(self, batch: Batch, velocities: Tensor) -> Tensor:
        """None of fixed atoms. `thermo.degrees_of_freedom` counts `move_mask`, so that no further degrees are removed."""
        return _masked(batch, velocities)

    def _fixed(self, batch: Batch) -> Tensor:
        if self.selection.where is None:
            return self.selection(batch)
        asked = batch.get(self._asked).to(torch.bool) if self._asked in batch else torch.zeros_like(batch.ptr[1:]) > 0
        new = ~asked
        fixed = torch.zeros(batch.n_atoms, dtype=torch.bool, device=batch.device)
        if bool(new.any()):
            chosen = batch.index_select(new.nonzero().squeeze(1))
            fixed[atom_rows(new, batch)] = self.selection(chosen)
            batch.set(self._asked, torch.ones_like(new), level="system")
        return fixed


def _masked(batch: Batch, rows: Tensor) -> Tensor:
    free = mobile(batch)
    return rows if free is None else torch.where(free, rows, 0.0)
