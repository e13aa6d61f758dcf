"""Structures that engines are compared on: made for a potential from its elements and cutoff, and the user's own.

The made ones are what engines handle differently: a box, a tilted box smaller than two cutoffs, one atom that sees its own
images, a slab, and a cluster without a cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from carryall.data import AtomicData, read_structures
from carryall.data.elements import atomic_number
from carryall.data.extra_inputs import input_extras
from carryall.errors import InputError
from carryall.graph.neighbor_search import graph_from_structures
from carryall.graph.potential import PotentialSpec, with_defaults
from carryall.properties.evaluate import as_structures

# fmt: off
# Covalent radii, Å: B. Cordero et al., Dalton Trans. 2832 (2008), by atomic number from 1 to 96; of noble gases, which do not
# bind, half the distance of neighbours in their crystals.
RADII = (
    0.31, 1.48, 1.28, 0.96, 0.84, 0.76, 0.71, 0.66, 0.57, 1.57, 1.66, 1.41, 1.21, 1.11, 1.07, 1.05, 1.02, 1.88, 2.03, 1.76, 1.7,
    1.6, 1.53, 1.39, 1.39, 1.32, 1.26, 1.24, 1.32, 1.22, 1.22, 1.2, 1.19, 1.2, 1.2, 2.0, 2.2, 1.95, 1.9, 1.75, 1.64, 1.54, 1.47,
    1.46, 1.42, 1.39, 1.45, 1.44, 1.42, 1.39, 1.39, 1.38, 1.39, 2.17, 2.44, 2.15, 2.07, 2.04, 2.03, 2.01, 1.99, 1.98, 1.98,
    1.96, 1.94, 1.92, 1.92, 1.89, 1.9, 1.87, 1.87, 1.75, 1.7, 1.62, 1.51, 1.44, 1.41, 1.36, 1.36, 1.32, 1.45, 1.46, 1.48, 1.4,
    1.5, 2.2, 2.6, 2.21, 2.15, 2.06, 2.0, 1.96, 1.9, 1.87, 1.8, 1.69,
)
# fmt: on
HEAVIER = 1.7  # Å, beyond the table
LEAST_SPACING = 2.1  # Å: about 9 Å³ an atom, as in liquid water
CLOSEST = 0.9
"""Two atoms are never closer than this times the sum of their radii, unless the cutoff is too short for that."""
MOST_ELEMENTS = 4
"""In one structure: the next one takes the following elements."""
TILT = np.array([[1.0, 0.0, 0.0], [0.25, 1.0, 0.0], [-0.2, 0.15, 1.0]])
"""Rows of a tilted cell in units of its spacing; no site of the lattice is closer to another than 1."""


def made_structures(spec: PotentialSpec, seed: int = 0) -> dict[str, AtomicData]:
    """Structures by name, with values of the inputs that the potential takes and has no defaults of; the same for one seed."""
    rng = np.random.default_rng(seed)
    symbols = cycle(spec.type_map)
    kinds: dict[str, Any] = {"box": _box, "tilted box": _tilted, "one atom": _one_atom, "slab": _slab, "cluster": _cluster}
    found = {}
    for name, make in kinds.items():
        if spec.long_range and name in ("slab", "cluster"):  # sums over reciprocal vectors need three periodic axes
            continue
        count = 1 if name == "one atom" else min(MOST_ELEMENTS, len(spec.type_map))
        numbers = np.array([atomic_number(symbol) for symbol in islice(symbols, count)])
        data = make(numbers, spec.cutoff, rng)
        found[name] = AtomicData(*data, **_inputs(spec, len(data[1]), rng))
    return found


def radius(number: int) -> float:
    """Å, of an element."""
    return RADII[number - 1] if number <= len(RADII) else HEAVIER


def spacing(numbers: np.ndarray, cutoff: float) -> float:
    """Å, between sites: that of neighbours of the largest element, but never so wide that nobody has one."""
    return min(max(2 * max(map(radius, numbers)), LEAST_SPACING), 0.6 * cutoff)


def users_structures(structures: Any, spec: PotentialSpec, most: int) -> dict[str, AtomicData]:
    """At most `most` of the user's structures, spread evenly, by name; InputError for one that the potential cannot take."""
    origin = "structure"
    if isinstance(structures, str | Path):
        origin = f"{Path(structures).name}:"
        structures = read_structures(structures)
    items = as_structures(structures)
    if not items or most < 1:
        raise InputError(f"no structures to verify on: {len(items)} given, at most {most} wanted")
    chosen = sorted({round(place) for place in np.linspace(0, len(items) - 1, min(most, len(items)))})
    found = {}
    for index in chosen:
        name, one = f"{origin}{index}" if origin.endswith(":") else f"{origin} {index}", items[index]
        # labels and everything else that no engine reads would only be in the way
        plain = AtomicData(one.positions.double(), one.atomic_numbers, _double(one.cell), one.pbc, **input_extras(one))
        try:
            with_defaults(graph_from_structures([plain], spec.cutoff, spec.type_map), spec)
        except InputError as error:
            raise InputError(f"{name}: {str(error).removeprefix('system 0: ')}") from None
        found[name] = plain
    return found


