"""Energies, forces and virials of structures: the plain call, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from carryall.data.atomic_data import AtomicData
from carryall.errors import InputError, nearest
from carryall.graph.neighbor_search import graph_from_structures
from carryall.graph.potential import Potential

PROPERTIES = ("energy", "forces", "virial", "stress", "atomic_energy", "atomic_virial", "magnetic_forces")
MAX_ATOMS = 4096  # in one call of the potential, where structures are smaller than that


def evaluate(
    potential: Potential,
    structures: Any,
    properties: Sequence[str] = ("energy", "forces", "virial"),
    *,
    atomic_virial: Literal["neighbor", "half"] = "neighbor",
    max_atoms: int = MAX_ATOMS,
) -> list[dict[str, np.ndarray]]:
    """One dict of float64 arrays (eV, Å) for each structure, in input order.

    `structures`: ase.Atoms or AtomicData, one or many. energy (), forces (n, 3), virial (3, 3), stress (3, 3, eV/Å^3, ASE's
    sign; needs three periodic axes), atomic_energy (n,), atomic_virial (n, 3, 3): an edge's whole term given to its neighbour
    (DeePMD's convention), or "half" to each end; magnetic_forces (n, 3), eV per unit of spin, of potentials that take spins.
    Those are the structures' `spins`, (n, 3); see carryall.data.extra_inputs for what else a potential may take. InputError
    names the structure by its index.
    """
    for name in properties:
        if name not in PROPERTIES:
            raise InputError(f"unknown property {name!r}{nearest(name, PROPERTIES)}: known are {', '.join(PROPERTIES)}")
    if "magnetic_forces" in properties and not potential.spec.spin:
        raise InputError("the potential takes no spins, so it has no magnetic_forces: ask for other properties")
    items = as_structures(structures)
    out: list[dict[str, np.ndarray]] = []
    for first, last in batches([one.n_atoms for one in items], max_atoms):
        wanted = atomic_virial if "atomic_virial" in properties else False
        out += _evaluate_batch(potential, items[first:last], properties, first, wanted)
    return out


def as_structures(structures: Any) -> list[AtomicData]:
    """A list of AtomicData from one or many ase.Atoms or AtomicData."""
    many = structures if isinstance(structures, list | tuple) else [structures]
    return [one if isinstance(one, AtomicData) else AtomicData.from_ase(one) for one in many]


def batches(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Consecutive ranges whose sizes add up to at most `limit` (a larger item stands alone)."""
    ranges: list[tuple[int, int]] = []
    first, total = 0, 0
    for index, size in enumerate(sizes):
        if index > first and total + size > limit:
            ranges.append((first, index))
            first, total = index, 0
        total += size
    return [*ranges, (first, len(sizes))] if sizes else []


def _evaluate_batch(
    potential: Potential,
    items: list[AtomicData],
    properties: Sequence[str],
    offset: int,
    atomic_virial: Literal[False, "neighbor", "half"],
) -> list[dict[str, np.ndarray]]:
    try:
        graph = graph_from_structures(items, potential.spec.cutoff, potential.spec.type_map, wrap=True)
    except InputError:
        for index, one in enumerate(items):
            try:
                graph_from_structures([one], potential.spec.cutoff, potential.spec.type_map)
            except InputError as error:
                raise InputError(f"structure {offset + index}: {str(error).removeprefix('system 0: ')}") from None
        raise
    raw = {key: value.cpu().numpy() for key, value in potential(graph, atomic_virial=atomic_virial).items()}
    results = []
    start = 0
    for index, one in enumerate(items):
        rows = slice(start, start + one.n_atoms)
        start += one.n_atoms
        found: dict[str, np.ndarray] = {}
        for name in properties:
            if name == "stress":
                if one.cell is None or not bool(one.pbc.all()):
                    raise InputError(
                        f"structure {offset + index} is not periodic along all axes: it has no stress; ask for the virial"
                    )
                found[name] = -raw["virial"][index] / float(one.cell.double().det().abs())
            else:
                found[name] = np.array(raw[name][index] if name in ("energy", "virial") else raw[name][rows])
        results.append(found)
    return results
