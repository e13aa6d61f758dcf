"""Make the shipped data set: liquid water labelled by GFN1-xTB, sampled by its own molecular dynamics.

    pip install "carryall[xtb,ase]"
    python scripts/make_water_dataset.py sample RUNDIR --chain a     # about 45 minutes on one core
    python scripts/make_water_dataset.py sample RUNDIR --chain b     # may run at the same time on the other core
    python scripts/make_water_dataset.py check RUNDIR                # labels against finite differences
    python scripts/make_water_dataset.py assemble RUNDIR src/carryall/assets/water

Method: C. Bannwarth et al., WIREs Comput. Mol. Sci. 11, e1493 (2021) (GFN1-xTB: S. Grimme et al., JCTC 13, 1989 (2017)),
as implemented by tblite. Periodic boxes of 21 molecules. Sampling is Langevin dynamics with hydrogens of 4 amu: classical
configurational averages do not depend on masses, and the heavier hydrogen allows 1.5 fs steps. A frame is kept every 30 fs.
Each chain starts from randomly turned molecules on a grid, is melted at 600 K and cooled stage by stage; stages marked
`keep=False` are equilibration and are thrown away.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.optimize import FIRE

N_MOLECULES = 21
MOLAR_MASS = 18.01528  # g/mol
TIMESTEP_FS = 1.5
SAMPLE_EVERY = 20
HYDROGEN_MASS = 4.0
FORCE_LIMIT = 25.0  # eV/A: a frame above it is not kept


@dataclass(frozen=True)
class Stage:
    """One stretch of dynamics at one density (g/cm^3) and temperature (K)."""

    density: float
    temperature: float
    n_steps: int
    keep: bool


CHAINS: dict[str, tuple[Stage, ...]] = {
    "a": (
        Stage(1.00, 600, 500, False),
        Stage(1.00, 600, 700, True),
        Stage(1.00, 450, 200, False),
        Stage(1.00, 450, 700, True),
        Stage(1.00, 330, 500, False),
        Stage(1.00, 330, 2200, True),
        Stage(1.10, 600, 200, False),
        Stage(1.10, 600, 500, True),
        Stage(1.10, 380, 300, False),
        Stage(1.10, 380, 600, True),
    ),
    "b": (
        Stage(0.90, 600, 500, False),
        Stage(0.90, 600, 700, True),
        Stage(0.90, 380, 300, False),
        Stage(0.90, 380, 700, True),
        Stage(1.00, 500, 300, False),
        Stage(1.00, 500, 500, True),
        Stage(1.00, 330, 500, False),
        Stage(1.00, 330, 2200, True),
    ),
}


def box_length(density: float) -> float:
    """Edge (A) of the cubic box that holds N_MOLECULES at `density` (g/cm^3)."""
    return float((N_MOLECULES * MOLAR_MASS / 0.602214076 / density) ** (1 / 3))


def random_box(density: float, rng: np.random.Generator) -> Atoms:
    """Randomly turned molecules on a cubic grid."""
    length, water, m = box_length(density), molecule("H2O"), 3
    sites = rng.permutation(m**3)[:N_MOLECULES]
    atoms = Atoms(cell=[length] * 3, pbc=True)
    for site in sites:
        one = water.copy()
        one.rotate(rng.uniform(0, 360), rng.normal(size=3))
        one.translate(np.array(np.unravel_index(site, (m, m, m))) * length / m - one.positions[0])
        atoms += one
    return atoms


def scale_molecules(atoms: Atoms, density: float) -> None:
    """Change the density, moving whole molecules (their oxygens scale with the box)."""
    new = box_length(density)
    factor = new / atoms.cell.lengths()[0]
    oxygens = np.repeat(atoms.positions[::3], 3, axis=0)
    inside = atoms.positions - oxygens
    atoms.set_cell([new] * 3)
    atoms.positions = oxygens * factor + inside


def calculator(accuracy: float = 1.0):
    from tblite.ase import TBLite

    return TBLite(method="GFN1-xTB", verbosity=0, accuracy=accuracy)


def frame_of(atoms: Atoms, chain: str, stage: int, step: int, spec: Stage) -> Atoms:
    """A labelled copy: wrapped by whole molecules, with its origin in `info`."""
    frame = Atoms(atoms.get_chemical_symbols(), atoms.positions.copy(), cell=atoms.cell, pbc=True)
    shift = np.floor(frame.positions[::3] / frame.cell.lengths()) * frame.cell.lengths()
    frame.positions -= np.repeat(shift, 3, axis=0)
    frame.calc = SinglePointCalculator(
        frame,
        energy=atoms.get_potential_energy(),
        forces=atoms.get_forces(),
        stress=atoms.get_stress(voigt=False),
    )
    frame.info = {"chain": chain, "stage": stage, "step": step, "temperature": spec.temperature, "density": spec.density}
    return frame


def sample(run: Path, chain: str) -> None:
    """Run one chain; each kept stage goes to its own file as soon as it is complete."""
    run.mkdir(parents=True, exist_ok=True)
    seed = {"a": 1, "b": 2}[chain]
    rng = np.random.default_rng(seed)
    atoms = random_box(CHAINS[chain][0].density, rng)
    masses = atoms.get_masses()
    masses[np.array(atoms.get_chemical_symbols()) == "H"] = HYDROGEN_MASS
    atoms.set_masses(masses)
    atoms.calc = calculator()
    FIRE(atoms, logfile=None, maxstep=0.1).run(fmax=1.0, steps=60)
    MaxwellBoltzmannDistribution(atoms, temperature_K=CHAINS[chain][0].temperature, rng=rng)
    for index, spec in enumerate(CHAINS[chain]):
        if abs(atoms.cell.lengths()[0] - box_length(spec.density)) > 1e-9:
            scale_molecules(atoms, spec.density)
            FIRE(atoms, logfile=None, maxstep=0.05).run(fmax=2.0, steps=20)
        frames: list[Atoms] = []
        friction = (0.02 if not spec.keep else 0.005) / units.fs
        dynamics = Langevin(atoms, TIMESTEP_FS * units.fs, temperature_K=spec.temperature, friction=friction, rng=rng)
        for step in range(SAMPLE_EVERY, spec.n_steps + 1, SAMPLE_EVERY):
            dynamics.run(SAMPLE_EVERY)
            if spec.keep and np.abs(atoms.get_forces()).max() < FORCE_LIMIT:
                frames.append(frame_of(atoms, chain, index, step, spec))
        print(f"chain {chain} stage {index} {spec} T={atoms.get_temperature():.0f} K frames={len(frames)}", flush=True)
        if frames:
            write(run / f"chain_{chain}_stage_{index}.extxyz.part", frames, format="extxyz")
            part = run / f"chain_{chain}_stage_{index}.extxyz.part"
            part.replace(run / f"chain_{chain}_stage_{index}.extxyz")


def check(run: Path, n_frames: int = 3, step: float = 1e-3) -> None:
    """Forces and stress of a few frames against central differences of the energy."""
    rng = np.random.default_rng(0)
    files = sorted(run.glob("chain_*_stage_*.extxyz"))
    worst_force = worst_stress = 0.0
    for path in rng.choice(np.array(files, dtype=object), size=min(n_frames, len(files)), replace=False):
        atoms = read(path, index=-1)
        forces, stress = atoms.get_forces(), atoms.get_stress(voigt=False)
        atoms.calc = calculator(accuracy=0.1)
        for atom, axis in zip(rng.integers(0, len(atoms), 4), rng.integers(0, 3, 4), strict=True):
            energies = []
            for sign in (1, -1):
                moved = atoms.copy()
                moved.positions[atom, axis] += sign * step
                moved.calc = atoms.calc
                energies.append(moved.get_potential_energy())
            worst_force = max(worst_force, abs(-(energies[0] - energies[1]) / (2 * step) - forces[atom, axis]))
        energies = []
        for sign in (1, -1):
            strained = atoms.copy()
            strained.set_cell(atoms.cell[:] * (1 + sign * 1e-4), scale_atoms=True)
            strained.calc = atoms.calc
            energies.append(strained.get_potential_energy())
        pressure = (energies[0] - energies[1]) / 2e-4 / atoms.get_volume()
        worst_stress = max(worst_stress, abs(pressure - np.trace(stress)))
    print(
        f"largest deviation from finite differences: forces {worst_force:.1e} eV/A, trace of stress {worst_stress:.1e} eV/A^3"
    )
    (run / "check.json").write_text(
        json.dumps({"force_error_eV_per_A": worst_force, "stress_trace_error_eV_per_A3": worst_stress})
    )


def split_of(position: float) -> str | None:
    """Which set a frame at `position` in 0..1 of its stage belongs to; gaps keep the sets decorrelated."""
    if position < 0.70:
        return "train"
    if 0.74 <= position < 0.82:
        return "validation"
    return "test" if position >= 0.86 else None


def radial_distribution(frames: list[Atoms], pair: tuple[str, str], r_max: float, n_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """g(r) from minimum-image distances (r_max below half the box)."""
    edges = np.linspace(0, r_max, n_bins + 1)
    counts = np.zeros(n_bins)
    norm = 0.0
    for frame in frames:
        symbols = np.array(frame.get_chemical_symbols())
        first, second = np.flatnonzero(symbols == pair[0]), np.flatnonzero(symbols == pair[1])
        length = frame.cell.lengths()[0]
        delta = frame.positions[first][:, None] - frame.positions[second][None]
        distance = np.linalg.norm(delta - length * np.round(delta / length), axis=-1)
        if pair[0] == pair[1]:
            distance = distance[~np.eye(len(first), dtype=bool)]
        counts += np.histogram(distance, bins=edges)[0]
        norm += distance.size / length**3
    shell = 4 / 3 * np.pi * (edges[1:] ** 3 - edges[:-1] ** 3)
    return 0.5 * (edges[1:] + edges[:-1]), counts / (norm * shell)


def assemble(run: Path, out: Path) -> None:
    """Split by time inside each stage, round, compress, write the provenance and the reference g(r)."""
    import tblite

    out.mkdir(parents=True, exist_ok=True)
    sets: dict[str, list[Atoms]] = {"train": [], "validation": [], "test": []}
    liquid: list[Atoms] = []
    for path in sorted(run.glob("chain_*_stage_*.extxyz")):
        frames = read(path, index=":")
        for index, frame in enumerate(frames):
            name = split_of(index / len(frames))
            if name is not None:
                sets[name].append(frame)
            if frame.info["temperature"] == 330 and frame.info["density"] == 1.0:
                liquid.append(frame)
    for name, frames in sets.items():
        for frame in frames:
            frame.positions = frame.positions.round(6)
            results = frame.calc.results
            results["forces"] = results["forces"].round(6)
            results["stress"] = results["stress"].round(9)
        text = out / f"{name}.extxyz"
        write(text, frames, format="extxyz")
        with gzip.GzipFile(f"{text}.gz", "wb", compresslevel=9, mtime=0) as stream:
            stream.write(text.read_bytes())
        text.unlink()
    rdf = {}
    for pair in (("O", "O"), ("O", "H"), ("H", "H")):
        r, g = radial_distribution(liquid, pair, r_max=4.2, n_bins=84)
        rdf["".join(pair)] = [round(float(value), 4) for value in g]
    rdf["r"] = [round(float(value), 4) for value in r]
    provenance = {
        "system": f"liquid water, {N_MOLECULES} molecules, periodic",
        "method": "GFN1-xTB (S. Grimme et al., J. Chem. Theory Comput. 13, 1989 (2017))",
        "code": f"tblite {getattr(tblite, '__version__', 'unknown')}, default accuracy",
        "sampling": [{"chain": chain, **stage.__dict__} for chain, stages in CHAINS.items() for stage in stages],
        "timestep_fs": TIMESTEP_FS,
        "frame_every_fs": TIMESTEP_FS * SAMPLE_EVERY,
        "hydrogen_mass_amu": HYDROGEN_MASS,
        "split": "by time inside each stage: first 70 % train, 74 to 82 % validation, last 14 % test",
        "frames": {name: len(frames) for name, frames in sets.items()},
        "finite_differences": json.loads((run / "check.json").read_text()) if (run / "check.json").exists() else None,
        "reference_rdf": {"temperature_K": 330, "density_g_cm3": 1.0, "frames": len(liquid), "g": rdf},
        "made_by": "scripts/make_water_dataset.py",
        "python": platform.python_version(),
        "licence": "Apache-2.0, as the project",
    }
    (out / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
    print(json.dumps(provenance["frames"]), sum(path.stat().st_size for path in out.glob("*.gz")), "bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sample", "check", "assemble"])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--chain", choices=sorted(CHAINS), default="a")
    args = parser.parse_args()
    if args.what == "sample":
        sample(args.run, args.chain)
    elif args.what == "check":
        check(args.run)
    elif args.out is None:
        sys.exit("assemble needs the folder to write to")
    else:
        assemble(args.run, args.out)


if __name__ == "__main__":
    main()
