"""Random structures and random graphs that this room's tests share."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from carryall.data import AtomicData
from carryall.graph import NeighborGraph, pointer


def random_structure(seed: int) -> AtomicData:
    """Any cell that is not nearly flat, atoms in and out of it, any periodicity, up to six atoms."""
    rng = np.random.default_rng(seed)
    size = rng.uniform(2.0, 6.0)
    cell = np.diag(rng.uniform(0.8, 1.3, 3)) * size + rng.uniform(-0.25, 0.25, (3, 3)) * size
    pbc = rng.random(3) < 0.6
    if rng.random() < 0.3:
        cell[0] = -cell[0]  # left-handed
    if rng.random() < 0.5:
        cell[~pbc] = 0.0
    n_atoms = int(rng.integers(1, 7))
    positions = rng.uniform(-1.5, 2.5, (n_atoms, 3)) * size
    return AtomicData(positions, rng.choice([1, 8], n_atoms), None if not cell.any() else cell, pbc)


@st.composite
def random_graphs(draw: st.DrawFn, max_degree: int = 6, ghosts: bool = True) -> NeighborGraph:
    """Edges between any atoms: several systems, empty centres, masks, duplicates, ghosts; no two atoms coincide."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_systems, n_local = draw(st.integers(1, 3)), draw(st.integers(0, 8))
    n_ghosts = draw(st.integers(0, 3)) if ghosts and n_local else 0
    owner = rng.integers(0, max(n_local, 1), n_ghosts)
    types, system = rng.integers(0, 3, n_local), rng.integers(0, n_systems, n_local)
    types, system = np.concatenate([types, types[owner]]), np.concatenate([system, system[owner]])
    degrees = rng.integers(0, draw(st.integers(0, max_degree)) + 1, n_local)
    center, neighbor, shift = [], [], []
    for c, degree in enumerate(degrees):
        same = np.flatnonzero(system == system[c])
        for _ in range(degree):
            center.append(c)
            neighbor.append(int(rng.choice(same)))
            image = rng.integers(-1, 2, 3)
            shift.append(image if image.any() or neighbor[-1] != c else np.array([1, 0, 0]))
            if rng.random() < 0.2:
                center.append(c), neighbor.append(neighbor[-1]), shift.append(shift[-1])
    mask = rng.random(len(center)) < draw(st.sampled_from([0.0, 0.7, 1.0]))
    edge_center = torch.tensor(center, dtype=torch.int64)
    return NeighborGraph(
        positions=torch.from_numpy(rng.normal(size=(n_local + n_ghosts, 3)) * 2),
        atom_types=torch.from_numpy(types),
        system=torch.from_numpy(system),
        cell=torch.from_numpy(np.eye(3) * 5 + rng.uniform(-0.5, 0.5, (n_systems, 3, 3))),
        edge_center=edge_center,
        edge_neighbor=torch.tensor(neighbor, dtype=torch.int64),
        edge_shift=torch.from_numpy(np.array(shift, dtype=np.int32).reshape(-1, 3)),
        edge_mask=torch.from_numpy(mask),
        ptr=pointer(edge_center, n_local),
        ghost_owner=torch.from_numpy(owner) if n_ghosts else None,
    )
