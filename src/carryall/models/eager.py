"""A model run by PyTorch as it is, behind the Potential contract."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carryall.graph.blocks import EAGER_FACTOR, evaluate_in_blocks
from carryall.graph.edge_terms import AtomicVirial
from carryall.graph.neighbor_graph import NeighborGraph, edge_vectors
from carryall.graph.potential import PotentialSpec, with_defaults
from carryall.graph.skin import SkinNeighborList
from carryall.graph.systems import Systems
from carryall.models.derivatives import EnergyModel, energy_and_gradient, evaluate_model


@dataclass(frozen=True)
class EagerPotential:
    """Makes a Potential of a model; geometry goes in and results come out as float64 on the graph's own device."""

    model: EnergyModel
    device: str = "cpu"

    @property
    def spec(self) -> PotentialSpec:
        """Facts about the model."""
        return self.model.spec

    def __call__(self, graph: NeighborGraph, *, atomic_virial: AtomicVirial = False) -> dict[str, Tensor]:
        """Evaluate the graph."""
        with torch.inference_mode(False), torch.enable_grad():
            # a tensor made under the caller's inference_mode cannot take part in a gradient, its copy can
            own = graph.map(torch.clone) if graph.positions.is_inference() else graph
            own = self._opened(own)
            if self.spec.block_edges is None:
                out = evaluate_model(self.model, own, atomic_virial=atomic_virial)
            else:
                limit = EAGER_FACTOR * self.spec.block_edges
                out = evaluate_in_blocks(self._edge_call, own, limit, atomic_virial=atomic_virial)
        return {key: value.to(graph.device) for key, value in out.items()}

    def evaluate_systems(self, neighbors: SkinNeighborList, systems: Systems) -> dict[str, Tensor] | None:
        """Straight from kept lists, where the model has a way of its own to do so; None otherwise."""
        direct = getattr(self.model, "evaluate_systems", None)
        return None if direct is None or self.device != "cpu" else direct(neighbors, systems)

    def _opened(self, graph: NeighborGraph) -> NeighborGraph:
        """As the model takes it; where ranks exchange, what fails on one fails on all."""

        def prepare(graph: NeighborGraph) -> NeighborGraph:
            return with_defaults(graph.to(self.device, torch.float64), self.spec)

        if graph.exchange is None or not self.spec.message_passing:
            return prepare(graph)
        # imported by those who exchange, only
        from carryall.exchange.context import open_exchange

        return open_exchange(graph, prepare)

    def _edge_call(self, part: NeighborGraph) -> tuple[Tensor, Tensor, Tensor | None]:
        return energy_and_gradient(self.model, part, edge_vectors(part))
