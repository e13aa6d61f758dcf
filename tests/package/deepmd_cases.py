"""Models and structures for the tests of files that deepmd-kit runs, and how to run them there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from carryall.graph import NeighborGraph, build_graph, edge_vectors
from carryall.models import DPA1, LennardJones, SuttonChen
from carryall.models.eager import EagerPotential
from carryall.models.pair_table import PairTable
from carryall.package.deepmd_abi import COMPARED
from carryall.package.deepmd_program import OUTPUTS, deepmd_inputs
from combined_models import small_bridged, small_sum, small_table, small_zbl
from structures import small_dpa1

PYTHON = os.environ.get("CARRYALL_DEEPMD_PYTHON", "")
"""deepmd-kit's own Python, see tests/models/test_deepmd_live.py; beside it lie `lmp` and `mpirun`."""
MODELS: dict[str, Callable[[], nn.Module]] = {
    "dpa1": lambda: small_dpa1(attn_layer=2),
    "legacy": lambda: plain_legacy(),
    "lennard_jones": lambda: LennardJones(("Ar", "Ne"), (0.0104, 0.0031), (3.4, 2.8), 7.0),
    "sutton_chen": lambda: SuttonChen(("Cu", "Au"), cutoff=6.0),
    "bridged": small_bridged,
    "sum": small_sum,
    "table": lambda: biased_table(),
    "zbl": small_zbl,
}


def plain_legacy() -> DPA1:
    """Padded semantics with davg zero, which are a function of the structure."""
    model = small_dpa1(attn_layer=1)
    model.descriptor.davg.zero_()
    model.neighbor_graph_method = "legacy"
    return model


def biased_table() -> PairTable:
    """Atoms have an energy when they are alone, so that ghosts would count."""
    model = small_table()
    model.rules.out_bias += torch.tensor([0.3, -1.1], dtype=torch.float64)
    return model


def expected(model: nn.Module, graph: NeighborGraph) -> dict[str, torch.Tensor]:
    """Eager values under deepmd-kit's names, rows of all nodes; ghosts have no energy."""
    out = EagerPotential(model)(graph, atomic_virial=True)  # type: ignore[arg-type]
    values = {name: out[own].detach().flatten(1) if out[own].dim() > 1 else out[own][:, None] for name, own in COMPARED.items()}
    ghosts = values["atom_energy"].new_zeros(graph.n_atoms - graph.n_local, 1)
    return {**values, "atom_energy": torch.cat([values["atom_energy"], ghosts])}


def call(run: Callable[..., object], model: nn.Module, graph: NeighborGraph) -> dict[str, torch.Tensor]:
    """The program's values for a graph of ours."""
    out = run(*deepmd_inputs(graph, edge_vectors(graph), model.spec))  # type: ignore[arg-type]
    return out if isinstance(out, dict) else dict(zip(OUTPUTS, out, strict=True))  # type: ignore[call-overload]


def crystal(n_types: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(positions, types, cell) of 48 atoms in a tilted cell."""
    rng = np.random.default_rng(seed)
    cell = np.array([[11.2, 0, 0], [1.1, 11.0, 0], [-0.7, 0.9, 8.4]])
    places = np.stack(np.meshgrid(np.arange(4) / 4, np.arange(4) / 4, np.arange(3) / 3, indexing="ij"), -1).reshape(-1, 3)
    return (places + rng.uniform(-0.02, 0.02, places.shape)) @ cell, rng.integers(0, n_types, 48), cell


def graph_of(x: np.ndarray, types: np.ndarray, cell: np.ndarray | None, cutoff: float) -> NeighborGraph:
    """One system."""
    box = torch.zeros(1, 3, 3, dtype=torch.float64) if cell is None else torch.tensor(cell)[None]
    periodic = torch.full((1, 3), cell is not None)
    return build_graph(torch.tensor(x), torch.tensor(types), torch.zeros(len(x), dtype=torch.int64), box, periodic, cutoff)


def peer(command: list[str], folder: Path) -> str:
    """Run a program of deepmd-kit's environment, with one thread; returns what it prints."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    here = str(Path(PYTHON).parent)
    environment = {**kept, "OMP_NUM_THREADS": "1", "PATH": f"{here}{os.pathsep}{kept.get('PATH', '')}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


LAMMPS = """units metal
boundary {b} {b} {b}
atom_style atomic
atom_modify map yes
newton on
read_data data
pair_style deepmd {model}
pair_coeff * * {elements}
neighbor 1.0 bin
timestep 0.001
velocity all create {kelvin} 4928 loop all
fix 1 all nve
compute energies all pe/atom
thermo_style custom step pe pxx pyy pzz pxy pxz pyz
thermo_modify format float %.17g
thermo 1
dump 1 all custom {every} dump id xu yu zu fx fy fz c_energies
dump_modify 1 sort id format float %.17g first yes
run {steps}
"""
BAR = 1.6021765e6  # LAMMPS's eV/Å^3 in bar


def lammps(
    model: Path, elements: tuple[str, ...], x: np.ndarray, types: np.ndarray, cell: np.ndarray, periodic: bool, ranks: int,
    folder: Path, steps: int = 1, moving: bool = True,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Rows (x, y, z, fx, fy, fz, energy) of all atoms at the last step, and the last line of the log."""
    folder.mkdir(parents=True)
    tilt = f"{cell[1, 0]:.17g} {cell[2, 0]:.17g} {cell[2, 1]:.17g} xy xz yz\n" if np.any(np.tril(cell, -1)) else ""
    box = "".join(f"0 {cell[k, k]:.17g} {'xyz'[k]}lo {'xyz'[k]}hi\n" for k in range(3)) + tilt
    masses = "".join(f"{kind + 1} 40.0\n" for kind in range(len(elements)))
    atoms = "".join(
        f"{i + 1} {kind + 1} {p[0]:.17g} {p[1]:.17g} {p[2]:.17g}\n" for i, (p, kind) in enumerate(zip(x, types, strict=True))
    )
    text = f"\n{len(x)} atoms\n{len(elements)} atom types\n\n{box}\nMasses\n\n{masses}\nAtoms # atomic\n\n{atoms}"
    (folder / "data").write_text(text)
    filled = LAMMPS.format(
        b="p" if periodic else "f", model=model.resolve(), elements=" ".join(elements), steps=steps, every=max(steps, 1),
        kelvin=300 if moving else 1e-30,
    )  # fmt: skip
    (folder / "in.lammps").write_text(filled)
    command = [str(Path(PYTHON).with_name("lmp")), "-in", "in.lammps", "-log", "log"]
    peer([str(Path(PYTHON).with_name("mpirun")), "-np", str(ranks), *command] if ranks > 1 else command, folder)
    rows = (folder / "dump").read_text().split("ITEM: ATOMS")[-1].splitlines()[1:]
    log = (folder / "log").read_text()
    lines = log[log.index("PotEng") :].splitlines()[1 : steps + 2]
    return np.array([row.split()[1:] for row in rows], dtype=float), np.array(lines[-1].split(), dtype=float)
