"""What an optimizer moves: the atoms of a fixed cell, or atoms and cell together, in the coordinates of ASE's cell filters.

The cell is its reference (what it was when the system began) times M, and positions are z M with rows z: `F = M^T` is ASE's
deformation gradient. `unit_cell` moves z and F (Tadmor et al., Phys. Rev. B 59, 235 (1999)), `frechet` moves
z and log F, the cell's coordinates times `cell_factor`, with forces that are the exact derivatives of the enthalpy E + p V.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.dynamics.forces import Snapshot
from carryall.dynamics.optimizers import matrices
from carryall.dynamics.optimizers.cell_settings import CellSettings
from carryall.dynamics.optimizers.rows import Rows, Segments, longest, transformed
from carryall.dynamics.status import FMAX, keep_frozen
from carryall.dynamics.thermo import MOVE_MASK, mobile, refresh_fmax

REFERENCE = "reference_cell"
PRESSURE = "pressure"
NO_VOLUME = "the system has no cell with volume, which a cell filter needs: give it a cell, or relax it at fixed cell"

Key = Callable[[str], str]


class Strain(NamedTuple):
    """Where the cells of a batch are."""

    mapping: Tensor
    """(n_systems, 3, 3) M."""
    inverse: Tensor
    """(n_systems, 3, 3) M^-1."""
    coordinates: Tensor
    """(n_systems, 3, 3) F, or log F."""
    factor: Tensor
    """(n_systems,) what coordinates and forces of the cell are scaled by."""


class Point(NamedTuple):
    """Generalised forces of a batch, and where its cells are; no strain at fixed cell."""

    forces: Rows
    """eV/Å; of the cell in eV."""
    strain: Strain | None = None

    @property
    def cell_coordinates(self) -> Tensor | None:
        """(n_systems, 3, 3) as an optimizer moves them."""
        return None if self.strain is None else self.strain.coordinates * self.strain.factor[:, None, None]


class Moved(NamedTuple):
    """What a step leads to."""

    positions: Tensor
    """(n_atoms, 3) Å."""
    cell: Tensor | None
    """(n_systems, 3, 3) Å; None at fixed cell."""
    atom_steps: Tensor
    """(n_atoms, 3) what the rows of atoms moved by: the step asked for, less what is held."""


def strain_of(cell: Tensor, inverse_reference: Tensor, factor: Tensor, kind: str) -> Strain:
    """Coordinates of cells (n_systems, 3, 3), given the inverse of what they began as."""
    mapping = matrices.product(inverse_reference, cell)
    coordinates = mapping if kind == "unit_cell" else matrices.logarithm(mapping)
    return Strain(mapping, matrices.inverse(mapping), coordinates.transpose(1, 2), factor)


def cell_forces(virial: Tensor, strain: Strain, settings: CellSettings) -> Tensor:
    """(n_systems, 3, 3) generalised forces on cells with the virial -d(E + p V)/d(strain), in ASE's order."""
    if settings.kind == "unit_cell":
        return _traceless(_chosen(matrices.product(virial, strain.inverse), settings), settings)
    gradient = matrices.product(_chosen(virial, settings), strain.inverse)
    return _traceless(matrices.exponential_derivative(strain.coordinates.transpose(1, 2), gradient), settings)


def mapping_at(coordinates: Tensor, settings: CellSettings) -> Tensor:
    """(n_systems, 3, 3) M at the coordinates (n_systems, 3, 3) of the cells; components that are held stay."""
    gradient = coordinates if settings.kind == "unit_cell" else matrices.exponential(coordinates)
    one = matrices.identity(coordinates)
    return one + _masked((gradient - one).transpose(1, 2), settings)


def _chosen(virial: Tensor, settings: CellSettings) -> Tensor:
    if settings.hydrostatic_strain:
        virial = matrices.identity(virial) * (matrices.trace(virial) / 3.0)[:, None, None]
    return _masked(virial, settings)


def _masked(value: Tensor, settings: CellSettings) -> Tensor:
    if settings.mask is None:
        return value
    return value * torch.tensor(settings.mask, dtype=value.dtype, device=value.device)


def _traceless(value: Tensor, settings: CellSettings) -> Tensor:
    if not settings.constant_volume:
        return value
    return value - matrices.identity(value) * (matrices.trace(value) / 3.0)[:, None, None]


class FixedCell:
    """Moves the atoms only."""

    needs: frozenset[str] = frozenset()
    """Outputs of the model beyond energy and forces."""
    provides: frozenset[str] = frozenset()
    """Keys that a step changes beside the positions."""

    def start(self, batch: Batch) -> dict[str, Tensor]:
        """No state."""
        return {}

    def unfit(self, batch: Batch) -> dict[int, str]:
        """Every system will do."""
        return {}

    def point(self, batch: Batch, key: Key) -> Point:
        """The forces."""
        return Point(Rows(batch.forces.double()))

    def moved(self, batch: Batch, point: Point, step: Rows, key: Key) -> Moved:
        """Positions a step further."""
        return Moved(batch.positions + step.atoms, None, step.atoms)

    def write_fmax(self, batch: Batch, mask: Tensor | None, key: Key) -> None:
        """Only where an optimizer with a cell filter left the key in the batch."""
        refresh_fmax(batch, mask)

    def describe(self) -> dict[str, Any]:
        """Nothing to say."""
        return {}


