"""What benchmarks/lammps.py and its workers share: structures, LAMMPS' input, and the clock. Needs numpy alone."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MASSES = {"Cu": 63.546, "Au": 196.966569, "O": 15.999, "H": 1.008}  # amu
TIMESTEP = 0.5  # fs
TEMPERATURE = 300.0  # K
SKIN = 1.0  # Å
WARM = 3
"""Steps before the clock runs."""
FEWEST, MOST = 3, 400
"""Steps of a timed run."""


@dataclass(frozen=True)
class Crystal:
    """A jittered fcc crystal with its elements in turn: `repeats` cubic cells of four atoms, edge `lattice` (Å)."""

    repeats: tuple[int, int, int]
    lattice: float
    symbols: tuple[str, ...]

    @property
    def n_atoms(self) -> int:
        """Atoms in it."""
        return 4 * int(np.prod(self.repeats))

    @property
    def kinds(self) -> np.ndarray[Any, Any]:
        """(n_atoms,) index into symbols."""
        return np.arange(self.n_atoms) % len(self.symbols)

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """(3,) Å, edges of the box."""
        return np.array(self.repeats) * self.lattice

    def positions(self) -> np.ndarray[Any, Any]:
        """(n_atoms, 3) Å, inside the box."""
        basis = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
        corners = np.stack(np.meshgrid(*[np.arange(n) for n in self.repeats], indexing="ij"), -1).reshape(-1, 1, 3)
        sites = (corners + basis).reshape(-1, 3) * self.lattice
        moved = sites + 0.05 * np.random.default_rng(0).standard_normal(sites.shape)
        found: np.ndarray[Any, Any] = moved % self.lengths
        return found

    def write_lammps(self, path: Path) -> None:
        """A data file."""
        lines = ["crystal", "", f"{self.n_atoms} atoms", f"{len(self.symbols)} atom types"]
        lines += [f"0 {length:.17g} {axis}lo {axis}hi" for axis, length in zip("xyz", self.lengths, strict=True)]
        lines += ["", "Masses", "", *(f"{i + 1} {MASSES[symbol]}" for i, symbol in enumerate(self.symbols))]
        rows = zip(self.kinds, self.positions(), strict=True)
        lines += ["", "Atoms # atomic", ""]
        lines += [f"{i + 1} {kind + 1} {x:.17g} {y:.17g} {z:.17g}" for i, (kind, (x, y, z)) in enumerate(rows)]
        path.write_text("\n".join(lines) + "\n")


def before_pair(data: Path) -> list[str]:
    """LAMMPS' commands up to the pair style."""
    return ["units metal", "atom_style atomic", "atom_modify map yes", "newton on", "boundary p p p", f"read_data {data}"]


def after_pair() -> list[str]:
    """LAMMPS' commands from the pair style on."""
    return [
        f"neighbor {SKIN} bin",
        "neigh_modify every 1 delay 0 check yes",
        f"timestep {TIMESTEP / 1000}",
        f"velocity all create {TEMPERATURE} 12345 mom yes rot no dist gaussian loop geom",
        "fix nve all nve",
        "thermo 0",
    ]


def steps_for(budget: float, seconds: float) -> int:
    """Steps that take about `budget` seconds when one takes `seconds`."""
    return int(np.clip(budget / max(seconds, 1e-9), FEWEST, MOST))


def machine() -> str:
    """The processor, in words."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def others(seconds: float = 2.0) -> float:
    """Part of all cores' time that the machine is at work, while this process waits; 0 where the system does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    counts = []
    for wait in (seconds, 0.0):
        counts.append(np.array(stat.read_text().splitlines()[0].split()[1:9], dtype=float))
        time.sleep(wait)
    spent = counts[1] - counts[0]
    return float(1.0 - spent[3:5].sum() / max(spent.sum(), 1.0))  # idle, and waiting for files


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
