"""Crystals that keep their space group."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.dynamics.constraints.averages import SymmetryTables, symmetry_tables
from carryall.dynamics.constraints.base import Unconstrained
from carryall.dynamics.constraints.crystals import REFERENCE_CELL, REFERENCE_POSITIONS, Crystal, Crystals
from carryall.dynamics.constraints.operations import Operations, find_operations, refined
from carryall.dynamics.constraints.spglib import import_spglib
from carryall.dynamics.forces import Snapshot
from carryall.dynamics.status import SYSTEM_ID, ensure_keys
from carryall.errors import InputError


class FixSymmetry(Unconstrained):
    """Every crystal keeps the space group that it has, within `symprec` Å, when it begins.

    Forces, virial (so stress) and velocities are averaged over its operations, which go with the cell as it changes. What a
    system is rattled by must be well below symprec, and symprec well below the distances between atoms. The space group of a
    supercell is that of the crystal, whatever the shape of the supercell. refine: bring positions and cell to obey the
    operations exactly, once, when a system begins.

    A system without a cell that is periodic along three axes, with atoms that are free along some axes only, or without a group
    that spglib can find, is set aside with the reason. Spins and other inputs of a potential are not looked at. Needs spglib.
    """

    def __init__(self, symprec: float = 0.01, refine: bool = True) -> None:
        if not symprec > 0:
            raise InputError(f"symprec of FixSymmetry must be positive, got {symprec!r}")
        import_spglib()
        self.symprec, self.refine = float(symprec), refine
        self._known: dict[int, tuple[bytes, Operations]] = {}
        self._tables: tuple[Snapshot, SymmetryTables] | None = None

    def numbers(self, batch: Batch) -> list[int | None]:
        """Number of the space group that each system keeps; None where it keeps none."""
        return [None if one is None else one.number for one in self._operations(Crystals.of(batch))]

    def unfit(self, batch: Batch) -> dict[int, str]:
        """Systems that have no space group to keep."""
        ensure_keys(batch)
        crystals, found = Crystals.of(batch), {}
        for index, name in enumerate(crystals.ids):
            reason = crystals.unusable(index)
            if reason is None and crystals.reference(index) is None:
                try:
                    self._find(name, crystals.now(index))
                except InputError as error:
                    reason = str(error)
            if reason is not None:
                found[index] = reason
        return found

    def check(self, batch: Batch) -> None:
        """Find the symmetry of systems that are new, or were moved out of their symmetry since, and refine these."""
        ensure_keys(batch)
        crystals = Crystals.of(batch)
        cell, positions = crystals.cell.copy(), crystals.positions.copy()
        new = [index for index in range(len(crystals)) if self._is_new(crystals, index)]
        if new:
            for index in new:
                now = crystals.now(index)
                found = self._find(crystals.ids[index], now)
                if self.refine and not found.trivial:
                    cell[index], positions[crystals.rows(index)] = refined(found, now.cell, now.positions)
            self._take(batch, crystals, new, cell, positions)

    def forces(self, batch: Batch, forces: Tensor) -> Tensor:
        """(n_atoms, 3) averaged over the operations."""
        return self._averages(batch).vectors(batch.cell, forces)

    def velocities(self, batch: Batch, velocities: Tensor) -> Tensor:
        """(n_atoms, 3) averaged over the operations."""
        return self._averages(batch).vectors(batch.cell, velocities)

    def virial(self, batch: Batch, virial: Tensor) -> Tensor:
        """(n_systems, 3, 3) averaged over the rotations."""
        return self._averages(batch).tensors(batch.cell, virial)

    def removed_degrees(self, batch: Batch) -> Tensor:
        """(n_systems,) those of the free atoms less the dimension of their symmetric motions."""
        return self._averages(batch).removed_degrees

    def lost_translations(self, batch: Batch) -> Tensor:
        """(n_systems,) how many of them are translations of the whole crystal: where those are removed too, they count once."""
        return self._averages(batch).lost_translations

    # -- inside

    def _take(self, batch: Batch, crystals: Crystals, new: list[int], cell: np.ndarray, positions: np.ndarray) -> None:
        """Write refined systems, their references, and velocities that obey the symmetry."""
        chosen = torch.zeros(batch.n_systems, dtype=torch.bool, device=batch.device)
        chosen[new] = True
        rows = chosen.index_select(0, batch.system)[:, None]
        lattice, sites = torch.from_numpy(cell).to(batch.cell), torch.from_numpy(positions).to(batch.positions)
        unknown = (torch.full_like(lattice, torch.nan), torch.full_like(sites, torch.nan))
        if crystals.reference_cell is not None:
            unknown = (batch.get(REFERENCE_CELL), batch.get(REFERENCE_POSITIONS))
        batch.set(REFERENCE_CELL, torch.where(chosen[:, None, None], lattice, unknown[0]), level="system")
        batch.set(REFERENCE_POSITIONS, torch.where(rows, sites, unknown[1]), level="atom")
        if self.refine:
            batch.cell, batch.positions = lattice, sites
        if "velocities" in batch:
            batch.velocities = torch.where(rows, self.velocities(batch, batch.velocities), batch.velocities)

    def _is_new(self, crystals: Crystals, index: int) -> bool:
        """Whether a system's symmetry is to be looked for: it has none yet, or has left it by more than symprec."""
        if crystals.unusable(index) is not None:
            return False
        reference, now = crystals.reference(index), crystals.now(index)
        try:
            found = self._find(crystals.ids[index], now if reference is None else reference)
        except InputError:
            return False  # `unfit` tells why
        if reference is None:
            return True
        cell, positions = refined(found, now.cell, now.positions)
        away = max(np.abs(cell - now.cell).max(), np.abs(positions - now.positions).max(initial=0.0))
        return bool(away > self.symprec)

    def _averages(self, batch: Batch) -> SymmetryTables:
        if REFERENCE_CELL not in batch or REFERENCE_POSITIONS not in batch:
            self.check(batch)
        if REFERENCE_CELL not in batch:  # no system has a symmetry
            return symmetry_tables([None] * batch.n_systems, [np.zeros(n, dtype=bool) for n in batch.atom_counts], batch.device)
        now = [batch.get(key) for key in (SYSTEM_ID, REFERENCE_CELL, REFERENCE_POSITIONS, "atomic_numbers")]
        if self._tables is None or not self._tables[0].holds(*now):
            crystals = Crystals.of(batch)
            free = [crystals.now(index).free for index in range(len(crystals))]
            self._tables = (Snapshot.of(*now), symmetry_tables(self._operations(crystals), free, batch.device))
        return self._tables[1]

    def _operations(self, crystals: Crystals) -> list[Operations | None]:
        """Of each system, found again from its reference where they are not known; those of systems that left are dropped."""
        references = [crystals.reference(index) for index in range(len(crystals))]
        found = [
            None if reference is None else self._find(name, reference)
            for name, reference in zip(crystals.ids, references, strict=True)
        ]
        self._known = {name: self._known[name] for name, one in zip(crystals.ids, found, strict=True) if one is not None}
        return found

    def _find(self, name: int, crystal: Crystal) -> Operations:
        digest, known = crystal.digest, self._known.get(name)
        if known is None or known[0] != digest:
            known = (digest, find_operations(crystal.cell, crystal.positions, crystal.kinds, self.symprec))
            self._known[name] = known
        return known[1]
