"""Pairs of edges that share a centre: the axis of attention between neighbours, and of angles."""

from __future__ import annotations

import torch
from torch import Tensor

from carryall.errors import InputError
from carryall.graph.neighbor_graph import NeighborGraph, max_degree


def center_edge_pairs(
    graph: NeighborGraph, *, ordered: bool = True, include_self: bool = True, degree: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of edges of one centre as `(first, second, mask)`, each (n_pairs,).

    `ordered` gives (m, n) and (n, m), otherwise only m before n; `include_self` adds (m, m). Pairs are sorted by centre, then
    first, then second edge. Without `degree` the form is compact: n_pairs depends on the data and only real pairs are
    returned. With `degree` it is static: n_local * degree**2 pairs, those that do not exist (or touch a masked edge) masked
    out and pointing at edge 0; a centre of more than `degree` edges is an error, never a wrong pair.
    """
    if degree is None:
        first, second = _compact(graph)
        keep = graph.edge_mask[first] & graph.edge_mask[second] & _wanted(first, second, ordered, include_self)
        first, second = first[keep], second[keep]
        return first, second, torch.ones_like(first, dtype=torch.bool)
    largest = max_degree(graph)
    if largest > degree:
        raise InputError(f"a centre has {largest} edges, more than degree={degree}: give degree={largest} or leave it out")
    return _static(graph, degree, ordered, include_self)


def _compact(graph: NeighborGraph) -> tuple[Tensor, Tensor]:
    degrees = graph.ptr[1:] - graph.ptr[:-1]
    per_edge = degrees.index_select(0, graph.edge_center)
    first = torch.repeat_interleave(torch.arange(graph.n_edges, device=graph.device), per_edge)
    start_of_run = torch.repeat_interleave(per_edge.cumsum(0) - per_edge, per_edge)
    rank = torch.arange(len(first), device=graph.device) - start_of_run
    return first, graph.ptr[graph.edge_center[first]] + rank


def _static(graph: NeighborGraph, degree: int, ordered: bool, include_self: bool) -> tuple[Tensor, Tensor, Tensor]:
    slot = torch.arange(degree, device=graph.device)
    edge = graph.ptr[:-1, None] + slot
    real = edge < graph.ptr[1:, None]
    edge = torch.where(real, edge, 0)
    if graph.n_edges:
        real = real & graph.edge_mask[edge]
    first = edge[:, :, None].expand(-1, degree, degree).reshape(-1)
    second = edge[:, None, :].expand(-1, degree, degree).reshape(-1)
    mask = (real[:, :, None] & real[:, None, :]).reshape(-1) & _wanted(first, second, ordered, include_self)
    return torch.where(mask, first, 0), torch.where(mask, second, 0), mask


def _wanted(first: Tensor, second: Tensor, ordered: bool, include_self: bool) -> Tensor:
    wanted = torch.ones_like(first, dtype=torch.bool) if ordered else first <= second
    return wanted if include_self else wanted & (first != second)
