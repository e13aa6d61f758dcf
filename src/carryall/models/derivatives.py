"""Energy and derivatives of a model: one gradient, by edge vectors and spins, taken here and nowhere else.

Of a long-range model also by positions and by the strain of each local atom's energy, at fixed edge vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True, eq=False)
class Gradients:
    """Per-atom energies (n_local,), eV, and what the sum of them over all ranks changes by."""

    atomic_energy: Tensor
    by_edge: Tensor
    """(n_edges, 3) dE/d(edge vector), eV/Å."""
    by_spin: Tensor | None = None
    """(n_atoms, 3) dE/d(graph.spin); None for a model that takes no spins, or a graph that has none."""
    by_position: Tensor | None = None
    """(n_atoms, 3) dE/d(graph.positions) at fixed edge vectors, eV/Å; of long-range models only."""
    by_strain: Tensor | None = None
    """(n_local, 3, 3) dE_i/dstrain at fixed edge vectors, eV, see `carryall.graph.edge_terms`; likewise."""


def takes_spin(model: EnergyModel) -> bool:
    """Whether energies depend on graph.spin. A model may say so by an attribute: its spec may look at data, a trace cannot."""
    found = getattr(model, "takes_spin", None)
    return model.spec.spin if found is None else bool(found)


def evaluate_model(
    model: EnergyModel, graph: NeighborGraph, *, atomic_virial: AtomicVirial = False, create_graph: bool = False
) -> dict[str, Tensor]:
    """Energy and derivatives as `Potential` promises them; `create_graph` keeps them differentiable in the parameters."""
    vectors = edge_vectors(graph).detach()
    long_range = model.spec.long_range
    found = energy_and_gradients(model, graph, vectors, create_graph=create_graph, long_range=long_range)
    out = reduced(graph, vectors, found, atomic_virial=atomic_virial)
    return out if found.by_spin is None else {**out, MAGNETIC: -found.by_spin}


def reduced(
    graph: NeighborGraph, vectors: Tensor, found: Gradients, *, atomic_virial: AtomicVirial = False
) -> dict[str, Tensor]:
    """What a Potential returns, from the gradients at the edge vectors (n_edges, 3)."""
    explicit = {"by_position": found.by_position, "by_strain": found.by_strain}
    return reduce_edges(graph, found.atomic_energy, vectors, found.by_edge, atomic_virial=atomic_virial, **explicit)


def energy_and_gradient(
    model: EnergyModel, graph: NeighborGraph, vectors: Tensor, *, create_graph: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`energy_and_gradients` of a model that is not long-range: per-atom energies, by_edge and by_spin."""
    found = energy_and_gradients(model, graph, vectors, create_graph=create_graph)
    return found.atomic_energy, found.by_edge, found.by_spin


def energy_and_gradients(
    model: EnergyModel, graph: NeighborGraph, vectors: Tensor, *, create_graph: bool = False, long_range: bool = False
) -> Gradients:
    """Per-atom energies at the edge vectors (n_edges, 3) and all derivatives, by one backward pass.

    Where atoms are spread over ranks, E is the sum over all of them; every rank has to call. `long_range` is what the model's
    spec says, which may look at data, and a trace cannot.
    """
    graph, context = _opened(model, graph)
    by: dict[str, Tensor] = {"by_edge": vectors.detach().requires_grad_()}
    if graph.spin is not None and takes_spin(model):
        by["by_spin"] = graph.spin.detach().requires_grad_()
        graph = graph.replace(spin=by["by_spin"])
    if long_range:
        by["by_position"] = graph.positions.detach().requires_grad_()
        by["by_strain"] = vectors.new_zeros(graph.n_local, 3, 3).requires_grad_()
        graph = graph.replace(positions=by["by_position"], strain=by["by_strain"])
    leaves = list(by.values())
    if context is not None:
        context.token = context.token.detach().requires_grad_()
        leaves.append(context.token)
    atomic_energy = model(graph, by["by_edge"])
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
    return Gradients(atomic_energy if create_graph else atomic_energy.detach(), **dict(zip(by, gradients, strict=True)))


def _opened(model: EnergyModel, graph: NeighborGraph) -> tuple[NeighborGraph, ExchangeContext | None]:
    """The graph with the exchange of this call, and that; None where one process owns all atoms."""
    if graph.exchange is None or not model.spec.message_passing:
        return graph, None
    # imported by those who exchange, only
    from carryall.exchange.context import open_exchange

    graph = open_exchange(graph)
    return graph, graph.exchange
