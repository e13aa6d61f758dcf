"""Fewer edges: the nearest `sel` of each centre, and without pairs of types or whole types."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from carryall.errors import InputError
from carryall.graph.neighbor_graph import NeighborGraph, select_edges, squared_lengths
from carryall.graph.ordering import group_ranks


def limit_neighbors(graph: NeighborGraph, sel: int | Sequence[int], *, mixed: bool = True) -> NeighborGraph:
    """The graph with the nearest neighbours of each centre only, in the same order; masked edges are left out too.

    `mixed` keeps the sum(sel) nearest of all types, otherwise the sel[t] nearest of each type t. Of neighbours at the same
    distance the earlier edges stay. DeePMD's padded lists do this where `sel` is binding (its `legacy` semantics): `mixed` for
    models that do not distinguish types, like DPA-1; for others its Python backends limit twice, mixed and then by type.
    What is kept depends on values: energies jump where two neighbours at the limit change places, and no derivative sees it.
    """
    capacity = check_sel(sel)
    graph = select_edges(graph, graph.edge_mask)
    rank = nearest_ranks(graph, by_type=not mixed)
    if mixed:
        return select_edges(graph, rank < sum(capacity))
    check_types_have_sel(graph, capacity)
    types = graph.atom_types.index_select(0, graph.edge_neighbor)
    limit = torch.tensor(capacity, device=graph.device)
    return select_edges(graph, rank < limit.index_select(0, types))


def check_sel(sel: int | Sequence[int]) -> list[int]:
    """`sel` as a list; InputError where a number is negative."""
    capacity = [sel] if isinstance(sel, int) else [int(one) for one in sel]
    if not capacity or min(capacity) < 0:
        raise InputError(f"sel must be a number of neighbours, or one for each type, none negative, got {sel}")
    return capacity


def check_types_have_sel(graph: NeighborGraph, capacity: Sequence[int]) -> None:
    """InputError where a neighbour's type has no entry in `sel`."""
    types = graph.atom_types.index_select(0, graph.edge_neighbor)
    if len(types) and int(types.max()) >= len(capacity):
        raise InputError(
            f"sel has {len(capacity)} entries but there are neighbours of type {int(types.max())}: give one for each"
        )


def nearest_ranks(graph: NeighborGraph, *, by_type: bool = False) -> Tensor:
    """(n_edges,) place of each edge among those of its centre (and of its neighbour's type) by distance, ties by edge order."""
    near_first = squared_lengths(graph).sort(stable=True).indices
    group = graph.edge_center
    n_groups = graph.n_local
    if by_type and graph.n_atoms:
        n_types = int(graph.atom_types.max()) + 1
        group = group * n_types + graph.atom_types.index_select(0, graph.edge_neighbor)
        n_groups *= n_types
    ranks = torch.empty_like(group)
    ranks[near_first] = group_ranks(group.index_select(0, near_first), n_groups)
    return ranks


def exclude_type_pairs(
    graph: NeighborGraph, pairs: Iterable[tuple[int, int]], n_types: int, *, drop: bool = False
) -> NeighborGraph:
    """The graph without the edges between types a and b, in both directions, for each (a, b) of `pairs`.

    They are masked (every size stays, and it traces), or removed with `drop`. DeePMD's `pair_exclude_types`.
    """
    allowed = torch.ones(n_types, n_types, dtype=torch.bool)
    for a, b in pairs:
        for one in (a, b):
            _check_type(one, n_types)
        allowed[a, b] = allowed[b, a] = False
    center = graph.atom_types.index_select(0, graph.edge_center)
    neighbor = graph.atom_types.index_select(0, graph.edge_neighbor)
    keep = allowed.to(graph.device).reshape(-1).index_select(0, center * n_types + neighbor)
    return _without(graph, keep, drop)


def exclude_atom_types(
    graph: NeighborGraph, types: Iterable[int], n_types: int, *, as_neighbors: bool = True, drop: bool = False
) -> NeighborGraph:
    """The graph without the edges of atoms of `types`: such atoms are there, but nobody sees them and they see nobody.

    Without `as_neighbors` they only see nobody, while others go on seeing them: DeePMD's `atom_exclude_types`, whose models
    also set the energies of such atoms to zero. Masked or removed as in `exclude_type_pairs`.
    """
    counted = torch.ones(n_types, dtype=torch.bool)
    for one in types:
        _check_type(one, n_types)
        counted[one] = False
    atoms = counted.to(graph.device).index_select(0, graph.atom_types)
    keep = atoms.index_select(0, graph.edge_center)
    if as_neighbors:
        keep = keep & atoms.index_select(0, graph.edge_neighbor)
    return _without(graph, keep, drop)


def _check_type(index: int, n_types: int) -> None:
    if not 0 <= index < n_types:
        raise InputError(f"type {index} to exclude is not there: types are 0 to {n_types - 1}")


def _without(graph: NeighborGraph, keep: Tensor, drop: bool) -> NeighborGraph:
    return select_edges(graph, keep) if drop else graph.replace(edge_mask=graph.edge_mask & keep)
