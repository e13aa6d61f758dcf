"""Electron configurations of the elements, as the inputs of the type embedding that `use_econf_tebd` asks for.

Ground states follow from the Madelung rule (orbitals fill by n + l, then n) with the 21 known exceptions (NIST Atomic Spectra
Database, ground states; darmstadtium and roentgenium by DeePMD's table). Within a subshell, each orbital takes one electron
before any takes two (Hund). An orbital is two numbers, (-1, -1), (-1, 1) or (1, 1) for 0, 1 or 2 electrons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from carryall.data.elements import SYMBOLS
from carryall.errors import InputError, nearest

SUBSHELLS = (
    "1s", "2s", "2p", "3s", "3p", "3d", "4s", "4p", "4d", "4f", "5s", "5p", "5d", "5f", "6s", "6p", "6d", "7s", "7p",
)  # fmt: skip
"""In the order of the table: by n, then l."""

MOVED = {
    "Cr": "4s 3d", "Cu": "4s 3d",
    "Nb": "5s 4d", "Mo": "5s 4d", "Ru": "5s 4d", "Rh": "5s 4d", "Pd": "5s 4d 5s 4d", "Ag": "5s 4d",
    "La": "4f 5d", "Ce": "4f 5d", "Gd": "4f 5d", "Pt": "6s 5d", "Au": "6s 5d",
    "Ac": "5f 6d", "Th": "5f 6d 5f 6d", "Pa": "5f 6d", "U": "5f 6d", "Np": "5f 6d", "Cm": "5f 6d", "Ds": "7s 6d", "Rg": "7s 6d",
}  # fmt: skip
"""Exceptions from the Madelung rule: electrons that move, as pairs of from and to."""

DIMENSION = 118


def occupations(symbol: str) -> dict[str, int]:
    """Electrons in each of SUBSHELLS of the neutral atom; InputError for what is no element."""
    if symbol not in SYMBOLS[1:]:
        raise InputError(
            f"use_econf_tebd needs elements in type_map, got {symbol!r}{nearest(symbol, SYMBOLS)}: rename it, or turn it off"
        )
    left = SYMBOLS.index(symbol)
    found = dict.fromkeys(SUBSHELLS, 0)
    for subshell in sorted(SUBSHELLS, key=lambda name: (int(name[0]) + "spdf".index(name[1]), name[0])):
        found[subshell] = min(left, 2 * orbitals(subshell))
        left -= found[subshell]
    moved = MOVED.get(symbol, "").split()
    for source, target in zip(moved[::2], moved[1::2], strict=True):
        found[source] -= 1
        found[target] += 1
    return found


def orbitals(subshell: str) -> int:
    """2 l + 1."""
    return 2 * "spdf".index(subshell[1]) + 1


def electron_configuration(symbol: str) -> list[int]:
    """(118,) numbers -1 or 1, two for each orbital in the order of SUBSHELLS."""
    spins: list[int] = []
    for subshell, electrons in occupations(symbol).items():
        n = orbitals(subshell)
        first, second = min(electrons, n), max(electrons - n, 0)
        for orbital in range(n):
            spins += [1 if orbital < second else -1, 1 if orbital < first else -1]
    return spins


def electron_configurations(type_map: Sequence[str]) -> Tensor:
    """(n_types, 118) float64, each row of length 1."""
    table = torch.tensor([electron_configuration(symbol) for symbol in type_map], dtype=torch.float64)
    return table * (1 / math.sqrt(DIMENSION))
