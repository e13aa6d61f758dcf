"""One rank's part of a large system: its graph, and what it contributes to the results of the whole.

A rank owns some atoms (local) and sees copies of those around them (ghosts), as far as one cutoff. Only local atoms are
centres. Edges carry no shift: a ghost lies where its image is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carryall.exchange import Exchange, sum_to_owners
from carryall.graph.edge_terms import AtomicVirial
from carryall.graph.neighbor_graph import NeighborGraph
from carryall.graph.potential import Potential


@dataclass(frozen=True, eq=False)
class Part:
    """What stays of a rank's graph while atoms and cell do; made once for many steps."""

    atom_types: Tensor
    system: Tensor
    cell: Tensor
    pbc: Tensor | None
    exchange: Exchange
    no_shift: Tensor
    """(1, 3) int32, of every edge."""
    unmasked: Tensor
    """(1,) bool, likewise."""

    def graph(self, positions: Tensor, edge_center: Tensor, edge_neighbor: Tensor, ptr: Tensor) -> NeighborGraph:
        """The graph of a step: positions (n_atoms, 3) Å of local atoms, then ghosts, and edges, see `part_graph`."""
        n_edges = edge_center.shape[0]
        return NeighborGraph(
            positions=positions,
            atom_types=self.atom_types,
            system=self.system,
            cell=self.cell,
            edge_center=edge_center,
            edge_neighbor=edge_neighbor,
            edge_shift=self.no_shift.expand(n_edges, 3),
            edge_mask=self.unmasked.expand(n_edges),
            ptr=ptr,
            pbc=self.pbc,
            exchange=self.exchange,
        )


def part_of_rank(atom_types: Tensor, cell: Tensor, exchange: Exchange, pbc: Tensor | None = None) -> Part:
    """Of types (n_atoms,) and the whole cell (3, 3); `pbc` (3,) bool says along which axes the whole repeats.

    A long-range potential wants to know pbc. All tensors on one device; cell and pbc the same on each rank.
    """
    device = atom_types.device
    return Part(
        atom_types=atom_types,
        system=torch.zeros_like(atom_types),
        cell=cell[None],
        pbc=None if pbc is None else pbc[None],
        exchange=exchange,
        no_shift=torch.zeros(1, 3, dtype=torch.int32, device=device),
        unmasked=torch.ones(1, dtype=torch.bool, device=device),
    )


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
    """The graph of a rank, for one step: positions (n_atoms, 3) Å of local atoms, then ghosts; the rest as `part_of_rank`.

    Edges go from local atoms, ascending, to any atom; ptr (n_local + 1,) is their CSR pointer.
    """
    return part_of_rank(atom_types, cell, exchange, pbc).graph(positions, edge_center, edge_neighbor, ptr)


def evaluate_part(potential: Potential, graph: NeighborGraph, *, atomic_virial: AtomicVirial = False) -> dict[str, Tensor]:
    """What a rank contributes: energy (1,) and virial (1, 3, 3), to be summed over ranks, and rows of its own atoms.

    Collective. `atomic_energy` (n_local,), `forces` (n_local, 3) and, on request, `atomic_virial` (n_local, 3, 3) are whole:
    what ghosts got has gone to their owners, in one exchange.
    """
    out = potential(graph, atomic_virial=atomic_virial)
    if not atomic_virial:
        return {**out, "forces": sum_to_owners(out["forces"], graph)}
    by_atom = out["atomic_virial"]
    own = sum_to_owners(torch.cat([out["forces"], by_atom.reshape(by_atom.shape[0], 9)], 1), graph)
    return {**out, "forces": own[:, :3], "atomic_virial": own[:, 3:].reshape(own.shape[0], 3, 3)}
