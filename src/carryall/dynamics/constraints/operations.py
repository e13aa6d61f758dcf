"""The symmetry of one crystal in the short form that averages need, and the crystal brought to obey it exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from carryall.dynamics.constraints.spglib import symmetry_dataset
from carryall.errors import InputError


@dataclass(frozen=True, eq=False)
class Operations:
    """A space group in the primitive cell: one operation x -> R x + t (columns, fractional) for each rotation.

    Averages over the group are an average over each orbit of pure translations, then over the rotations: at most 48 terms for
    each atom of the primitive cell, however large the supercell, and all of the crystal's rotations whatever its shape.
    """

    number: int
    """Of the space group, 1 to 230."""
    primitive: np.ndarray
    """(3, 3): the primitive vectors are `primitive @ cell`."""
    rotations: np.ndarray
    """(n_rotations, 3, 3) int64, each once."""
    translations: np.ndarray
    """(n_rotations, 3)."""
    orbit: np.ndarray
    """(n_atoms,) int64, which atom of the primitive cell an atom is a copy of, numbered in the order of their first copies."""
    images: np.ndarray
    """(n_rotations, n_orbits) int64: the orbit that each orbit is taken to."""

    @property
    def trivial(self) -> bool:
        """Whether there is nothing to average over."""
        return len(self.rotations) == 1 and self.images.shape[1] == len(self.orbit)

    def free_degrees(self, free: np.ndarray) -> int:
        """Dimension of the symmetric motions of the free atoms (n_atoms,) bool: the trace of the projector on them."""
        stays = (self.images == np.arange(self.images.shape[1])) & free[_first(self.orbit)]
        return round(float((np.trace(self.rotations, axis1=1, axis2=2) * stays.sum(1)).sum()) / len(self.rotations))

    @property
    def free_translations(self) -> int:
        """How many translations of the whole crystal the rotations leave: 3 in P1, 1 in a polar group, mostly 0."""
        return round(float(np.trace(self.rotations, axis1=1, axis2=2).sum()) / len(self.rotations))


def find_operations(cell: np.ndarray, positions: np.ndarray, kinds: np.ndarray, symprec: float) -> Operations:
    """The space group of a crystal within `symprec` (Å): cell (3, 3), positions (n_atoms, 3) Å, kinds (n_atoms,) int, equal for
    atoms that may be exchanged. InputError where there is none that takes all atoms to each other.
    """
    found = symmetry_dataset(cell, positions @ np.linalg.inv(cell), kinds, symprec)
    orbit = _renumbered(np.asarray(found.mapping_to_primitive))
    members = _first(orbit)
    multiple = np.round(cell @ np.linalg.inv(np.asarray(found.primitive_lattice)))
    if round(abs(np.linalg.det(multiple))) * len(members) != len(positions):
        raise _unclear(found)
    primitive = np.linalg.inv(multiple)
    vectors = primitive @ cell
    site = positions[members] @ np.linalg.inv(vectors)
    group = symmetry_dataset(vectors, site, kinds[members], symprec)
    rotations = np.array(group.rotations, dtype=np.int64)
    if len(np.unique(rotations.reshape(-1, 9), axis=0)) < len(rotations):
        raise _unclear(group)
    translations = np.array(group.translations, dtype=np.float64)
    images = np.array(
        [
            _nearest(site @ turn.T + shift, kinds[members], vectors, site, kinds[members])
            for turn, shift in zip(rotations, translations, strict=True)
        ]
    )
    if (np.sort(images, axis=1) != np.arange(len(members))).any():
        raise _unclear(group)
    return Operations(int(group.number), primitive, rotations, translations, orbit, images)


def refined(one: Operations, cell: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cell (3, 3) and positions (n_atoms, 3) that obey the operations exactly: averages over the group.

    Nothing is turned as a whole: the primitive vectors P become P M, M symmetric, so that (P M)(P M)^T is the averaged metric.
    """
    vectors = one.primitive @ cell
    fractional, members = positions @ np.linalg.inv(vectors), _first(one.orbit)
    away = fractional - fractional[members][one.orbit]
    lattice = np.round(away)
    site = fractional[members] + _means(away - lattice, one.orbit)
    correction = np.zeros_like(site)
    for turn, shift, image in zip(one.rotations, one.translations, one.images, strict=True):
        mismatch = site @ turn.T + shift - site[image]
        correction[image] += mismatch - np.round(mismatch)
    site = site + correction / len(one.rotations)
    turns = one.rotations.astype(np.float64)
    metric = np.einsum("nji,jk,nkl->il", turns, vectors @ vectors.T, turns) / len(turns)
    inverse = np.linalg.inv(vectors)
    sizes, axes = np.linalg.eigh(inverse @ metric @ inverse.T)
    exact = vectors @ ((axes * np.sqrt(sizes)) @ axes.T)
    return np.round(np.linalg.inv(one.primitive)) @ exact, (site[one.orbit] + lattice) @ exact


def _nearest(
    points: np.ndarray, kinds_of_points: np.ndarray, vectors: np.ndarray, sites: np.ndarray, kinds: np.ndarray
) -> np.ndarray:
    """(n,) the site of the same kind that is nearest to each fractional point, periodic."""
    away = sites[None] - points[:, None]
    away -= np.round(away)
    distance = np.square(away @ vectors).sum(2)
    return np.where(kinds_of_points[:, None] == kinds[None], distance, np.inf).argmin(1)


def _means(rows: np.ndarray, group: np.ndarray) -> np.ndarray:
    total = np.zeros((group.max() + 1, rows.shape[1]))
    np.add.at(total, group, rows)
    return total / np.bincount(group)[:, None]


def _first(group: np.ndarray) -> np.ndarray:
    return np.unique(group, return_index=True)[1]


def _renumbered(group: np.ndarray) -> np.ndarray:
    """Groups numbered 0, 1, ... in the order in which they first appear."""
    names, first, index = np.unique(group, return_index=True, return_inverse=True)
    rank = np.empty(len(names), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(names))
    return rank[index]


def _unclear(found: Any) -> InputError:
    return InputError(
        f"the operations of space group {found.number} do not take all atoms to each other: choose a symprec that is clearly "
        "larger than the disorder, and clearly smaller than the distances between atoms"
    )
