"""A small network in the form that LAMMPS' ML-IAP interface asks for: what MACE looks like from outside, weak points too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from carryall.data.elements import atomic_number
from carryall.graph import NeighborGraph, PotentialSpec, segment_sum

CHANNELS = 4


class GhostExchange(torch.autograd.Function):
    """The op of such models: it knows nothing but the two calls of the object that it is given."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, data: Any) -> Tensor:
        ctx.data, ctx.width = data, features.shape[-1]
        out = torch.empty_like(features)
        data.forward_exchange(features, out, ctx.width)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        out = torch.empty_like(gradient)
        ctx.data.reverse_exchange(gradient, out, ctx.width)
        return out, None


class SmallMACE(nn.Module):
    """Scalars and vectors of each atom, mixed by messages; like MACE's modules in attributes, batch and answer.

    Its energy is odd in nothing but a triple product, so that a wrong sign of the edge vectors would show.
    """

    def __init__(
        self,
        symbols: tuple[str, ...] = ("Cu", "Au"),
        cutoff: float = 4.0,
        layers: int = 2,
        dtype: torch.dtype = torch.float64,
        heads: tuple[str, ...] = ("Default",),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.register_buffer("r_max", torch.tensor(cutoff, dtype=dtype))
        self.register_buffer("atomic_numbers", torch.tensor([atomic_number(symbol) for symbol in symbols]))
        self.register_buffer("num_interactions", torch.tensor(layers))
        self.heads = list(heads)
        generator = torch.Generator().manual_seed(seed)

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype))

        self.embedding = weights(len(symbols), CHANNELS)
        self.radial = nn.ParameterList([weights(2, CHANNELS, 5) for _ in range(layers)])
        self.mixing = nn.ParameterList([weights(2, CHANNELS, CHANNELS) for _ in range(layers)])
        self.readout = weights(len(heads), CHANNELS)

    def forward(self, data: dict[str, Any], compute_force: bool = True, lammps_mliap: bool = False) -> dict[str, Tensor]:
        """As MACE is called by its ML-IAP wrapper."""
        assert lammps_mliap
        assert not compute_force
        (n_real, n_ghost), exchange = data["natoms"], data["lammps_class"]
        sender, receiver = data["edge_index"]
        every = data["node_attrs"] @ self.embedding
        state = torch.cat([every, every.new_zeros(len(every), 3 * CHANNELS)], 1)
        for layer in range(len(self.radial)):
            if layer:
                padded = torch.cat([state, state.new_zeros(n_ghost, state.shape[1])])
                state = GhostExchange.apply(padded, exchange)
            messages = self.messages(layer, state.index_select(0, sender), data["vectors"])
            summed = messages.new_zeros(len(every), 4 * CHANNELS).index_add(0, receiver, messages)[:n_real]
            state = self.update(layer, state[:n_real], summed)
        head = data["head"][data["batch"]]
        return {"node_energy": (state.reshape(n_real, -1)[:, :CHANNELS] * self.readout[head]).sum(1)}

    def messages(self, layer: int, sent: Tensor, vectors: Tensor) -> Tensor:
        """(n_edges, 4 channels), of the senders' states and the vectors from sender to receiver."""
        r = vectors.norm(dim=1)
        x = r / self.r_max
        switch = torch.where(x < 1, 1 - x**3 * (6 * x**2 - 15 * x + 10), 0.0)
        basis = torch.exp(-((r[:, None] - torch.arange(5, dtype=r.dtype)) ** 2)) * switch[:, None]
        scalar, vector = basis @ self.radial[layer].mT
        scalars, along = sent[:, :CHANNELS], sent[:, CHANNELS:].unflatten(1, (CHANNELS, 3))
        turned = torch.linalg.cross(along, vectors[:, None].expand_as(along))
        carried = (vector * scalars)[:, :, None] * vectors[:, None] + scalar[:, :, None] * (along + turned)
        return torch.cat([scalar * scalars + (along * vectors[:, None]).sum(2), carried.flatten(1)], 1)

    def update(self, layer: int, state: Tensor, summed: Tensor) -> Tensor:
        """(n_real, 4 channels) states of the next layer; like MACE's, it cannot do without rows."""
        _ = state.reshape(state.shape[0], -1)
        scalars, vectors = (part[:, :CHANNELS] for part in (summed, summed[:, CHANNELS:].unflatten(1, (CHANNELS, 3))))
        triple = torch.linalg.cross(vectors, vectors.roll(1, 1)).mul(vectors.roll(2, 1)).sum(2)
        own, received = self.mixing[layer]
        scalars = torch.tanh(state[:, :CHANNELS] @ own.T + scalars @ received.T + vectors.square().sum(2) + 0.3 * triple)
        return torch.cat([scalars, vectors.flatten(1)], 1)


class PlainForm(nn.Module):
    """The same network on a graph without ghosts, where every neighbour is a row of its own: the oracle."""

    def __init__(self, model: SmallMACE, head: int = 0) -> None:
        super().__init__()
        self.model, self.head = model, head

    @property
    def spec(self) -> PotentialSpec:
        return PotentialSpec(cutoff=4.0, type_map=("Cu", "Au"))

    def forward(self, graph: NeighborGraph, edge_vec: Tensor) -> Tensor:
        """(n_local,) energies, eV."""
        assert graph.n_atoms == graph.n_local
        embedded = self.model.embedding[graph.atom_types]
        state = torch.cat([embedded, embedded.new_zeros(graph.n_atoms, 3 * CHANNELS)], 1)
        for layer in range(len(self.model.radial)):
            messages = self.model.messages(layer, state[graph.edge_neighbor], -edge_vec)
            summed = segment_sum(messages, graph.edge_center, graph.n_atoms, graph.edge_mask)
            state = self.model.update(layer, state, summed)
        return state[:, :CHANNELS] @ self.model.readout[self.head]


class Unified:
    """As such models are wrapped for `pair_style mliap unified`; with few pairs it returns before its exchanges, as they do."""

    def __init__(self, model: SmallMACE, element_types: list[str]) -> None:
        self.model, self.element_types = model, element_types
        self.rcutfac, self.dtype = 0.5 * float(model.r_max), model.r_max.dtype

    def compute_forces(self, data: Any) -> None:
        """Fill the energies and give dE/d(rij)."""
        if data.nlocal == 0 or data.npairs <= 1:
            return
        symbols = [atomic_number(symbol) if symbol != "none" else -1 for symbol in self.element_types]
        numbers = torch.tensor(symbols)[torch.as_tensor(data.elems, dtype=torch.int64)]
        node_attrs = (numbers[:, None] == self.model.atomic_numbers).to(self.dtype)
        rij = torch.as_tensor(data.rij).to(self.dtype).requires_grad_()
        edges = torch.stack([torch.as_tensor(data.pair_j, dtype=torch.int64), torch.as_tensor(data.pair_i).long()])
        batch = {
            "vectors": -rij,
            "node_attrs": node_attrs,
            "edge_index": edges,
            "batch": torch.zeros(data.nlocal, dtype=torch.int64),
            "head": torch.zeros(1, dtype=torch.int64),
            "natoms": (data.nlocal, data.ntotal - data.nlocal),
            "lammps_class": data,
        }
        energies = self.model(batch, compute_force=False, lammps_mliap=True)["node_energy"]
        (gradient,) = torch.autograd.grad(energies.sum(), rij)
        torch.as_tensor(data.eatoms).copy_(energies.detach())
        data.energy = energies.sum().item()
        data.update_pair_forces_gpu(gradient.double())
