"""Radial distribution functions, with all periodic images inside the range.

    g_AB(r) = (pairs found in a shell) / (pairs that an ideal gas of the same density has there)

averaged over frames; the ideal gas has N_A N_B / V pairs a volume, N_A (N_A - 1) / V for one element (M. P. Allen and
D. J. Tildesley, Computer Simulation of Liquids, 2nd ed. (2017), section 8.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from carryall.data.atomic_data import AtomicData
from carryall.data.elements import atomic_number
from carryall.errors import InputError
from carryall.graph.neighbor_graph import edge_vectors
from carryall.graph.neighbor_search import graph_from_structures


@dataclass(frozen=True, eq=False)
class RadialDistribution:
    """g(r) of pairs of elements."""

    r: np.ndarray
    """(n_bins,) Å, middles of the shells."""
    g: dict[tuple[str, str], np.ndarray]
    """(n_bins,) for each pair asked for."""
    n_frames: int


def radial_distribution(
    structures: Sequence[AtomicData], pairs: Sequence[tuple[str, str]], r_max: float = 6.0, n_bins: int = 120
) -> RadialDistribution:
    """g(r) up to `r_max` (Å) of frames that are periodic along all axes; r_max may exceed half of the cell."""
    if not structures:
        raise InputError("no frames for a radial distribution: give at least one")
    if not r_max > 0 or n_bins < 1:
        raise InputError(f"r_max must be positive and n_bins at least 1, got {r_max} and {n_bins}")
    numbers = {symbol: atomic_number(symbol) for pair in pairs for symbol in pair}
    shells = np.linspace(0.0, r_max, n_bins + 1)
    volumes = 4 / 3 * np.pi * np.diff(shells**3)
    counts = {pair: np.zeros(n_bins) for pair in pairs}
    ideal = dict.fromkeys(pairs, 0.0)
    for index, one in enumerate(structures):
        if one.cell is None or not bool(one.pbc.all()):
            raise InputError(f"frame {index} is not periodic along all axes: a radial distribution needs a density")
        z = one.atomic_numbers.numpy()
        graph = graph_from_structures([one], r_max, one_of_each(one))
        distance = edge_vectors(graph).norm(dim=1).numpy()
        first, second = z[graph.edge_center.numpy()], z[graph.edge_neighbor.numpy()]
        for pair in pairs:
            a, b = numbers[pair[0]], numbers[pair[1]]
            found = distance[(first == a) & (second == b)]
            counts[pair] += np.histogram(found, bins=shells)[0]
            n_a, n_b = int((z == a).sum()), int((z == b).sum())
            ideal[pair] += n_a * (n_b - (a == b)) / one.volume
    for pair, density in ideal.items():
        if density == 0:
            raise InputError(f"no frame has a pair {pair[0]}-{pair[1]}")
    return RadialDistribution(
        0.5 * (shells[1:] + shells[:-1]), {p: counts[p] / (ideal[p] * volumes) for p in pairs}, len(structures)
    )


def one_of_each(structure: AtomicData) -> list[str]:
    """Symbols of the elements present."""
    return sorted(set(structure.symbols))
