"""The nearest neighbours only, and neighbours without some types."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphs import random_graphs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from carryall.errors import InputError
from carryall.graph import NeighborGraph, edge_vectors, graph_from_structures, validate
from carryall.graph.neighbor_graph import max_degree, select_edges
from carryall.graph.selection import exclude_atom_types, exclude_type_pairs, limit_neighbors
from structures import CUTOFF, edge_set, lengths, structure

TYPES = ["O", "H"]


def kept_by_loops(graph: NeighborGraph, sel: list[int], mixed: bool) -> list[int]:
    """Edges that stay, by sorting the rows of each centre in plain Python."""
    length = np.sqrt((edge_vectors(graph).numpy() ** 2).sum(1)).round(9)  # images at the same distance tie
    kept = []
    for center in range(graph.n_local):
        rows = [e for e in range(int(graph.ptr[center]), int(graph.ptr[center + 1])) if bool(graph.edge_mask[e])]
        room = list(sel)
        for taken, edge in enumerate(sorted(rows, key=lambda e: (length[e], e))):
            t = int(graph.atom_types[graph.edge_neighbor[edge]])
            if taken < sum(sel) if mixed else room[t] > 0:
                room[t] -= 1
                kept.append(edge)
    return sorted(kept)


@settings(max_examples=80, deadline=None)
@given(random_graphs(max_degree=8), st.lists(st.integers(0, 4), min_size=3, max_size=3), st.booleans())
def test_limit_equals_loops(graph: NeighborGraph, sel: list[int], mixed: bool) -> None:
    # positions on a grid, so that ties are exact
    graph = graph.replace(
        positions=graph.positions.mul(2).round(), cell=6 * torch.eye(3, dtype=torch.float64).expand_as(graph.cell)
    )
    limited = limit_neighbors(graph, sel, mixed=mixed)
    index = torch.tensor(kept_by_loops(graph, sel, mixed), dtype=torch.int64)
    keep = torch.zeros(graph.n_edges, dtype=torch.bool).index_fill(0, index, True)
    expected = select_edges(graph, keep)
    for name in ("edge_center", "edge_neighbor", "edge_shift", "edge_mask", "ptr"):
        assert torch.equal(getattr(limited, name), getattr(expected, name)), name
    assert bool(limited.edge_mask.all())
    if mixed:
        assert max_degree(limited) <= sum(sel)


def test_sel_that_does_not_bind_changes_nothing() -> None:
    graph = graph_from_structures([structure("tilted", TYPES), structure("open", TYPES)], CUTOFF, TYPES)
    for sel, mixed in ((max_degree(graph), True), ([max_degree(graph)] * 2, True), ([60, 60], False)):
        limited = limit_neighbors(graph, sel, mixed=mixed)
        assert torch.equal(limited.edge_neighbor, graph.edge_neighbor)
        assert torch.equal(limited.ptr, graph.ptr)
    assert limit_neighbors(graph, 0).n_edges == 0


def test_the_nearest_shell_of_a_crystal() -> None:
    graph = graph_from_structures([structure("periodic", TYPES)], CUTOFF, TYPES)
    limited = validate(limit_neighbors(graph, 12))
    assert limited.ptr.tolist() == list(range(0, 12 * 8 + 1, 12))
    assert float(lengths(limited).max()) < 3.2 < float(lengths(graph).max())


def test_ties_stay_in_the_order_of_edges() -> None:
    graph = graph_from_structures([structure("one_atom_periodic", TYPES)], CUTOFF, TYPES)
    # six images, all at exactly 3.5 Å
    twice = graph.replace(cell=3.5 * torch.eye(3, dtype=torch.float64)[None], positions=torch.zeros_like(graph.positions))
    six = select_edges(twice, lengths(twice) < 3.6)
    assert six.n_edges == 6
    assert limit_neighbors(six, 4).edge_shift.tolist() == six.edge_shift[:4].tolist()


@pytest.mark.parametrize(
    ("sel", "mixed", "message"),
    [
        ([3, -1], True, "none negative, got"),
        ([], True, "sel must be a number of neighbours"),
        ([3], False, "sel has 1 entries but there are neighbours of type 1: give one for each"),
    ],
)
def test_bad_sel(sel: list[int], mixed: bool, message: str) -> None:
    graph = graph_from_structures([structure("periodic", TYPES)], CUTOFF, TYPES)
    with pytest.raises(InputError, match=message):
        limit_neighbors(graph, sel, mixed=mixed)


def pairs_of(graph: NeighborGraph) -> list[tuple[int, int]]:
    """Types of centre and neighbour of each edge that is not masked."""
    ends = (graph.edge_center[graph.edge_mask], graph.edge_neighbor[graph.edge_mask])
    return list(zip(*(graph.atom_types[end].tolist() for end in ends), strict=True))


@settings(max_examples=60, deadline=None)
@given(random_graphs(), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=3), st.booleans())
def test_pairs_of_types(graph: NeighborGraph, pairs: list[tuple[int, int]], drop: bool) -> None:
    found = exclude_type_pairs(graph, pairs, 3, drop=drop)
    excluded = {*pairs, *((b, a) for a, b in pairs)}
    assert pairs_of(found) == [pair for pair in pairs_of(graph) if pair not in excluded]
    if not drop:
        assert found.ptr is graph.ptr
        assert not (found.edge_mask & ~graph.edge_mask).any()


@settings(max_examples=60, deadline=None)
@given(random_graphs(), st.sets(st.integers(0, 2)), st.booleans(), st.booleans())
def test_types_of_atoms(graph: NeighborGraph, types: set[int], as_neighbors: bool, drop: bool) -> None:
    found = exclude_atom_types(graph, types, 3, as_neighbors=as_neighbors, drop=drop)
    assert pairs_of(found) == [(a, b) for a, b in pairs_of(graph) if a not in types and not (as_neighbors and b in types)]
    assert found.n_atoms == graph.n_atoms


def test_dropped_edges_are_those_that_are_masked() -> None:
    graph = graph_from_structures([structure("tilted", TYPES)], CUTOFF, TYPES)
    masked, dropped = (exclude_type_pairs(graph, [(0, 0)], 2, drop=drop) for drop in (False, True))
    assert edge_set(dropped) == edge_set(select_edges(graph, masked.edge_mask))
    assert 0 < dropped.n_edges < graph.n_edges
    validate(dropped)


def test_masking_traces_for_every_size() -> None:
    def masks(center: torch.Tensor, neighbor: torch.Tensor, types: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        graph = template.replace(edge_center=center, edge_neighbor=neighbor, atom_types=types, edge_mask=mask)
        graph = exclude_type_pairs(graph, [(0, 1)], 3)
        return exclude_atom_types(graph, [2], 3).edge_mask

    def inputs(*names: str) -> tuple[torch.Tensor, ...]:
        graph = graph_from_structures([structure(name, ["O", "H", "Cu"]) for name in names], CUTOFF, ["O", "H", "Cu"])
        return graph.edge_center, graph.edge_neighbor, graph.atom_types, graph.edge_mask

    template = graph_from_structures([structure("open", TYPES)], CUTOFF, TYPES)
    program = make_fx(masks, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs("open"))
    for names in (("open",), ("tilted", "slab"), ("one_atom",)):
        assert torch.equal(program(*inputs(*names)), masks(*inputs(*names)))


@pytest.mark.parametrize("bad", [-1, 3])
def test_types_that_are_not_there(bad: int) -> None:
    graph = graph_from_structures([structure("open", TYPES)], CUTOFF, TYPES)
    with pytest.raises(InputError, match=rf"type {bad} to exclude is not there: types are 0 to 2"):
        exclude_type_pairs(graph, [(0, bad)], 3)
    with pytest.raises(InputError, match=rf"type {bad} to exclude is not there: types are 0 to 2"):
        exclude_atom_types(graph, [bad], 3)
