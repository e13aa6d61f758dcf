"""MACE's half of the live comparison: run by its own Python, alone and under mpirun, by test_mace_live.py.

    mpirun -n P python mace_live_peer.py FOLDER      all cases in LAMMPS on P ranks, FOLDER/ranks_P.npz
    python mace_live_peer.py FOLDER reference        the same cases by MACE's own ASE calculator, FOLDER/reference.npz

Models are made here, with random weights of a seed; nothing is downloaded.
"""

from __future__ import annotations

import os
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
warnings.filterwarnings("ignore")
import mace  # noqa: E402, F401, before e3nn
import numpy as np  # noqa: E402
import torch  # noqa: E402
from e3nn import o3, set_optimization_defaults  # noqa: E402
from mace import modules  # noqa: E402

from carryall.models.mliap import MACEPotential, MLIAPPotential  # noqa: E402

set_optimization_defaults(jit_script_fx=False)  # compiling for seconds does not pay here
SYMBOLS, NUMBERS, MASSES = ("Cu", "Au"), (29, 79), (63.546, 196.96657)
CUTOFF = 4.0
STEPS = 50
FCC = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])


@cache
def model(name: str) -> torch.nn.Module:
    """MACE with random weights."""
    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    dtype = torch.float32 if name == "float32" else torch.float64
    torch.manual_seed(3)
    torch.set_default_dtype(dtype)
    made = modules.ScaleShiftMACE(
        r_max=CUTOFF,
        num_bessel=6,
        num_polynomial_cutoff=5,
        max_ell=2,
        interaction_cls=block,
        interaction_cls_first=block,
        num_interactions=3 if name == "three" else 2,
        num_elements=2,
        hidden_irreps=o3.Irreps("8x0e + 8x1o"),
        MLP_irreps=o3.Irreps("8x0e"),
        gate=torch.nn.functional.silu,
        atomic_energies=np.array([-1.0, -2.0]),
        avg_num_neighbors=12.0,
        atomic_numbers=list(NUMBERS),
        correlation=2,
        atomic_inter_scale=1.3,
        atomic_inter_shift=0.1,
    )
    torch.set_default_dtype(torch.float64)
    return made


