"""Energy and derivatives of a model: one gradient, dE/d(edge vector), taken here and nowhere else."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from carryall.graph.edge_terms import AtomicVirial, reduce_edges
from carryall.graph.neighbor_graph import NeighborGraph, edge_vectors
from carryall.graph.potential import PotentialSpec


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
    model: EnergyModel, graph: NeighborGraph, *, atomic_virial: AtomicVirial = False, create_graph: bool = False
) -> dict[str, Tensor]:
    """Energy and derivatives as `Potential` promises them; `create_graph` keeps them differentiable in the parameters."""
    vectors = edge_vectors(graph).detach()
    atomic_energy, gradient = energy_and_gradient(model, graph, vectors, create_graph=create_graph)
    return reduce_edges(graph, atomic_energy, vectors, gradient, atomic_virial=atomic_virial)


def energy_and_gradient(
    model: EnergyModel, graph: NeighborGraph, vectors: Tensor, *, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """Per-atom energies (n_local,) and dE/d(edge vector) (n_edges, 3) at the edge vectors."""
    vectors = vectors.detach().requires_grad_()
    atomic_energy = model(graph, vectors)
    (gradient,) = torch.autograd.grad(
        [atomic_energy.sum()], [vectors], create_graph=create_graph, materialize_grads=True, allow_unused=True
    )
    return (atomic_energy, gradient) if create_graph else (atomic_energy.detach(), gradient)
