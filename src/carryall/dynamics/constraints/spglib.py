"""Space-group operations by spglib. The only module that imports it."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import numpy as np

from carryall.errors import InputError, MissingDependencyError


@dataclass(frozen=True, eq=False)
class SpaceGroup:
    """Operations x -> R x + t on fractional coordinates (columns)."""

    number: int
    """1 to 230."""
    rotations: np.ndarray
    """(n, 3, 3) int64."""
    translations: np.ndarray
    """(n, 3) float64."""
    orbit: np.ndarray
    """(n_atoms,) int64; atoms that a pure translation takes to each other have the same number, 0, 1, ..."""


def import_spglib() -> ModuleType:
    """The `spglib` package; MissingDependencyError with the command that installs it."""
    try:
        import spglib
    except ImportError:
        raise MissingDependencyError(
            "FixSymmetry needs spglib, which is not installed: pip install 'carryall[symmetry]'"
        ) from None
    return spglib


def space_group(cell: np.ndarray, fractional: np.ndarray, kinds: np.ndarray, symprec: float) -> SpaceGroup:
    """The space group of a crystal: cell (3, 3) Å, rows are vectors; fractional (n_atoms, 3); kinds (n_atoms,) int, equal for atoms
    that operations may exchange; symprec in Å. InputError where spglib finds none.
    """
    spglib = import_spglib()
    reason = "no operations"
    try:
        found = spglib.get_symmetry_dataset((cell, fractional, kinds), symprec=symprec)
    except Exception as error:  # newer versions raise errors of their own, older ones return None
        found, reason = None, str(error)
    if found is None:
        raise InputError(f"spglib finds no space group with symprec {symprec:g} Å ({reason}): are atoms too close to each other?")
    _, orbit = np.unique(found.mapping_to_primitive, return_inverse=True)
    return SpaceGroup(
        int(found.number),
        np.array(found.rotations, dtype=np.int64),
        np.array(found.translations, dtype=np.float64),
        orbit.astype(np.int64),
    )
