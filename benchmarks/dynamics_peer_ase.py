"""ASE's half of benchmarks/dynamics.py: one system after the other, and the check of what others have relaxed."""

from __future__ import annotations

from typing import Any

import ase
import numpy as np
from ase import Atoms, units
from ase.calculators.lj import LennardJones
from ase.md.verlet import VelocityVerlet
from ase.neighborlist import neighbor_list
from ase.optimize import FIRE
from dynamics_common import (
    CUTOFF,
    EPSILON,
    FMAX,
    MOST_STEPS,
    SIGMA,
    TIMESTEP,
    NotHereError,
    Relaxed,
    Simulation,
    Structures,
    serve,
)

AT_CUTOFF = 4 * EPSILON * ((SIGMA / CUTOFF) ** 12 - (SIGMA / CUTOFF) ** 6)
"""ASE shifts each pair's energy by this."""
SAMPLE = 3
SAMPLE_OF_RELAXATIONS = 40


def atoms_of(structures: Structures, index: int, velocities: bool = True) -> Atoms:
    """With its calculator."""
    one = structures.one(index)
    atoms = Atoms("Ar" * len(one.positions), positions=one.positions, cell=one.cell[0], pbc=True)
    if velocities:
        atoms.set_velocities(one.velocities)
    atoms.calc = LennardJones(sigma=SIGMA, epsilon=EPSILON, rc=CUTOFF)
    return atoms


def energy_of(atoms: Atoms) -> float:
    """Without ASE's shift."""
    return float(atoms.get_potential_energy()) + AT_CUTOFF * len(neighbor_list("i", atoms, CUTOFF)) / 2


def part_of(structures: Structures, systems: range) -> float:
    """Part of the atoms that these systems hold."""
    sizes = np.diff(structures.ptr)
    return float(sizes[list(systems)].sum() / sizes.sum())


def start(structures: Structures, kind: str, option: dict[str, Any]) -> Simulation:
    """The first systems, one of each size."""
    systems = range(min(SAMPLE, len(structures)))
    images = [atoms_of(structures, index, velocities=kind == "nve") for index in systems]
    if kind == "nve":
        movers: list[Any] = [VelocityVerlet(atoms, TIMESTEP * units.fs) for atoms in images]
    elif kind == "fire":
        movers = [FIRE(atoms, logfile=None) for atoms in images]
    else:
        raise NotHereError(kind)

    def run(steps: int) -> None:
        for mover in movers:
            mover.run(steps) if kind == "nve" else mover.run(fmax=0.0, steps=steps)

    return Simulation(run, lambda: [energy_of(atoms) for atoms in images], systems, part_of(structures, systems))


def relax(structures: Structures, option: dict[str, Any]) -> Relaxed:
    """A sample, spread over all."""
    found = Relaxed.empty(len(structures))
    systems = range(0, len(structures), max(1, len(structures) // SAMPLE_OF_RELAXATIONS))
    found.own_steps, found.part = 0, part_of(structures, systems)
    for index in systems:
        atoms = atoms_of(structures, index, velocities=False)
        mover = FIRE(atoms, logfile=None)
        if mover.run(fmax=FMAX, steps=MOST_STEPS):
            found.positions[index], found.energies[index] = atoms.positions, energy_of(atoms)
        found.own_steps += mover.nsteps
    found.note = f"{len(systems)} relaxed, scaled"
    return found


def check(structures: Structures, relaxed: str, sample: int) -> dict[str, Any]:
    """Forces and energies of relaxed structures, evaluated here, beside what their engine says."""
    forces, off = [], []
    with np.load(relaxed) as stored:
        index, energies = stored["index"], stored["energies"]
        ends = np.cumsum(np.diff(structures.ptr)[index]) if len(index) else np.zeros(0, dtype=int)
        images = np.split(stored["positions"], ends[:-1])
    for place in range(0, len(index), max(1, len(index) // sample)):
        atoms = atoms_of(structures, int(index[place]), velocities=False)
        atoms.positions = images[place]
        forces.append(float(np.linalg.norm(atoms.get_forces(), axis=1).max()))
        off.append(abs(energy_of(atoms) - float(energies[place])))
    return {"checked": len(forces), "worst_fmax": max(forces, default=0.0), "worst_energy": max(off, default=0.0)}


if __name__ == "__main__":
    serve(start, lambda: {"ase": ase.__version__}, relax, check=check)
