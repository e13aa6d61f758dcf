"""Small structures and models that several rooms' tests share; distances suit every model here (about 2 to 3 Å)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from carryall.data import AtomicData
from carryall.data.elements import atomic_number
from carryall.graph import NeighborGraph, edge_vectors
from carryall.models import DPA1, DescriptorConfig, FittingConfig, LennardJones, SuttonChen

CUTOFF = 4.0
FCC = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])


def fcc(repeats: tuple[int, int, int], a: float = 3.6, jitter: float = 0.1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Positions and cell of a jittered fcc crystal."""
    rng = np.random.default_rng(seed)
    corners = np.stack(np.meshgrid(*[np.arange(n) for n in repeats], indexing="ij"), -1).reshape(-1, 1, 3)
    positions = (corners + FCC).reshape(-1, 3) * a
    return positions + jitter * rng.normal(size=positions.shape), np.diag([n * a for n in repeats]).astype(float)


def geometries() -> dict[str, tuple[np.ndarray, np.ndarray | None, tuple[bool, bool, bool] | None]]:
    """(positions, cell, pbc) by name."""
    crystal, box = fcc((2, 1, 1))
    tilt = np.array([[7.2, 0.0, 0.0], [1.1, 3.6, 0.3], [-0.7, 0.4, 3.7]])
    tilted = crystal @ np.linalg.inv(box) @ tilt
    cluster, _ = fcc((1, 1, 2), seed=3)
    return {
        "periodic": (crystal, box, None),
        "tilted": (tilted, tilt, None),
        "left_handed": (tilted, tilt[[1, 0, 2]], None),
        "outside_cell": (crystal + np.array([31.0, -17.3, 3.3]), box, None),
        "slab": (crystal + np.array([0.0, 0.0, 9.0]), box + np.diag([0, 0, 8.0]), (True, True, False)),
        "wire": (crystal[:4], np.diag([3.6, 0.0, 0.0]), (True, False, False)),
        "open": (cluster[:7], None, None),
        "open_with_cell": (cluster[:5], np.eye(3) * 5.0, (False, False, False)),
        "one_atom": (np.array([[0.3, -0.2, 0.9]]), None, None),
        "one_atom_periodic": (np.array([[0.3, -0.2, 0.9]]), np.array([[3.1, 0, 0], [0.2, 3.3, 0], [0.1, -0.3, 3.2]]), None),
        "two_atoms": (np.array([[0.0, 0, 0], [1.6, 1.5, -0.4]]), None, None),
        "two_far": (np.array([[0.0, 0, 0], [50.0, 0, 0]]), None, None),
        "tiny_triclinic": (
            np.array([[0.1, 0.2, 0.3], [1.5, 1.2, 1.9]]),
            np.array([[2.6, 0, 0], [0.4, 2.5, 0], [-0.3, 0.5, 2.7]]),
            None,
        ),
    }


def structure(name: str, symbols: Sequence[str]) -> AtomicData:
    """The geometry of that name; atoms take the symbols in turn."""
    positions, cell, pbc = geometries()[name]
    numbers = [atomic_number(symbols[i % len(symbols)]) for i in range(len(positions))]
    return AtomicData(positions, numbers, cell, pbc)


def structures(symbols: Sequence[str]) -> list[AtomicData]:
    """All of them."""
    return [structure(name, symbols) for name in geometries()]


def edge_set(graph: NeighborGraph) -> set[tuple[int, ...]]:
    """(centre, neighbour, shift) of every edge."""
    columns = torch.cat([graph.edge_center[:, None], graph.edge_neighbor[:, None], graph.edge_shift.long()], dim=1)
    found = {tuple(row) for row in columns.tolist()}
    assert len(found) == graph.n_edges, "an edge is there twice"
    return found


def lengths(graph: NeighborGraph) -> torch.Tensor:
    """(n_edges,) Å."""
    return edge_vectors(graph).norm(dim=1)


def add_ghosts(graph: NeighborGraph) -> NeighborGraph:
    """The same systems as a rank sees them: each neighbour across a boundary becomes a ghost row, shifts become zero."""
    rows = torch.cat([graph.edge_neighbor[:, None], graph.edge_shift.long()], dim=1)
    across = graph.edge_shift.any(1)
    images, which = torch.unique(rows[across], dim=0, return_inverse=True)
    neighbor = graph.edge_neighbor.clone()
    neighbor[across] = graph.n_atoms + which
    owner = images[:, 0]
    offset = torch.einsum("gi,gij->gj", images[:, 1:].to(graph.positions.dtype), graph.cell[graph.system[owner]])
    return graph.replace(
        positions=torch.cat([graph.positions, graph.positions[owner] + offset]),
        atom_types=torch.cat([graph.atom_types, graph.atom_types[owner]]),
        system=torch.cat([graph.system, graph.system[owner]]),
        edge_neighbor=neighbor,
        edge_shift=torch.zeros_like(graph.edge_shift),
        ghost_owner=owner,
    )


def small_dpa1(
    type_map: Sequence[str] = ("O", "H"),
    seed: int = 5,
    *,
    smooth: bool = True,
    attn_layer: int = 2,
    sel: int = 20,
    method: Literal["graph", "legacy"] = "graph",
    **fitting: Any,
) -> DPA1:
    """A random DPA-1 with forces of physical size: small statistics, and nothing that starts at 0 or 1 stays there.

    Except the mean of the environment rows: with one, a neighbour at the cutoff is not the same as none, and energies jump.
    """
    descriptor = DescriptorConfig(
        rcut=CUTOFF,
        rcut_smth=1.0,
        sel=(sel,),
        neuron=(4, 8),
        axis_neuron=3,
        tebd_dim=3,
        attn=6,
        attn_layer=attn_layer,
        smooth_type_embedding=smooth,
    )
    model = DPA1(type_map, descriptor, FittingConfig(neuron=(8, 8), **fitting), seed=seed, neighbor_graph_method=method)
    generator = torch.Generator().manual_seed(seed)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        model.descriptor.dstd.copy_(0.06 + 0.01 * noise(model.descriptor.dstd).clamp(-2, 2))
        model.descriptor.dstd[:, 2:] = model.descriptor.dstd[
            :, 1:2
        ]  # x, y, z scale alike, or the descriptor would not be invariant
        for layer in model.descriptor.attention:
            layer.norm.w += 0.2 * noise(layer.norm.w)
            layer.norm.b += 0.2 * noise(layer.norm.b)
        model.out_bias.copy_(noise(model.out_bias))
        model.bias_atom_e.copy_(noise(model.bias_atom_e))
    return model.eval()


def small_lj(truncation: str = "switch") -> LennardJones:
    """Two kinds of atoms, steep enough that errors show."""
    return LennardJones(("O", "H"), (0.02, 0.05), (2.1, 2.3), CUTOFF, truncation)


def small_alloy() -> SuttonChen:
    """Copper and gold."""
    return SuttonChen(("Cu", "Au"), cutoff=CUTOFF)
