"""A potential in a LAMMPS of one's own. Alone: `python attach.py`; on two ranks: `mpirun -n 2 python attach.py`."""

from __future__ import annotations

import carryall
from carryall.engines.lammps import attach, new_lammps

lmp = new_lammps(args=("-log", "none", "-screen", "none"))  # LAMMPS' own class, on all ranks of mpirun
lmp.commands_string("""
units metal
lattice fcc 3.61
region box block 0 4 0 4 0 4
create_box 1 box
create_atoms 1 box
mass 1 63.546
velocity all create 300 12345 loop geom
fix move all nve
""")

attached = attach(lmp, carryall.load("sutton-chen"), elements=["Cu"])  # or the path of a packed file

lmp.command("run 0")
before = lmp.get_thermo("etotal")
lmp.command("run 50")
if lmp.extract_setting("world_rank") == 0:
    print(f"{lmp.extract_setting('world_size')} rank(s), {attached.n_calls} evaluations")
    print(f"total energy moved by {lmp.get_thermo('etotal') - before:.2e} eV in 50 steps")
