"""Which key of a file holds the energy, the forces and the stress that a potential learns from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from carryall.errors import InputError, nearest

PREFIXES = ("REF_", "dft_", "DFT_", "")
"""Prefixes of label keys, the most explicit first; the plain key often is a prediction."""

ENERGY_KEYS = tuple(f"{prefix}energy" for prefix in PREFIXES)
FORCES_KEYS = tuple(f"{prefix}{name}" for prefix in PREFIXES for name in ("forces", "force"))
STRESS_KEYS = tuple(f"{prefix}{name}" for prefix in PREFIXES for name in ("stress", "virials", "virial"))
"""A stress has ASE's sign; a virial is -volume * stress, in eV."""

_VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))


@dataclass(frozen=True)
class LabelKeys:
    """Keys that the user chose; None takes the first of the usual keys that is present. A stress key may name a virial."""

    energy: str | None = None
    forces: str | None = None
    stress: str | None = None


def take_labels(
    info: dict[str, Any], columns: dict[str, np.ndarray], cell: np.ndarray | None, keys: LabelKeys
) -> dict[str, np.ndarray]:
    """Labels by field name ("energy", "forces", "stress"), taken out of `info` and `columns`.

    A virial becomes a stress by the volume of `cell`; without a cell it stays in `info`, or is an InputError when chosen.
    """
    labels: dict[str, np.ndarray] = {}
    if name := _choose("energy", keys.energy, ENERGY_KEYS, info):
        labels["energy"] = _numbers(name, info.pop(name))
    if name := _choose("forces", keys.forces, FORCES_KEYS, columns):
        labels["forces"] = columns.pop(name)
    usual = STRESS_KEYS if cell is not None else [key for key in STRESS_KEYS if not _is_virial(key)]
    if name := _choose("stress", keys.stress, usual, info):
        matrix = _matrix(name, info[name])
        if _is_virial(name):
            if cell is None:
                raise InputError(f"{name} cannot become a stress: the structure has no cell, hence no volume")
            matrix = -matrix / abs(np.linalg.det(cell))
        del info[name]
        labels["stress"] = matrix
    return labels


def full_stress(values: Any) -> np.ndarray:
    """(3, 3) of 9 values or of 6 in Voigt order xx, yy, zz, yz, xz, xy."""
    return _matrix("stress", values)


def _choose(label: str, chosen: str | None, usual: Sequence[str], present: Collection[str]) -> str | None:
    if chosen is None:
        return next((key for key in usual if key in present), None)
    if chosen not in present:
        found = ", ".join(sorted(present)) or "none"
        raise InputError(f"{label}_key is {chosen!r}, which is not there{nearest(chosen, present)} (there are: {found})")
    return chosen


def _is_virial(name: str) -> bool:
    return "virial" in name.lower()


def _numbers(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise InputError(f"{name} is {value!r}: expected a number")
    return array.astype(np.float64)


def _matrix(name: str, value: Any) -> np.ndarray:
    array = _numbers(name, value)
    if array.size == 9:
        return array.reshape(3, 3)
    if array.shape == (6,):
        matrix = np.zeros((3, 3))
        for entry, (i, j) in zip(array, _VOIGT, strict=True):
            matrix[i, j] = matrix[j, i] = entry
        return matrix
    raise InputError(f"{name} has {array.size} values: expected 9, or 6 in Voigt order")
