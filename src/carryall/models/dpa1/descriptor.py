"""The DPA-1 descriptor (`se_atten`) on centre blocks.

Per edge: environment row R (switch / r, switch * vector / r^2), shifted and scaled by statistics. An embedding net turns
(R_0, type embeddings of both ends) into G; attention layers mix the G of one centre's edges; the descriptor is
(G^T R)(R^T G)_axis / nnei^2, invariant under rotation and permutation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carryall.models.dpa1.attention import GatedAttentionLayer, pair_gates, safe_unit
from carryall.models.dpa1.config import DescriptorConfig
from carryall.models.dpa1.environment import CenterBlocks, environment_rows, switch
from carryall.models.dpa1.type_embedding import TypeEmbedding
from carryall.models.networks import embedding_net


class Descriptor(nn.Module):
    """`se_atten` with `concat` or `strip` type embedding."""

    davg: Tensor
    dstd: Tensor

    def __init__(self, config: DescriptorConfig, n_types: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.type_embedding = TypeEmbedding(n_types, config.tebd_dim, config.use_tebd_bias, generator)
        n_type_inputs = config.tebd_dim * (1 if config.type_one_side else 2)
        concat = config.tebd_input_mode == "concat"

        def net(n_in: int) -> nn.Sequential:
            return embedding_net(
                n_in,
                config.neuron,
                activation_function=config.activation_function,
                resnet_dt=config.resnet_dt,
                generator=generator,
            )

        self.embedding = net(1 + n_type_inputs if concat else 1)
        self.embedding_strip = None if concat else net(n_type_inputs)
        self.attention = nn.ModuleList(GatedAttentionLayer(config, generator) for _ in range(config.attn_layer))
        self.register_buffer("davg", torch.zeros(n_types, 4, dtype=torch.float64))
        self.register_buffer("dstd", torch.ones(n_types, 4, dtype=torch.float64))
        allowed = torch.ones(n_types, n_types, dtype=torch.bool)
        for a, b in config.exclude_types:
            allowed[a, b] = allowed[b, a] = False
        self.register_buffer("allowed", allowed, persistent=False)

    def forward(self, blocks: CenterBlocks) -> Tensor:
        """(n_local, dim_out) in the dtype of the weights; geometry is handled in the dtype of the edge vectors."""
        config = self.config
        mask = blocks.mask
        if config.exclude_types:
            mask = mask & self._allowed_pairs(blocks)
        distance = blocks.vector.square().sum(-1).sqrt()
        sw = switch(distance, config.rcut_smth, config.rcut) * mask
        rows = environment_rows(blocks.vector, sw, distance, config.env_protection)
        shift, scale = (s.index_select(0, blocks.center_type)[:, None, :] for s in (self.davg, self.dstd))
        rows = (rows - shift) / scale * mask[..., None]
        dtype = self.type_embedding.layer.w.dtype
        table = self.type_embedding()
        sw, direction = sw.to(dtype), safe_unit(rows[..., 1:]).to(dtype)
        rows = rows.to(dtype)
        g = self._embed(rows[..., :1], sw, table, blocks)
        if len(self.attention):
            pairs = pair_gates(config, mask, sw, direction)
            for layer in self.attention:
                g = layer(g, mask, pairs)
        moments = torch.matmul(g.transpose(1, 2), rows) / sum(config.sel)
        out = torch.matmul(moments, moments[:, : config.axis_neuron].transpose(1, 2)).flatten(1)
        if config.concat_output_tebd:
            out = torch.cat([out, table.index_select(0, blocks.center_type)], dim=-1)
        return out

    def _allowed_pairs(self, blocks: CenterBlocks) -> Tensor:
        n_types = self.davg.shape[0]
        pair = blocks.center_type[:, None] * n_types + blocks.neighbor_type
        return self.get_buffer("allowed").reshape(-1).index_select(0, pair.reshape(-1)).view(pair.shape)

    def _embed(self, radial: Tensor, sw: Tensor, table: Tensor, blocks: CenterBlocks) -> Tensor:
        """(n_local, degree, neuron[-1]) from radial rows (n_local, degree, 1) and the types of both ends."""
        shape = blocks.neighbor_type.shape
        types = [table.index_select(0, blocks.neighbor_type.reshape(-1)).view(*shape, table.shape[1])]
        if not self.config.type_one_side:
            center = table.index_select(0, blocks.center_type)[:, None, :]
            types.append(center.expand(*shape, center.shape[-1]))
        if self.embedding_strip is None:
            return self.embedding(torch.cat([radial, *types], dim=-1))
        by_type = self.embedding_strip(torch.cat(types, dim=-1))
        if self.config.smooth_type_embedding:
            by_type = by_type * sw[..., None]
        geometry = self.embedding(radial)
        return geometry * by_type + geometry
