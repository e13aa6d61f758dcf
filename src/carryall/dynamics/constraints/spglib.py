"""Space groups by spglib. The only module that imports it."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import numpy as np

from carryall.errors import InputError, MissingDependencyError


def import_spglib() -> ModuleType:
    """The `spglib` package; MissingDependencyError with the command that installs it."""
    try:
        import spglib
    except ImportError:
        raise MissingDependencyError(
            "FixSymmetry needs spglib, which is not installed: pip install 'carryall[symmetry]'"
        ) from None
    return spglib


def symmetry_dataset(cell: np.ndarray, fractional: np.ndarray, kinds: np.ndarray, symprec: float) -> Any:
    """spglib's dataset of a crystal; InputError where it finds none.

    cell: (3, 3) Å, rows are vectors. fractional: (n_atoms, 3). kinds: (n_atoms,) int, equal for atoms that operations may
    exchange. symprec: Å.
    """
    spglib = import_spglib()
    reason = "no operations"
    try:
        with warnings.catch_warnings():
            # versions that are between returning None and raising warn at every call
            warnings.simplefilter("ignore", DeprecationWarning)
            found = spglib.get_symmetry_dataset((cell, fractional, kinds), symprec=symprec)
    except Exception as error:  # of a class that only newer versions have
        found, reason = None, str(error)
    if found is None:
        raise InputError(
            f"spglib finds no space group with symprec {symprec:g} Å ({reason}): are atoms too close to each other?"
        )
    return found
