"""Forces and virials of every model, from one gradient: dE/d(edge vector).

A model gives per-atom energies as a function of edge vectors r = r_neighbor - r_center. With g = dE/dr for each edge,

    force on atom k  = sum over edges with centre k of g  -  sum over edges with neighbour k of g
    virial           = - sum over edges of g (outer) r            (= -dE/dstrain)
    atomic virial    = the same sum, each edge's term given to its neighbour (DeePMD's convention)

so that the per-atom virial costs no further backward pass. Only local atoms' energies are summed; ghosts receive forces.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from carryall.graph.neighbor_graph import NeighborGraph, edge_vectors, local_index
from carryall.graph.potential import PotentialSpec
from carryall.graph.segments import segment_sum


class EnergyModel(Protocol):
    """What a model has to be: per-atom energies of a graph, facts, and its own description."""

    @property
    def spec(self) -> PotentialSpec:
        """Facts about the model."""
        ...

    def __call__(self, graph: NeighborGraph, edge_vec: Tensor) -> Tensor:
        """(n_local,) float64 energies, eV."""
        ...


def evaluate_model(
    model: EnergyModel, graph: NeighborGraph, *, atomic_virial: bool = False, create_graph: bool = False
) -> dict[str, Tensor]:
    """Energy and derivatives as `Potential` promises them; `create_graph` keeps them differentiable in the parameters."""
    vectors = edge_vectors(graph).detach().requires_grad_()
    atomic_energy = model(graph, vectors)
    (gradient,) = torch.autograd.grad(
        [atomic_energy.sum()], [vectors], create_graph=create_graph, materialize_grads=True, allow_unused=True
    )
    out = reduce_edges(graph, atomic_energy, vectors, gradient, atomic_virial=atomic_virial)
    return out if create_graph else {key: value.detach() for key, value in out.items()}


def reduce_edges(
    graph: NeighborGraph, atomic_energy: Tensor, vectors: Tensor, gradient: Tensor, *, atomic_virial: bool
) -> dict[str, Tensor]:
    """The outputs from per-atom energies and the gradient (n_edges, 3) with respect to the edge vectors."""
    n_atoms, n_systems = graph.positions.shape[0], graph.cell.shape[0]
    local_system = graph.system.index_select(0, local_index(graph))
    forces = segment_sum(gradient, graph.edge_center, n_atoms) - segment_sum(gradient, graph.edge_neighbor, n_atoms)
    edge_virial = -gradient[:, :, None] * vectors[:, None, :]
    out: dict[str, Any] = {
        "energy": segment_sum(atomic_energy, local_system, n_systems),
        "atomic_energy": atomic_energy,
        "forces": forces,
    }
    if atomic_virial:
        out["atomic_virial"] = segment_sum(edge_virial, graph.edge_neighbor, n_atoms)
    edge_system = graph.system.index_select(0, graph.edge_center)
    out["virial"] = segment_sum(edge_virial, edge_system, n_systems)
    return out