def structure(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Positions, types and cell (None: a cluster)."""
    rng = np.random.default_rng(11)
    repeats = {"small": (2, 1, 1), "tilted": (2, 2, 2), "long": (4, 2, 2), "cluster": (2, 1, 1)}[name]
    corners = np.stack(np.meshgrid(*[np.arange(k) for k in repeats], indexing="ij"), -1).reshape(-1, 1, 3)
    positions = (corners + FCC).reshape(-1, 3) * 3.9
    positions += 0.08 * rng.normal(size=positions.shape)
    types = rng.integers(0, 2, len(positions))
    if name == "cluster":
        return positions, types, None
    cell = np.diag(3.9 * np.array(repeats))
    if name == "tilted":
        tilt = np.array([[1.0, 0, 0], [0.13, 1.0, 0], [-0.08, 0.07, 1.0]])
        return positions @ tilt, types, cell @ tilt
    return positions, types, cell


CASES = [("two", "small"), ("two", "tilted"), ("two", "cluster"), ("three", "tilted"), ("three", "long"), ("three", "cluster")]
CASES += [("float32", "tilted"), ("wrapped", "tilted"), ("wrapped", "cluster")]
MOVING = ("two", "long")


def reference() -> dict[str, np.ndarray]:
    """What MACE's own calculator says."""
    import ase
    from mace.calculators import MACECalculator

    found: dict[str, np.ndarray] = {}
    for name, place in CASES:
        positions, types, cell = structure(place)
        atoms = ase.Atoms(np.array(NUMBERS)[types], positions, cell=cell, pbc=cell is not None)
        dtype = "float32" if name == "float32" else "float64"
        atoms.calc = MACECalculator(models=[model(name)], device="cpu", default_dtype=dtype)
        key = f"{name}/{place}"
        found[f"{key}/energy"] = np.array(atoms.get_potential_energy())
        found[f"{key}/forces"] = atoms.get_forces()
        if cell is not None:
            found[f"{key}/virial"] = -atoms.get_stress(voigt=False) * atoms.get_volume()
        torch.set_default_dtype(torch.float64)
    return found


def potential(name: str) -> Any:
    """Ours of that name."""
    if name != "wrapped":
        return MACEPotential(model(name))
    from mace.calculators.lammps_mliap_mace import LAMMPS_MLIAP_MACE

    return MLIAPPotential(LAMMPS_MLIAP_MACE(model(name)))


def start(place: str, velocities: np.ndarray | None = None) -> Any:
    """A LAMMPS with the structure in it."""
    from carryall.engines.lammps import new_lammps

    positions, types, cell = structure(place)
    lmp = new_lammps(args=("-screen", "none", "-log", "none", "-nocite"))
    lmp.commands_string("units metal\natom_modify map array")
    if cell is None:
        low, high = positions.min(0) - 1.0, positions.max(0) + 40.0
        lmp.command("boundary f f f")
        lmp.command("region box block " + " ".join(f"{a:.17g} {b:.17g}" for a, b in zip(low, high, strict=True)))
    else:
        (xx, *_), (xy, yy, _), (xz, yz, zz) = cell
        lmp.command(f"region box prism 0 {xx:.17g} 0 {yy:.17g} 0 {zz:.17g} {xy:.17g} {xz:.17g} {yz:.17g}")
        # into the box, as every rank of LAMMPS expects of atoms that it is given
        fractional = positions @ np.linalg.inv(cell)
        positions = (fractional - np.floor(fractional)) @ cell
    lmp.commands_string("box tilt large\ncreate_box 2 box")
    for number, mass in enumerate(MASSES, 1):
        lmp.command(f"mass {number} {mass}")
    speeds = None if velocities is None else velocities.ravel().tolist()
    lmp.create_atoms(len(types), list(range(1, len(types) + 1)), (types + 1).tolist(), positions.ravel().tolist(), speeds)
    lmp.commands_string("compute stress all pressure NULL virial\nthermo_style custom step pe c_stress[*]")
    return lmp


def results(lmp: Any) -> dict[str, np.ndarray]:
    """Energy, forces and virial of the last step, by atom id."""
    from lammps import LMP_STYLE_GLOBAL, LMP_TYPE_VECTOR

    xx, yy, zz, xy, xz, yz = lmp.extract_compute("stress", LMP_STYLE_GLOBAL, LMP_TYPE_VECTOR)[:6]
    return {
        "energy": np.array(lmp.get_thermo("pe")),
        "forces": np.array(lmp.gather_atoms("f", 1, 3)[:]).reshape(-1, 3),
        "virial": np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]) * lmp.get_thermo("vol") / 1.6021765e6,
    }


def ranks(folder: Path) -> None:
    """All cases on the ranks of this run; the first writes."""
    from mpi4py import MPI

    from carryall.engines.lammps import attach

    world = MPI.COMM_WORLD
    found: dict[str, np.ndarray] = {}
    for name, place in CASES:
        lmp = start(place)
        attach(lmp, potential(name), elements=list(SYMBOLS))
        lmp.command("run 0")
        found |= {f"{name}/{place}/{key}": value for key, value in results(lmp).items()}
        found[f"{name}/{place}/owned"] = np.array(world.allgather(lmp.extract_global("nlocal")))
        lmp.close()
    if world.size <= 2:
        found |= trajectory(world)
    if world.rank == 0:
        np.savez(folder / f"ranks_{world.size}.npz", **found)


def trajectory(world: Any) -> dict[str, np.ndarray]:
    """Hot atoms for 50 steps: where they end, what acts on them, and how many went to another rank."""
    from carryall.engines.lammps import attach

    name, place = MOVING
    n = len(structure(place)[1])
    velocities = np.random.default_rng(2).normal(scale=18.0, size=(n, 3))  # Å/ps
    lmp = start(place, velocities - velocities.mean(0))
    attach(lmp, potential(name), elements=list(SYMBOLS))
    lmp.commands_string("timestep 0.002\nneighbor 0.5 bin\nneigh_modify every 1 delay 0 check yes\nfix move all nve")
    lmp.command("run 0")
    before = set(lmp.extract_atom("id")[: lmp.extract_global("nlocal")])
    lmp.command(f"run {STEPS}")
    after = set(lmp.extract_atom("id")[: lmp.extract_global("nlocal")])
    out = {f"moving/{key}": value for key, value in results(lmp).items()}
    out["moving/positions"] = np.array(lmp.gather_atoms("x", 1, 3)[:]).reshape(-1, 3)
    out["moving/migrated"] = np.array(world.allreduce(len(after - before)))
    lmp.close()
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    if sys.argv[2:] == ["reference"]:
        np.savez(where / "reference.npz", **reference())
    else:
        ranks(where)
