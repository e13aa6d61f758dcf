"""One rank's part of a large system: its graph, and what it contributes to the results of the whole.

A rank owns some atoms (local) and sees copies of those around them (ghosts), as far as one cutoff. Only local atoms are
centres. Edges carry no shift: a ghost lies where its image is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from carryall.exchange import Exchange, sum_to_owners
from carryall.graph.edge_terms import AtomicVirial
from carryall.graph.neighbor_graph import NeighborGraph
from carryall.graph.potential import Potential


def part_graph(
    positions: Tensor,
    atom_types: Tensor,
    cell: Tensor,
    edge_center: Tensor,
    edge_neighbor: Tensor,
    ptr: Tensor,
    exchange: Exchange,
    pbc: Tensor | None = None,
) -> NeighborGraph:
    """The graph of a rank: positions (n_atoms, 3) Å and types (n_atoms,) of local atoms, then ghosts; the whole cell (3, 3).

    Edges go from local atoms, ascending, to any atom; ptr (n_local + 1,) is their CSR pointer. `pbc` (3,) bool says along which
    axes the whole repeats; a long-range potential wants to know. All tensors on one device; cell and pbc the same on each rank.
    """
    n_edges = edge_center.shape[0]
    return NeighborGraph(
        positions=positions,
        atom_types=atom_types,
        system=torch.zeros_like(atom_types),
        cell=cell[None],
        edge_center=edge_center,
        edge_neighbor=edge_neighbor,
        edge_shift=torch.zeros(1, 3, dtype=torch.int32, device=positions.device).expand(n_edges, 3),
        edge_mask=torch.ones(1, dtype=torch.bool, device=positions.device).expand(n_edges),
        ptr=ptr,
        pbc=None if pbc is None else pbc[None],
        exchange=exchange,
    )


def evaluate_part(potential: Potential, graph: NeighborGraph, *, atomic_virial: AtomicVirial = False) -> dict[str, Tensor]:
    """What a rank contributes: energy (1,) and virial (1, 3, 3), to be summed over ranks, and rows of its own atoms.

    Collective. `atomic_energy` (n_local,), `forces` (n_local, 3) and, on request, `atomic_virial` (n_local, 3, 3) are whole:
    what ghosts got has gone to their owners, in one exchange.
    """
    out = dict(potential(graph, atomic_virial=atomic_virial))
    rows = [out["forces"]]
    if atomic_virial:
        rows.append(out["atomic_virial"].reshape(graph.n_atoms, 9))
    own = sum_to_owners(torch.cat(rows, 1) if len(rows) > 1 else rows[0], graph)
    out["forces"] = own[:, :3]
    if atomic_virial:
        out["atomic_virial"] = own[:, 3:].reshape(graph.n_local, 3, 3)
    return out
