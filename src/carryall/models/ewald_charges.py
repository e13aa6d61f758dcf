"""Ewald electrostatics of charges that depend on the surroundings of each atom, by a small network; neutral in each system.

    h_i = embedding of its type;   h_i <- tanh(B h_i + sum_j R(r_ij) * (A h_j)), once for each layer
    q_i = charge of its type + c h_i, less the mean over all atoms of its system

R are Gaussians of the distance, zero at the cutoff. From the second layer on atoms need their neighbours' features, which
`communicate` brings; the mean is an `all_reduce`. Forces and virial hold what charges change by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from carryall.errors import InputError
from carryall.exchange import all_reduce, communicate
from carryall.graph.neighbor_graph import NeighborGraph, local_index
from carryall.graph.potential import PotentialSpec
from carryall.graph.segments import segment_sum
from carryall.models.ewald import long_range_spec
from carryall.models.ewald_sums import ewald_energy, ewald_settings
from carryall.models.pair import smooth_cutoff

BASIS = 8


class LearnedEwald(nn.Module):
    """Electrostatics with trainable charges (e): `charges` are where those of each type start, None: 0.

    `layers` of `width` features see neighbours up to `cutoff` (Å), which is the Ewald sum's, too; `accuracy` as in `Ewald`.
    """

    def __init__(
        self,
        type_map: Sequence[str],
        cutoff: float = 8.0,
        charges: Sequence[float] | None = None,
        *,
        accuracy: float = 1e-6,
        width: int = 8,
        layers: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        start = [0.0] * len(type_map) if charges is None else [float(one) for one in charges]
        if len(start) != len(type_map):
            raise InputError(f"charges has {len(start)} numbers for {len(type_map)} types: give one for each")
        if width < 1 or layers < 0:
            raise InputError(f"width must be positive and layers not negative, got {width} and {layers}")
        self.type_map, self.accuracy, self.width = tuple(type_map), float(accuracy), int(width)
        self.settings = ewald_settings(cutoff, accuracy)
        generator = torch.Generator().manual_seed(seed)

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5)

        self.type_charge = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.embedding = weights(len(type_map), width)
        self.radial = nn.ParameterList([weights(width, BASIS) for _ in range(layers)])
        self.own = nn.ParameterList([weights(width, width) for _ in range(layers)])
        self.sent = nn.ParameterList([weights(width, width) for _ in range(layers)])
        self.readout = nn.Parameter(0.1 * weights(width).detach())

    @property
    def spec(self) -> PotentialSpec:
        """Facts about the model."""
        return long_range_spec(self.type_map, self.settings)

    def forward(self, graph: NeighborGraph, edge_vec: Tensor) -> Tensor:
        """(n_local,) energies, eV."""
        return ewald_energy(graph, edge_vec, communicate(self.charges(graph, edge_vec), graph), self.settings)

    def charges(self, graph: NeighborGraph, edge_vec: Tensor) -> Tensor:
        """(n_local,) e; they sum to 0 over each system."""
        cutoff, local = self.settings.cutoff, local_index(graph)
        types = graph.atom_types.index_select(0, local)
        distance = torch.where(graph.edge_mask, edge_vec.square().sum(1), cutoff**2).sqrt()
        centers = torch.linspace(0.0, cutoff, BASIS, dtype=distance.dtype, device=distance.device)
        gaussians = torch.exp(-((distance[:, None] - centers) * (BASIS / cutoff)).square())
        basis = gaussians * smooth_cutoff(distance, 0.0, cutoff)[:, None]
        h, everyone = self.embedding.index_select(0, types), self.embedding.index_select(0, graph.atom_types)
        for layer, (radial, own, sent) in enumerate(zip(self.radial, self.own, self.sent, strict=True)):
            if layer:
                everyone = communicate(h, graph)
            message = (basis @ radial.T) * (everyone @ sent.T).index_select(0, graph.edge_neighbor)
            h = torch.tanh(h @ own.T + segment_sum(message, graph.edge_center, graph.n_local, graph.edge_mask))
        q = self.type_charge.index_select(0, types) + h @ self.readout
        return q - mean_by_system(q, graph)

    def to_dict(self) -> dict[str, Any]:
        """The source form of the model."""
        return {
            "type": "ewald_learned",
            "type_map": list(self.type_map),
            "cutoff": self.settings.cutoff,
            "accuracy": self.accuracy,
            "width": self.width,
            "layers": len(self.radial),
            "@variables": {name: value.detach().cpu().numpy() for name, value in self.state_dict().items()},
        }

    @classmethod
    def from_dict(cls, source: dict[str, Any]) -> LearnedEwald:
        """The inverse of `to_dict`."""
        sizes = {name: source[name] for name in ("accuracy", "width", "layers")}
        model = cls(source["type_map"], source["cutoff"], **sizes)
        model.load_state_dict({name: torch.as_tensor(value) for name, value in source["@variables"].items()})
        return model


def mean_by_system(values: Tensor, graph: NeighborGraph) -> Tensor:
    """(n_local,) mean of `values` (n_local,) over the local atoms, on all ranks, of each atom's system."""
    system = graph.system.index_select(0, local_index(graph))
    sums = all_reduce(segment_sum(torch.stack([values, torch.ones_like(values)], 1), system, graph.n_systems), graph)
    # a system without atoms has a mean too, of nothing
    mean = sums[:, 0] / sums[:, 1].detach().clamp_min(1.0)
    return mean.index_select(0, system)
