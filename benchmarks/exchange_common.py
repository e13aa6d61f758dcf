"""What is measured, and sizes of a decomposed crystal."""

from __future__ import annotations

from math import pi

SIZES = ((1000, 1500), (10000, 6000))
"""Local and ghost atoms of a rank."""
WIDTHS = (1, 64)
"""float64 numbers of a row."""

DENSITY = 4 / 3.615**3
"""Atoms of copper in a cubic Å."""
CUTOFF, LAYERS, FEATURES = 5.0, 3, 64
PEERS = 26
"""Bricks that touch a brick."""
NEIGHBORS = DENSITY * 4 / 3 * pi * CUTOFF**3


def edge(n_local: float) -> float:
    """Of the cubic brick of so many atoms, Å."""
    return float((n_local / DENSITY) ** (1 / 3))


def grown(n_local: float, depth: float) -> float:
    """Atoms of a brick that is larger by `depth` Å on every side."""
    return DENSITY * (edge(n_local) + 2 * depth) ** 3


def step(n_local: float) -> tuple[float, int, float, float]:
    """Ghosts, messages, feature bytes in float64 and all bytes that a rank sends in a step.

    Each layer exchanges its features before it and their gradients after it, positions go out and forces come back.
    """
    ghosts = grown(n_local, CUTOFF) - n_local
    exchanges = 2 * LAYERS + 2
    features = ghosts * 8 * 2 * LAYERS * FEATURES
    return ghosts, PEERS * exchanges, features, features + ghosts * 8 * 2 * 3


def layers_atoms(n_local: float) -> tuple[float, float, float]:
    """Atoms evaluated, summed over layers: with exchange; in a halo of layers times cutoff as far as needed; in all of it."""
    exchange = LAYERS * n_local
    needed = sum(grown(n_local, k * CUTOFF) for k in range(LAYERS))
    return exchange, needed, LAYERS * grown(n_local, (LAYERS - 1) * CUTOFF)
