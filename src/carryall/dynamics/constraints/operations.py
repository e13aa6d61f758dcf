"""The symmetry of one crystal, in the short form that averages need: pure translations apart from what turns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from carryall.dynamics.constraints.spglib import SpaceGroup
from carryall.errors import InputError


@dataclass(frozen=True, eq=False)
class Operations:
    """A space group as pure translations, and one operation for each rotation.

    Averages over the group are an average over each orbit of pure translations, then over the rotations: at most 48 terms for
    each atom of the primitive cell, however large the supercell.
    """

    number: int
    """Of the space group."""
    rotations: np.ndarray
    """(n_rotations, 3, 3) int64, each once."""
    translations: np.ndarray
    """(n_rotations, 3), fractional, of the operation that stands for each rotation."""
    pure: np.ndarray
    """(n_pure, 3), fractional: the operations without a rotation, zero among them."""
    orbit: np.ndarray
    """(n_atoms,) int64, orbit of each atom under the pure translations."""
    images: np.ndarray
    """(n_rotations, n_orbits) int64: the orbit that each orbit is taken to."""

    @property
    def trivial(self) -> bool:
        """Whether there is nothing to average over."""
        return len(self.rotations) == 1 and len(self.pure) == 1

    @property
    def free_degrees(self) -> int:
        """Dimension of the symmetric vector fields: trace of the projector, counted in characters."""
        fixed = (self.images == np.arange(self.images.shape[1])).sum(1)
        return round(float((np.trace(self.rotations, axis1=1, axis2=2) * fixed).sum()) / len(self.rotations))


def operations(group: SpaceGroup, cell: np.ndarray, fractional: np.ndarray, kinds: np.ndarray) -> Operations:
    """The short form for a crystal with this group; arguments as in `space_group`. InputError where the two do not fit."""
    turns, first = np.unique(group.rotations.reshape(-1, 9), axis=0, return_index=True)
    is_pure = (group.rotations == np.eye(3, dtype=np.int64)).all((1, 2))
    pure = group.translations[is_pure]
    rotations, translations = turns.reshape(-1, 3, 3), group.translations[first]
    members = np.unique(group.orbit, return_index=True)[1]
    images = np.empty((len(rotations), len(members)), dtype=np.int64)
    for row, (turn, shift) in enumerate(zip(rotations, translations, strict=True)):
        moved = fractional[members] @ turn.T + shift
        images[row] = group.orbit[nearest_atoms(moved, kinds[members], cell, fractional, kinds)]
    sizes = np.bincount(group.orbit)
    whole = (np.sort(images, axis=1) == np.arange(len(members))).all() and (sizes[images] == sizes).all()
    if not whole or (sizes != len(pure)).any():
        raise InputError(f"the operations of space group {group.number} do not take the atoms to each other: a smaller symprec helps")
    return Operations(group.number, rotations, translations, pure, group.orbit, images)


def nearest_atoms(
    points: np.ndarray, kinds_of_points: np.ndarray, cell: np.ndarray, fractional: np.ndarray, kinds: np.ndarray
) -> np.ndarray:
    """(n,) the atom of the same kind that is nearest to each fractional point, periodic."""
    away = fractional[None] - points[:, None]
    away -= np.round(away)
    distance = np.square(away @ cell).sum(2)
    return np.where(kinds_of_points[:, None] == kinds[None], distance, np.inf).argmin(1)


def refined(one: Operations, cell: np.ndarray, fractional: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cell (3, 3) and fractional coordinates (n_atoms, 3) that obey the operations exactly: averages over the group.

    Nothing is turned: the cell becomes C M with M symmetric, so that (C M)(C M)^T is the averaged metric.
    """
    members, orbit = np.unique(one.orbit, return_index=True)[1], one.orbit
    # each atom is the member of its orbit, a pure translation, whole cells, and an error; errors are averaged over the orbit
    away = fractional - fractional[members][orbit]
    choice = away[:, None] - one.pure[None]
    choice -= np.round(choice)
    error = choice[np.arange(len(away)), np.square(choice @ cell).sum(2).argmin(1)]
    lattice = away - error
    site = fractional[members] + _means(error, orbit)
    spread = site[orbit] + lattice
    correction = np.zeros_like(site)
    for turn, shift, image in zip(one.rotations, one.translations, one.images, strict=True):
        moved = site @ turn.T + shift
        atoms = nearest_atoms(moved, kinds[members], cell, spread, kinds)
        mismatch = moved - spread[atoms]
        correction[image] += mismatch - np.round(mismatch)
    exact = spread + (correction / len(one.rotations))[orbit]
    turns = one.rotations.astype(np.float64)
    metric = np.einsum("nji,jk,nkl->il", turns, cell @ cell.T, turns) / len(turns)
    inverse = np.linalg.inv(cell)
    sizes, axes = np.linalg.eigh(inverse @ metric @ inverse.T)
    return cell @ ((axes * np.sqrt(sizes)) @ axes.T), exact


def _means(rows: np.ndarray, group: np.ndarray) -> np.ndarray:
    total = np.zeros((group.max() + 1, rows.shape[1]))
    np.add.at(total, group, rows)
    return total / np.bincount(group)[:, None]
