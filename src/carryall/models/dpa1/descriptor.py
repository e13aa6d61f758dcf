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
from carryall.models.dpa1.environment import CenterBlocks, environment_rows, exclude, switch
from carryall.models.dpa1.legacy import EmptySlots
from carryall.models.dpa1.moments import degree_gain, degree_weights, moment_basis
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
        self.compressed: nn.Module | None = None  # tables in place of the nets: `compression.compress` sets it
        self.attention = nn.ModuleList(GatedAttentionLayer(config, generator) for _ in range(config.attn_layer))
        self.degree_gain_raw = degree_gain(config.lmax, generator)
        self.register_buffer("davg", torch.zeros(n_types, 4, dtype=torch.float64))
        self.register_buffer("dstd", torch.ones(n_types, 4, dtype=torch.float64))
        allowed = torch.ones(n_types, n_types, dtype=torch.bool)
        for a, b in config.exclude_types:
            allowed[a, b] = allowed[b, a] = False
        self.register_buffer("allowed", allowed, persistent=False)

    def forward(self, blocks: CenterBlocks, empty: EmptySlots | None = None) -> Tensor:
        """(n_local, dim_out) in the dtype of the weights; geometry is handled in the dtype of the edge vectors.

        `empty` are the slots of DeePMD's padded lists, where those semantics are wanted.
        """
        config = self.config
        if config.exclude_types:
            blocks = exclude(blocks, self.get_buffer("allowed"))
        mask = blocks.mask
        x, y, z = blocks.vector.unbind(-1)
        # one order on every processor, DeePMD's: where the angular gate is ill-conditioned, last bits count
        squared = x * x + (y * y + z * z)
        # without gradient at zero, where spin models put virtual atoms
        distance = torch.where(squared > 0, torch.where(squared > 0, squared, 1.0).sqrt(), 0.0)
        sw = switch(distance, config.rcut_smth, config.rcut) * mask
        rows = environment_rows(blocks.vector, sw, distance, config.env_protection)
        shift, scale = (s.index_select(0, blocks.center_type)[:, None, :] for s in (self.davg, self.dstd))
        rows = (rows - shift) / scale * mask[..., None]
        basis = rows
        if config.lmax > 1:
            basis = moment_basis(rows, blocks.vector, sw, distance, scale[..., 0], config.lmax, config.env_protection)
        dtype = self.type_embedding.layer.w.dtype
        table = self.type_embedding()
        sw, direction = sw.to(dtype), safe_unit(rows[..., 1:]).to(dtype)
        rows = rows.to(dtype)
        g = self._embed(rows[..., :1], sw, table, blocks.center_type, blocks.neighbor_type)
        if len(self.attention):
            # an excluded neighbour leaves an empty slot to the softmax, though none to the sum below
            unseen = None if empty is None else sum(config.sel) - mask.sum(1)
            pairs = pair_gates(config, mask, sw, direction, unseen)
            for layer in self.attention:
                g = layer(g, mask, pairs)
        moments = torch.matmul(g.transpose(1, 2), basis.to(dtype))
        if empty is not None:
            # empty slots have no direction: nothing beyond degree 1
            padding = (0, moments.shape[-1] - 4)
            moments = moments + nn.functional.pad(self._moments_of(empty, table, blocks.center_type), padding)
        moments = moments / sum(config.sel)
        kept = moments[:, : config.axis_neuron]
        if self.degree_gain_raw is not None:
            kept = kept * degree_weights(self.degree_gain_raw)
        out = torch.matmul(moments, kept.transpose(1, 2)).flatten(1)
        if config.concat_output_tebd:
            out = torch.cat([out, table.index_select(0, blocks.center_type)], dim=-1)
        return out

    def _moments_of(self, empty: EmptySlots, table: Tensor, center_type: Tensor) -> Tensor:
        """(n_local, neuron[-1], 4) that the empty slots add: each has the row -davg / dstd, and attends to nothing."""
        rows = (-self.davg / self.dstd).index_select(0, center_type)[:, None, :].to(table.dtype)
        g = self._embed(rows[..., :1], torch.zeros_like(rows[..., 0]), table, center_type, empty.neighbor_type[:, None])
        for layer in self.attention:
            assert isinstance(layer, GatedAttentionLayer)
            g = layer.of_nothing(g)
        return torch.matmul(g.transpose(1, 2), rows * empty.count[:, None, None])

    def _embed(self, radial: Tensor, sw: Tensor, table: Tensor, center_type: Tensor, neighbor_type: Tensor) -> Tensor:
        """(n_local, degree, neuron[-1]) from radial rows (n_local, degree, 1) and the types of both ends."""
        if self.compressed is not None:
            return self.compressed(radial, sw, center_type, neighbor_type)
        shape = neighbor_type.shape
        types = [table.index_select(0, neighbor_type.reshape(-1)).view(*shape, table.shape[1])]
        if not self.config.type_one_side:
            center = table.index_select(0, center_type)[:, None, :]
            types.append(center.expand(*shape, center.shape[-1]))
        if self.embedding_strip is None:
            return self.embedding(torch.cat([radial, *types], dim=-1))
        by_type = self.embedding_strip(torch.cat(types, dim=-1))
        if self.config.smooth_type_embedding:
            by_type = by_type * sw[..., None]
        geometry = self.embedding(radial)
        return geometry * by_type + geometry
