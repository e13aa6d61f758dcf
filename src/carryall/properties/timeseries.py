"""Numbers from runs: energy drift, speed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from carryall.data.atomic_data import AtomicData
from carryall.graph.neighbor_search import graph_from_structures
from carryall.graph.potential import Potential

SECONDS_A_DAY = 86400.0


def energy_drift(time_ps: np.ndarray, energy: np.ndarray, n_atoms: np.ndarray | int) -> float:
    """Slope of a straight line through the total energy per atom, meV/atom/ps; time (n,) ps, energy (n,) eV."""
    if len(time_ps) < 2:
        return float("nan")
    per_atom = 1e3 * np.asarray(energy, dtype=float) / n_atoms
    centred = np.asarray(time_ps, dtype=float) - np.mean(time_ps)
    return float((centred * per_atom).sum() / (centred**2).sum())


def by_system(log: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Time (n_times,) ps and a column of an MD log as (n_times, n_systems); NaN where a system has stopped."""
    steps, row = np.unique(log["step"], return_inverse=True)
    systems, column = np.unique(log["system_id"], return_inverse=True)
    values, time_fs = np.full((len(steps), len(systems)), np.nan), np.zeros(len(steps))
    values[row, column] = log[name]
    time_fs[row] = log["time"]
    return 1e-3 * time_fs, values


@dataclass(frozen=True)
class Speed:
    """How fast a potential is on given structures."""

    name: str
    n_atoms: int
    """Atoms in a call."""
    seconds: float
    """Of one call: energy, forces and virial; without the neighbour search."""

    @property
    def microseconds_per_atom(self) -> float:
        """µs for one atom and one step."""
        return 1e6 * self.seconds / self.n_atoms

    def nanoseconds_per_day(self, timestep_fs: float) -> float:
        """Simulated time of these structures in a day, where the potential takes all the time."""
        return SECONDS_A_DAY / self.seconds * timestep_fs * 1e-6


def measure_speed(name: str, potential: Potential, structures: Sequence[AtomicData], budget_s: float = 2.0) -> Speed:
    """Median time of a call on all structures at once, after one to warm up: at least 3 calls, about `budget_s` seconds."""
    graph = graph_from_structures(structures, potential.spec.cutoff, potential.spec.type_map)
    potential(graph)
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget_s:
        began = time.perf_counter()
        potential(graph)
        times.append(time.perf_counter() - began)
    return Speed(name, graph.n_atoms, float(np.median(times)))