def _double(cell: Tensor | None) -> Tensor | None:
    return None if cell is None else cell.double()


Made = tuple[np.ndarray, np.ndarray, np.ndarray | None, Sequence[bool] | None]
"""Positions (n, 3), atomic numbers (n,), cell (3, 3) and pbc."""


def _box(numbers: np.ndarray, cutoff: float, rng: np.random.Generator) -> Made:
    a = spacing(numbers, cutoff)
    # one side beyond two cutoffs, so that ranks differ; more atoms would only take longer
    length, width = (int(np.clip(np.ceil(times * cutoff / a), *bounds)) for times, bounds in ((2.2, (3, 8)), (1.1, (2, 5))))
    return (*_lattice((length, width, max(2, width - 1)), a * np.eye(3), numbers, rng), None)


def _tilted(numbers: np.ndarray, cutoff: float, rng: np.random.Generator) -> Made:
    a = spacing(numbers, cutoff)
    count = int(np.clip(1.6 * cutoff / a, 1, 3))
    turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    turn *= np.sign(np.linalg.det(turn))
    return (*_lattice((count, count, max(1, count - 1)), a * TILT @ turn, numbers, rng), None)


def _slab(numbers: np.ndarray, cutoff: float, rng: np.random.Generator) -> Made:
    a = spacing(numbers, cutoff)
    positions, kinds, cell = _lattice((4, 3, 2), a * np.eye(3), numbers, rng)
    cell[2, 2] += 1.5 * cutoff
    return positions, kinds, cell, (True, True, False)


def _cluster(numbers: np.ndarray, cutoff: float, rng: np.random.Generator) -> Made:
    positions, kinds, _ = _lattice((3, 2, 2), spacing(numbers, cutoff) * np.eye(3), numbers, rng)
    return positions, kinds, None, None


def _one_atom(numbers: np.ndarray, cutoff: float, rng: np.random.Generator) -> Made:
    return (*_lattice((1, 1, 1), spacing(numbers, cutoff) * TILT, numbers, rng), None)


def _lattice(
    counts: tuple[int, int, int], vectors: np.ndarray, numbers: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, atomic numbers and cell: each atom anywhere in a sphere around its site that is wider for a smaller one."""
    sites = np.stack(np.meshgrid(*map(np.arange, counts), indexing="ij"), -1).reshape(-1, 3) @ vectors
    kinds = rng.permutation(np.resize(numbers, len(sites)))
    a = np.linalg.norm(vectors[0])
    room = np.maximum(a / 2 - CLOSEST * np.array([radius(kind) for kind in kinds]), 0.05 * a)
    direction = rng.standard_normal(sites.shape)
    moves = direction / np.linalg.norm(direction, axis=1, keepdims=True) * rng.random((len(sites), 1)) ** (1 / 3)
    return sites + room[:, None] * moves, kinds, np.diag(counts).astype(float) @ vectors


def _inputs(spec: PotentialSpec, n_atoms: int, rng: np.random.Generator) -> dict[str, Any]:
    """Values of what the potential takes beside the geometry, where it has no defaults."""
    system: dict[str, Any] = {}
    if spec.dim_fparam and spec.default_fparam is None:
        system["fparam"] = rng.random(spec.dim_fparam)
    if spec.dim_chg_spin and spec.default_chg_spin is None:
        # neutral, all spins paired
        system["charge_spin"] = np.resize([0.0, 1.0], spec.dim_chg_spin)
    found: dict[str, Any] = {"system_extras": system}
    if spec.dim_aparam:
        found["atom_extras"] = {"aparam": rng.random((n_atoms, spec.dim_aparam))}
    if spec.spin:
        found["spins"] = rng.standard_normal((n_atoms, 3))
    return found
