"""Energy and derivatives of a model: one gradient, by edge vectors and spins, taken here and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from carryall.graph.edge_terms import AtomicVirial, reduce_edges
from carryall.graph.neighbor_graph import NeighborGraph, edge_vectors
from carryall.graph.potential import MAGNETIC, PotentialSpec

if TYPE_CHECKING:
    from carryall.exchange.context import ExchangeContext


class EnergyModel(Protocol):
    """What a model has to be: per-atom energies of a graph, facts, and its own description."""

    @property
    def spec(self) -> PotentialSpec:
        """Facts about the model."""
        ...

    def __call__(self, graph: NeighborGraph, edge_vec: Tensor) -> Tensor:
        """(n_local,) float64 energies, eV."""
        ...


def takes_spin(model: EnergyModel) -> bool:
    """Whether energies depend on graph.spin. A model may say so by an attribute: its spec may look at data, a trace cannot."""
    found = getattr(model, "takes_spin", None)
    return model.spec.spin if found is None else bool(found)


def evaluate_model(
    model: EnergyModel, graph: NeighborGraph, *, atomic_virial: AtomicVirial = False, create_graph: bool = False
) -> dict[str, Tensor]:
    """Energy and derivatives as `Potential` promises them; `create_graph` keeps them differentiable in the parameters."""
    vectors = edge_vectors(graph).detach()
    atomic_energy, gradient, by_spin = energy_and_gradient(model, graph, vectors, create_graph=create_graph)
    out = reduce_edges(graph, atomic_energy, vectors, gradient, atomic_virial=atomic_virial)
    return out if by_spin is None else {**out, MAGNETIC: -by_spin}


def energy_and_gradient(
    model: EnergyModel, graph: NeighborGraph, vectors: Tensor, *, create_graph: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Per-atom energies (n_local,), dE/d(edge vector) (n_edges, 3) at the edge vectors, and dE/d(graph.spin) (n_atoms, 3).

    The third is None for a model that takes no spins, or a graph that has none. One backward pass gives both gradients. Where
    atoms are spread over ranks, E is the sum over all of them; every rank has to call.
    """
    graph, context = _opened(model, graph)
    leaves = [vectors.detach().requires_grad_()]
    if with_spin := graph.spin is not None and takes_spin(model):
        assert graph.spin is not None
        leaves.append(graph.spin.detach().requires_grad_())
        graph = graph.replace(spin=leaves[1])
    if context is not None:
        context.token = context.token.detach().requires_grad_()
        leaves.append(context.token)
    atomic_energy = model(graph, leaves[0])
    outputs: list[Tensor] = [atomic_energy.sum()]
    seeds: list[Tensor | None] = [None]
    if context is not None:
        # the token of the last exchange seeds the gradient's, so that one order holds for all
        outputs.append(context.token)
        seeds.append(context.token)
    gradients = list(
        torch.autograd.grad(outputs, leaves, seeds, create_graph=create_graph, materialize_grads=True, allow_unused=True)
    )
    if context is not None:
        context.token = gradients.pop()
        if create_graph:
            # so that a derivative of either takes every exchange along, on every rank
            tie = 0.0 * context.token
            atomic_energy, gradients = atomic_energy + tie, [gradient + tie for gradient in gradients]
    by_spin = gradients[1] if with_spin else None
    return atomic_energy if create_graph else atomic_energy.detach(), gradients[0], by_spin


def _opened(model: EnergyModel, graph: NeighborGraph) -> tuple[NeighborGraph, ExchangeContext | None]:
    """The graph with the exchange of this call, and that; None where one process owns all atoms."""
    if graph.exchange is None or not model.spec.message_passing:
        return graph, None
    # imported by those who exchange, only
    from carryall.exchange.context import open_exchange

    graph = open_exchange(graph)
    return graph, graph.exchange
