"""Averages of vectors and tensors over the space groups of all systems of a batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from carryall.dynamics.constraints.operations import Operations
from carryall.graph.neighbor_graph import rows_times


@dataclass(frozen=True, eq=False)
class SymmetryTables:
    """The operations of the systems that have some, side by side; all others are left bit for bit.

    Numbers are those of the batch for systems and atoms; orbits and rotations are numbered through all systems.
    """

    systems: Tensor
    """(k,) systems with operations; what follows numbers them 0 ... k - 1."""
    atoms: Tensor
    """(m,) their atoms."""
    atom_system: Tensor
    """(m,)."""
    orbit: Tensor
    """(m,)."""
    orbit_size: Tensor
    """(n_orbits,) float64."""
    orbit_system: Tensor
    """(n_orbits,)."""
    source: Tensor
    """(t,) orbit of each term: every rotation of every orbit."""
    target: Tensor
    """(t,) the orbit that it is taken to."""
    turn: Tensor
    """(t,) its rotation."""
    rotations: Tensor
    """(n_rotations, 3, 3) float64."""
    rotation_system: Tensor
    """(n_rotations,)."""
    count: Tensor
    """(k,) float64, rotations of each system."""
    primitive: Tensor
    """(k, 3, 3) float64: primitive vectors are `primitive @ cell`."""
    removed_degrees: Tensor
    """(n_systems,) float64."""
    lost_translations: Tensor
    """(n_systems,) float64, which of them are translations of the whole crystal."""

    def vectors(self, cell: Tensor, rows: Tensor) -> Tensor:
        """`rows` (n_atoms, 3) averaged; cell (n_systems, 3, 3) as it is now."""
        if not len(self.systems):
            return rows
        vectors = self._vectors(cell)
        fractional = rows_times(rows.index_select(0, self.atoms), inverse_of(vectors), self.atom_system)
        orbits = fractional.new_zeros(len(self.orbit_size), 3).index_add(0, self.orbit, fractional) / self.orbit_size[:, None]
        # rows, so that R x becomes x R^T
        turned = rows_times(orbits.index_select(0, self.source), self.rotations.transpose(1, 2), self.turn)
        mean = torch.zeros_like(orbits).index_add(0, self.target, turned) / self.count[self.orbit_system][:, None]
        found = rows_times(mean.index_select(0, self.orbit), vectors, self.atom_system)
        return rows.index_copy(0, self.atoms, found.to(rows.dtype))

    def tensors(self, cell: Tensor, values: Tensor) -> Tensor:
        """`values` (n_systems, 3, 3) averaged, such as a virial."""
        if not len(self.systems):
            return values
        vectors = self._vectors(cell)
        inverse = inverse_of(vectors)
        scaled = product(product(vectors, values.index_select(0, self.systems).double()), vectors.transpose(1, 2))
        each = product(product(self.rotations.transpose(1, 2), scaled.index_select(0, self.rotation_system)), self.rotations)
        mean = torch.zeros_like(scaled).index_add(0, self.rotation_system, each) / self.count[:, None, None]
        found = product(product(inverse, mean), inverse.transpose(1, 2))
        return values.index_copy(0, self.systems, found.to(values.dtype))

    def _vectors(self, cell: Tensor) -> Tensor:
        return product(self.primitive, cell.index_select(0, self.systems).double())


def symmetry_tables(
    operations: Sequence[Operations | None], free: Sequence[np.ndarray], device: torch.device
) -> SymmetryTables:
    """Tables for systems with these operations (None, or trivial ones: left alone); free: bool for each atom of each system."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
    removed, lost = np.zeros(len(operations)), np.zeros(len(operations))
    first_atom = first_orbit = first_turn = used = 0
    for index, (one, moves) in enumerate(zip(operations, free, strict=True)):
        if one is not None and not one.trivial:
            n_turns, n_orbits = one.images.shape
            turns, orbits = np.arange(n_turns), np.arange(n_orbits)
            sizes = np.bincount(one.orbit, minlength=n_orbits)
            found = {
                "systems": [index],
                "atoms": first_atom + np.arange(len(moves)),
                "atom_system": np.full(len(moves), used),
                "orbit": first_orbit + one.orbit,
                "orbit_size": sizes.astype(float),
                "orbit_system": np.full(n_orbits, used),
                "source": first_orbit + np.tile(orbits, n_turns),
                "target": first_orbit + one.images.reshape(-1),
                "turn": first_turn + np.repeat(turns, n_orbits),
                "rotations": one.rotations.astype(float),
                "rotation_system": np.full(n_turns, used),
                "count": [float(n_turns)],
                "primitive": one.primitive[None],
            }
            for name, value in found.items():
                columns[name].append(np.asarray(value))
            removed[index] = 3.0 * moves.sum() - one.free_degrees(moves)
            lost[index] = 3.0 - one.free_translations if moves.all() else 0.0
            first_orbit, first_turn, used = first_orbit + n_orbits, first_turn + n_turns, used + 1
        first_atom += len(moves)
    tensors = {name: _joined(columns[name], *_COLUMNS[name]).to(device) for name in _COLUMNS}
    counts = {"removed_degrees": removed, "lost_translations": lost}
    return SymmetryTables(**tensors, **{name: torch.from_numpy(value).to(device) for name, value in counts.items()})


_COLUMNS: dict[str, tuple[type, tuple[int, ...]]] = {
    **dict.fromkeys(
        ("systems", "atoms", "atom_system", "orbit", "orbit_system", "source", "target", "turn", "rotation_system"),
        (np.int64, ()),
    ),
    **dict.fromkeys(("orbit_size", "count"), (np.float64, ())),
    **dict.fromkeys(("rotations", "primitive"), (np.float64, (3, 3))),
}
"""dtype and shape of a row of each table."""


def _joined(parts: list[np.ndarray], dtype: type, row: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros((0, *row), dtype), *parts]).astype(dtype))


def product(a: Tensor, b: Tensor) -> Tensor:
    """(n, 3, 3) products a b, term by term: the last bit does not depend on how many there are."""
    terms = [a[:, :, k, None] * b[:, k, None, :] for k in range(3)]
    return (terms[0] + terms[1]) + terms[2]


def inverse_of(cell: Tensor) -> Tensor:
    """(n, 3, 3) inverses by cofactors, for the same reason."""
    rows = [cell[:, (k + 1) % 3].cross(cell[:, (k + 2) % 3], dim=1) for k in range(3)]
    columns = torch.stack(rows, 2)
    first = cell[:, 0]
    determinant = (first[:, 0] * columns[:, 0, 0] + first[:, 1] * columns[:, 1, 0]) + first[:, 2] * columns[:, 2, 0]
    return columns / determinant[:, None, None]
