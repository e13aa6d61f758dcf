"""DPA-1: the attention descriptor and an energy fitting net, as one model of per-atom energies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from carryall.graph.neighbor_graph import NeighborGraph, local_types
from carryall.graph.potential import PotentialSpec
from carryall.models.dpa1.config import DescriptorConfig, FittingConfig
from carryall.models.dpa1.descriptor import Descriptor
from carryall.models.dpa1.environment import center_blocks
from carryall.models.networks import fitting_net


class DPA1(nn.Module):
    """Per-atom energies of a graph.

    `pair_exclude_types` removes edges, `atom_exclude_types` sets energies to zero; both by type index. `bias_atom_e` (of the
    fitting net) and `out_bias` (of the model) both add; training writes `out_bias`.
    """

    out_bias: Tensor
    bias_atom_e: Tensor

    def __init__(
        self,
        type_map: Sequence[str],
        descriptor: DescriptorConfig | None = None,
        fitting: FittingConfig | None = None,
        *,
        pair_exclude_types: Sequence[tuple[int, int]] = (),
        atom_exclude_types: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.type_map = tuple(type_map)
        self.fitting_config = fitting or FittingConfig()
        self.descriptor = Descriptor(descriptor or DescriptorConfig(), len(self.type_map), generator)
        self.fitting = fitting_net(
            self.descriptor.config.dim_out,
            self.fitting_config.neuron,
            activation_function=self.fitting_config.activation_function,
            resnet_dt=self.fitting_config.resnet_dt,
            generator=generator,
        )
        n_types = len(self.type_map)
        self.register_buffer("bias_atom_e", torch.zeros(n_types, dtype=torch.float64))
        self.register_buffer("out_bias", torch.zeros(n_types, dtype=torch.float64))
        self.pair_exclude_types = tuple((int(a), int(b)) for a, b in pair_exclude_types)
        self.atom_exclude_types = tuple(int(a) for a in atom_exclude_types)
        allowed = torch.ones(n_types, n_types, dtype=torch.bool)
        for a, b in self.pair_exclude_types:
            allowed[a, b] = allowed[b, a] = False
        self.register_buffer("allowed", allowed, persistent=False)
        counted = torch.ones(n_types, dtype=torch.float64)
        counted[list(self.atom_exclude_types)] = 0
        self.register_buffer("counted", counted, persistent=False)

    @property
    def spec(self) -> PotentialSpec:
        """Facts about the model; dtype is that of its weights."""
        dtype = str(self.descriptor.type_embedding.layer.w.dtype).removeprefix("torch.")
        # attention allocates degree^2 numbers a centre: measured, blocks of 64 cost half of 1000 at once
        block_size = 64 if self.descriptor.config.attn_layer else 512
        return PotentialSpec(cutoff=self.descriptor.config.rcut, type_map=self.type_map, dtype=dtype, block_size=block_size)

    def forward(self, graph: NeighborGraph, edge_vec: Tensor) -> Tensor:
        """(n_local,) float64 energies, eV, of `edge_vec` (n_edges, 3), Å."""
        types = local_types(graph)
        if self.pair_exclude_types:
            pair = graph.atom_types.index_select(0, graph.edge_center) * len(self.type_map)
            pair = pair + graph.atom_types.index_select(0, graph.edge_neighbor)
            allowed = self.get_buffer("allowed").reshape(-1).index_select(0, pair)
            graph = graph.replace(edge_mask=graph.edge_mask & allowed)
        blocks = center_blocks(graph, edge_vec, types, self.descriptor.config.rcut)
        energy = self.fitting(self.descriptor(blocks)).squeeze(-1).to(torch.float64)
        energy = energy + (self.bias_atom_e + self.out_bias).index_select(0, types)
        return energy * self.get_buffer("counted").index_select(0, types) if self.atom_exclude_types else energy
