"""A model that passes messages: what an atom tells its neighbours depends on its own. One `communicate` makes it parallel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import carryall
from carryall.data import AtomicData
from carryall.exchange import communicate
from carryall.graph import NeighborGraph, PotentialSpec, segment_sum
from carryall.graph.neighbor_graph import local_types
from carryall.models import EagerPotential
from carryall.models.registry import register


class MessagePassing(nn.Module):
    """Features of an atom grow by messages of its neighbours, twice; its energy is a network of them.

    message = R(r) * (A h_neighbor), h <- tanh(B h + sum of messages), with R of Gaussians of the distance, zero at the cutoff.
    """

    def __init__(self, type_map: tuple[str, ...], cutoff: float, width: int = 8, layers: int = 2, seed: int = 0) -> None:
        super().__init__()
        self.type_map, self.cutoff, self.width = tuple(type_map), float(cutoff), width
        generator = torch.Generator().manual_seed(seed)

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5)

        self.embedding = weights(len(type_map), width)
        self.radial = nn.ParameterList([weights(width, 6) for _ in range(layers)])
        self.own = nn.ParameterList([weights(width, width) for _ in range(layers)])
        self.sent = nn.ParameterList([weights(width, width) for _ in range(layers)])
        self.readout = weights(width)

    @property
    def spec(self) -> PotentialSpec:
        """Its features of ghosts have to be exchanged."""
        return PotentialSpec(cutoff=self.cutoff, type_map=self.type_map, message_passing=True)

    def forward(self, graph: NeighborGraph, edge_vec: Tensor) -> Tensor:
        """(n_local,) energies, eV."""
        r = torch.where(graph.edge_mask, edge_vec.square().sum(1), self.cutoff**2).sqrt()
        centers = torch.linspace(0.0, self.cutoff, 6, dtype=r.dtype, device=r.device)
        x = (r / self.cutoff).clamp_max(1.0)
        switch = 1 - x**3 * (6 * x**2 - 15 * x + 10)
        basis = torch.exp(-((r[:, None] - centers) ** 2)) * switch[:, None]

        h = self.embedding[local_types(graph)]
        for radial, own, sent in zip(self.radial, self.own, self.sent, strict=True):
            everyone = communicate(h @ sent.T, graph)  # (n_local, width) -> (n_atoms, width)
            message = (basis @ radial.T) * everyone.index_select(0, graph.edge_neighbor)
            h = torch.tanh(h @ own.T + segment_sum(message, graph.edge_center, graph.n_local, graph.edge_mask))
        return h @ self.readout

    def to_dict(self) -> dict[str, Any]:
        """What a packed file keeps of it, to make it again."""
        arrays = {name: tensor.detach().numpy() for name, tensor in self.state_dict().items()}
        facts = {"type_map": list(self.type_map), "cutoff": self.cutoff, "width": self.width, "layers": len(self.radial)}
        return {"type": "message_passing", **facts, "@variables": arrays}

    @classmethod
    def from_dict(cls, source: dict[str, Any]) -> MessagePassing:
        """The inverse of `to_dict`."""
        model = cls(source["type_map"], source["cutoff"], source["width"], source["layers"])
        model.load_state_dict({name: torch.as_tensor(array) for name, array in source["@variables"].items()})
        return model


register("message_passing", MessagePassing)


def main() -> None:
    """Pack it, run the file."""
    model = MessagePassing(("Cu", "Au"), cutoff=4.0)
    a = 3.9
    fcc = torch.tensor([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]], dtype=torch.float64) * a
    alloy = AtomicData(
        positions=fcc + 0.05 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),
        atomic_numbers=[29, 29, 79, 79],
        cell=torch.eye(3) * a,
    )
    packed = carryall.load(carryall.pack(model, "message_passing.pte"))
    for name, potential in (("eager", EagerPotential(model)), ("packed", packed)):
        out = carryall.evaluate(potential, alloy, properties=("energy", "forces"))[0]
        print(f"{name}: energy {float(out['energy']):.6f} eV, largest force {abs(out['forces']).max():.6f} eV/Å")


if __name__ == "__main__":
    main()
