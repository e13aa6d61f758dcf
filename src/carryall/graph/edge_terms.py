"""Forces and virials from dE/d(edge vector), for every model and every engine.

With r = r_neighbor - r_center and g = dE/dr of each edge,

    force on atom k  = sum over edges with centre k of g  -  sum over edges with neighbour k of g
    virial           = - sum over edges of g (outer) r            (= -dE/dstrain)
    atomic virial    = the same sum by atom: an edge's term goes to its neighbour ("neighbor", DeePMD's convention), or half of
                       it to each end ("half")

so that the per-atom virial costs no further backward pass. Only local atoms' energies are summed; ghosts receive forces.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from carryall.errors import InputError
from carryall.graph.neighbor_graph import NeighborGraph, local_index
from carryall.graph.segments import segment_sum

AtomicVirial = bool | Literal["neighbor", "half"]
"""Whether a per-atom virial is wanted, and by which convention; True is "neighbor"."""


def reduce_edges(
    graph: NeighborGraph, atomic_energy: Tensor, vectors: Tensor, gradient: Tensor, *, atomic_virial: AtomicVirial
) -> dict[str, Tensor]:
    """What a Potential returns, from per-atom energies (n_local,), edge vectors and dE/d(edge vector), both (n_edges, 3)."""
    n_atoms, n_systems = graph.positions.shape[0], graph.cell.shape[0]
    local_system = graph.system.index_select(0, local_index(graph))
    forces = segment_sum(gradient, graph.edge_center, n_atoms) - segment_sum(gradient, graph.edge_neighbor, n_atoms)
    edge_virial = -gradient[:, :, None] * vectors[:, None, :]
    edge_system = graph.system.index_select(0, graph.edge_center)
    out = {
        "energy": segment_sum(atomic_energy, local_system, n_systems),
        "atomic_energy": atomic_energy,
        "forces": forces,
        "virial": segment_sum(edge_virial, edge_system, n_systems),
    }
    if atomic_virial:
        out["atomic_virial"] = per_atom(graph, edge_virial, atomic_virial)
    return out


def per_atom(graph: NeighborGraph, edge_virial: Tensor, convention: AtomicVirial) -> Tensor:
    """(n_atoms, 3, 3) sums of `edge_virial` (n_edges, 3, 3); InputError for an unknown convention."""
    n_atoms = graph.positions.shape[0]
    if convention is True or convention == "neighbor":
        return segment_sum(edge_virial, graph.edge_neighbor, n_atoms)
    if convention == "half":
        ends = segment_sum(edge_virial, graph.edge_neighbor, n_atoms) + segment_sum(edge_virial, graph.edge_center, n_atoms)
        return 0.5 * ends
    raise InputError(f"atomic_virial must be True, False, 'neighbor' or 'half', got {convention!r}")
