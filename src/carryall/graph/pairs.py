"""Pairs of edges that share a centre: the axis of attention between neighbours, and of angles."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from carryall.errors import InputError
from carryall.graph.neighbor_graph import NeighborGraph, check_layout, local_index, max_degree, rank_axis

Pairs = tuple[Tensor, Tensor, Tensor]


def center_edge_pairs(
    graph: NeighborGraph,
    *,
    ordered: bool = True,
    include_self: bool = True,
    degree: int | Literal["rank"] | None = None,
) -> Pairs:
    """Pairs of edges of one centre as `(first, second, mask)`, each (n_pairs,).

    `ordered` gives (m, n) and (n, m), otherwise only m before n; `include_self` adds (m, m). Pairs are sorted by centre, then
    first, then second edge. Without `degree` the form is compact: n_pairs depends on the data and only real pairs are
    returned. With `degree` it is static: n_local * degree**2 pairs, those that do not exist (or touch a masked edge) masked
    out and pointing at edge 0. `degree="rank"` takes it from the shape of `graph.rank`, so that one traced program serves
    every degree.

    InputError where edges are not sorted by centre, `ptr` is not theirs, or a centre has more than `degree` edges: never a
    wrong pair. While a program is traced there are no values to look at: give it graphs that `validate` has passed.
    """
    if _is_traced(graph.ptr):
        if degree is None or (degree == "rank" and graph.rank is None):
            raise InputError("a traced program cannot look at degrees: give degree='rank' and a graph with `rank`, or a number")
    else:
        check_layout(graph)
        largest = max_degree(graph)
        if isinstance(degree, int) and largest > degree:
            raise InputError(f"a centre has {largest} edges, more than degree={degree}: give degree={largest} or leave it out")
    if degree is None:
        return _compact(graph, ordered, include_self)
    slots = rank_axis(graph) if degree == "rank" else torch.arange(degree, device=graph.device)
    return _static(graph, slots, ordered, include_self)


def edge_pair_cosines(vectors: Tensor, first: Tensor, second: Tensor, mask: Tensor | None = None) -> Tensor:
    """(n_pairs,) cosine of the angle between the two edges of each pair, 0 where masked.

    vectors (n_edges, 3), Å; first, second and mask as `center_edge_pairs` gives them. Differentiable to any order; an edge
    of length zero may only be in masked pairs. Rounding may carry a cosine an ulp beyond 1.
    """
    a, b = _ends(vectors, first, mask), _ends(vectors, second, mask)
    cosine = (a * b).sum(1) * (a.square().sum(1) * b.square().sum(1)).rsqrt()
    return cosine if mask is None else torch.where(mask, cosine, torch.zeros_like(cosine))


def _ends(vectors: Tensor, edge: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return vectors.index_select(0, edge)
    # a row of its own for masked pairs: edge 0 may be masked too, or not be there at all
    rows = torch.cat([vectors.new_ones(1, 3), vectors])
    return rows.index_select(0, torch.where(mask, edge + 1, 0))


def _is_traced(value: Tensor) -> bool:
    return torch.compiler.is_compiling() or isinstance(value, FakeTensor) or get_proxy_mode() is not None


def _compact(graph: NeighborGraph, ordered: bool, include_self: bool) -> Pairs:
    degrees = graph.ptr[1:] - graph.ptr[:-1]
    per_edge = degrees.index_select(0, graph.edge_center)
    first = torch.repeat_interleave(torch.arange(graph.n_edges, device=graph.device), per_edge)
    start_of_run = torch.repeat_interleave(per_edge.cumsum(0) - per_edge, per_edge)
    rank = torch.arange(len(first), device=graph.device) - start_of_run
    second = graph.ptr[graph.edge_center[first]] + rank
    keep = graph.edge_mask[first] & graph.edge_mask[second] & _wanted(first, second, ordered, include_self)
    first, second = first[keep], second[keep]
    return first, second, torch.ones_like(first, dtype=torch.bool)


def _static(graph: NeighborGraph, slots: Tensor, ordered: bool, include_self: bool) -> Pairs:
    local = local_index(graph)
    edge = graph.ptr.index_select(0, local)[:, None] + slots
    real = edge < graph.ptr.index_select(0, local + 1)[:, None]
    # one masked edge more than there are, for slots beyond a centre's degree
    mask = torch.cat([graph.edge_mask.new_zeros(1), graph.edge_mask])
    place = torch.where(real, edge + 1, 0)
    real = mask.index_select(0, place.reshape(-1)).view(place.shape)
    n_local, degree = edge.shape
    first = edge[:, :, None].expand(n_local, degree, degree).reshape(-1)
    second = edge[:, None, :].expand(n_local, degree, degree).reshape(-1)
    both = (real[:, :, None] & real[:, None, :]).reshape(-1) & _wanted(first, second, ordered, include_self)
    return torch.where(both, first, 0), torch.where(both, second, 0), both


def _wanted(first: Tensor, second: Tensor, ordered: bool, include_self: bool) -> Tensor:
    wanted = torch.ones_like(first, dtype=torch.bool) if ordered else first <= second
    return wanted if include_self else wanted & (first != second)
