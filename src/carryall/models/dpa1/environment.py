"""Centre blocks and environment rows: the edges of each centre side by side, ready for batched matrix products."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from carryall.graph.neighbor_graph import NeighborGraph, center_slots


@dataclass(frozen=True, eq=False)
class CenterBlocks:
    """Edges laid out by centre: slot k of centre c is edge ptr[c] + k, or empty when c has fewer edges.

    Empty slots have `mask` false, and hold a vector of the cutoff's length: finite in every function and derivative.
    """

    mask: Tensor
    """(n_local, degree) bool."""
    vector: Tensor
    """(n_local, degree, 3) Å."""
    center_type: Tensor
    """(n_local,) int64."""
    neighbor_type: Tensor
    """(n_local, degree) int64."""


def center_blocks(graph: NeighborGraph, edge_vec: Tensor, center_type: Tensor, far: float) -> CenterBlocks:
    """Lay out `edge_vec` (n_edges, 3) by centre; empty slots get the vector (far, 0, 0)."""
    index, mask = center_slots(graph)
    flat = index.reshape(-1)
    mask = mask & graph.edge_mask.index_select(0, flat).view(index.shape)
    vector = edge_vec.index_select(0, flat).view(*index.shape, 3)
    away = torch.zeros(3, dtype=edge_vec.dtype, device=edge_vec.device)
    away = torch.cat([away[:1] + far, away[1:]])
    vector = torch.where(mask[..., None], vector, away)
    neighbor = graph.atom_types.index_select(0, graph.edge_neighbor).index_select(0, flat).view(index.shape)
    return CenterBlocks(mask, vector, center_type, neighbor)


def exclude(blocks: CenterBlocks, allowed: Tensor) -> CenterBlocks:
    """The blocks with the pairs masked that `allowed` (n_types, n_types) bool, by centre and neighbour, does not hold."""
    pair = blocks.center_type[:, None] * allowed.shape[0] + blocks.neighbor_type
    seen = allowed.reshape(-1).index_select(0, pair.reshape(-1)).view(pair.shape)
    return dataclasses.replace(blocks, mask=blocks.mask & seen)


def switch(distance: Tensor, start: float, end: float) -> Tensor:
    """1 below `start`, 0 above `end`, between them u^3 (-6 u^2 + 15 u - 10) + 1 with u = (r - start) / (end - start)."""
    u = ((distance - start) / (end - start)).clamp(0.0, 1.0)
    uu, rest = u * u, 1 - u
    value = uu * u * (-6 * uu + 15 * u - 10) + 1
    # the same polynomial, whose derivative does not cancel at the cutoff: there, in the first form, ten digits do
    factored = rest * rest * rest * (1 + 3 * u + 6 * uu)
    return value.detach() + (factored - factored.detach())


def environment_rows(vector: Tensor, sw: Tensor, distance: Tensor, protection: float) -> Tensor:
    """(..., 4): sw * [1 / (r + p), x / (r + p)^2, y / (r + p)^2, z / (r + p)^2]."""
    inverse = 1 / (distance + protection)
    radial = (sw * inverse)[..., None]
    return torch.cat([radial, radial * inverse[..., None] * vector], dim=-1)