class CellFilter:
    """Moves atoms and cell together."""

    needs = frozenset({"virial"})
    provides = frozenset({"cell"})

    def __init__(self, settings: CellSettings) -> None:
        self.settings = settings
        # the same generalised forces serve the convergence check and the step
        self._known: tuple[Snapshot, Point] | None = None
        self._inverse: tuple[Snapshot, Tensor] | None = None

    def start(self, batch: Batch) -> dict[str, Tensor]:
        """reference_cell (n_systems, 3, 3) Å, the cell now; pressure (n_systems,) eV/Å³."""
        return {REFERENCE: batch.cell.double().clone(), PRESSURE: self.settings.pressure.at(batch)}

    def unfit(self, batch: Batch) -> dict[int, str]:
        """Systems without volume, and those where the vector of an open axis might change."""
        cell, pbc = batch.cell.double(), batch.pbc
        length = cell.square().sum(2).sqrt()
        flat = (matrices.determinant(cell).abs() <= 1e-9 * length.prod(1)).tolist()
        # a vector changes by its components times the strain, row by row
        allowed = torch.ones(3, 3) if self.settings.mask is None else torch.tensor(self.settings.mask, dtype=torch.float64)
        rows = allowed.any(1).to(cell.device)
        changes = ((cell.abs() > 1e-8 * length[:, :, None]) & rows).any(2)
        stretched = (changes & ~pbc).tolist()
        found = {}
        for index in range(batch.n_systems):
            if flat[index]:
                found[index] = NO_VOLUME
            elif any(stretched[index]):
                axis = stretched[index].index(True)
                found[index] = (
                    f"cell vector {axis} is not periodic, and the cell filter may change it: hold its strain components still, "
                    "as cell_mask=[1, 1, 0, 0, 0, 1] does for a vector along z, or relax the system at fixed cell"
                )
        return found

    def point(self, batch: Batch, key: Key) -> Point:
        """Generalised forces, and where the cells are."""
        reference, pressure = batch.get(key(REFERENCE)), batch.get(key(PRESSURE))
        inputs = (batch.forces, batch.virial, batch.cell, reference, pressure)
        if self._known is None or not self._known[0].holds(*inputs):
            self._known = (Snapshot.of(*inputs), self._point(batch, reference, pressure))
        return self._known[1]

    def _point(self, batch: Batch, reference: Tensor, pressure: Tensor) -> Point:
        cell, virial = batch.cell, batch.virial.double()
        work = (pressure * matrices.determinant(cell).abs())[:, None, None] * matrices.identity(cell)
        virial = 0.5 * (virial + virial.transpose(1, 2)) - work
        if self._inverse is None or not self._inverse[0].holds(reference):
            self._inverse = (Snapshot.of(reference), matrices.inverse(reference))
        strain = strain_of(cell, self._inverse[1], self._factor(batch), self.settings.kind)
        forces = cell_forces(virial, strain, self.settings) / strain.factor[:, None, None]
        atoms = transformed(batch.forces.double(), strain.mapping.transpose(1, 2), Segments.of(batch))
        return Point(Rows(atoms, forces), strain)

    def _factor(self, batch: Batch) -> Tensor:
        counts = (batch.ptr[1:] - batch.ptr[:-1]).double()
        return counts if self.settings.factor is None else torch.full_like(counts, self.settings.factor)

    def moved(self, batch: Batch, point: Point, step: Rows, key: Key) -> Moved:
        """Positions and cells a step further; held atoms move with the cell, as in ASE."""
        strain = point.strain
        assert strain is not None
        assert step.cell is not None
        of = Segments.of(batch)
        mapping = mapping_at(strain.coordinates + step.cell / strain.factor[:, None, None], self.settings)
        cell = matrices.product(batch.get(key(REFERENCE)), mapping)
        before = transformed(batch.positions, strain.inverse, of)
        positions = transformed(before + step.atoms, mapping, of)
        if MOVE_MASK not in batch:
            return Moved(positions, cell, step.atoms)
        free = mobile(batch)
        assert free is not None
        positions = torch.where(free, positions, transformed(before, mapping, of))
        return Moved(positions, cell, transformed(positions, matrices.inverse(mapping), of) - before)

    def write_fmax(self, batch: Batch, mask: Tensor | None, key: Key) -> None:
        """The largest generalised force, for criteria on `fmax`."""
        write_fmax(batch, self.point(batch, key), mask)

    def describe(self) -> dict[str, Any]:
        """Settings that differ from the defaults."""
        return self.settings.shown()


def write_fmax(batch: Batch, point: Point, mask: Tensor | None) -> None:
    """Set `fmax` (n_systems,) of the systems where `mask` is true; NaN for those never looked at."""
    value = longest(point.forces, Segments.of(batch))
    old = batch.get(FMAX) if FMAX in batch else torch.full_like(value, torch.nan)
    batch.set(FMAX, keep_frozen(mask, value, old), level="system")
