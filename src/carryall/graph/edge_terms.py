"""Forces and virials from dE/d(edge vector), for every model and every engine.

With r = r_neighbor - r_center and g = dE/dr of each edge,

    force on atom k  = sum over edges with centre k of g  -  sum over edges with neighbour k of g
    virial           = - sum over edges of g (outer) r            (= -dE/dstrain)
    atomic virial    = the same sum by atom: an edge's term goes to its neighbour ("neighbor", DeePMD's convention), or half of
                       it to each end ("half")

so that the per-atom virial costs no further backward pass. Only local atoms' energies are summed; ghosts receive forces.

A long-range potential (`PotentialSpec.long_range`) depends on graph.positions and graph.cell beyond the edge vectors. With its
gradient by positions at fixed edge vectors, and the strain derivative of each local atom's energy (at fixed edge vectors and
charges, positions moving with the cell), which it gives by `with_virial`,

    force on atom k  gets  - dE/d(position k)
    virial           gets  - sum over local atoms i of dE_i/dstrain
    atomic virial    gets  - dE_i/dstrain of each local atom, by either convention
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from carryall.errors import InputError
from carryall.graph.neighbor_graph import NeighborGraph, local_index
from carryall.graph.segments import segment_sum

AtomicVirial = bool | Literal["neighbor", "half"]
"""Whether a per-atom virial is wanted, and by which convention; True is "neighbor"."""


def with_virial(atomic_energy: Tensor, virial: Tensor, graph: NeighborGraph) -> Tensor:
    """The energies (n_local,) with `virial` (n_local, 3, 3) as their negative strain derivative; their values are the same.

    For what a long-range potential adds to energies beyond the edge vectors: -dE_i/dstrain of each local atom, eV.
    """
    # graph.strain is zero, and only there while derivatives are taken
    return atomic_energy if graph.strain is None else atomic_energy - (graph.strain * virial).sum((1, 2))


def reduce_edges(
    graph: NeighborGraph,
    atomic_energy: Tensor,
    vectors: Tensor,
    gradient: Tensor,
    *,
    atomic_virial: AtomicVirial,
    by_position: Tensor | None = None,
    by_strain: Tensor | None = None,
) -> dict[str, Tensor]:
    """What a Potential returns, from per-atom energies (n_local,), edge vectors and dE/d(edge vector), both (n_edges, 3).

    Of a long-range potential also dE/d(positions) (n_atoms, 3) and dE_i/dstrain (n_local, 3, 3), beyond the edge vectors.
    """
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
        out["atomic_virial"] = per_atom(graph, edge_virial, atomic_virial, by_strain)
    if by_position is not None:
        out["forces"] = forces - by_position
    if by_strain is not None:
        out["virial"] = out["virial"] - segment_sum(by_strain, local_system, n_systems)
    return out


def per_atom(graph: NeighborGraph, edge_virial: Tensor, convention: AtomicVirial, by_strain: Tensor | None = None) -> Tensor:
    """(n_atoms, 3, 3) sums of `edge_virial` (n_edges, 3, 3), less `by_strain` (n_local, 3, 3) of local atoms.

    InputError for an unknown convention.
    """
    n_atoms = graph.positions.shape[0]
    if convention is True or convention == "neighbor":
        sums = segment_sum(edge_virial, graph.edge_neighbor, n_atoms)
    elif convention == "half":
        ends = segment_sum(edge_virial, graph.edge_neighbor, n_atoms) + segment_sum(edge_virial, graph.edge_center, n_atoms)
        sums = 0.5 * ends
    else:
        raise InputError(f"atomic_virial must be True, False, 'neighbor' or 'half', got {convention!r}")
    return sums if by_strain is None else sums.index_add(0, local_index(graph), -by_strain)
