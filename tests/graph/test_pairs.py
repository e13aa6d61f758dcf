"""Pairs of edges that share a centre: both forms against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from carryall.errors import InputError
from carryall.graph import NeighborGraph, center_edge_pairs, graph_from_structures
from carryall.graph.neighbor_graph import max_degree
from structures import CUTOFF, structure, structures

FLAGS = list(itertools.product([True, False], repeat=2))


def graphs() -> dict[str, NeighborGraph]:
    small = [s for s in structures(["O", "H"]) if s.n_atoms <= 5]
    mixed = graph_from_structures(small, 2.6, ["O", "H"])
    generator = torch.Generator().manual_seed(0)
    masked = mixed.replace(edge_mask=torch.rand(mixed.n_edges, generator=generator) < 0.7)
    return {
        "mixed": mixed,
        "masked": masked,
        "all_masked": mixed.replace(edge_mask=torch.zeros(mixed.n_edges, dtype=torch.bool)),
        "no_edges": graph_from_structures([structure("two_far", ["O", "H"])], CUTOFF, ["O", "H"]),
    }


def brute_force(graph: NeighborGraph, ordered: bool, include_self: bool) -> list[tuple[int, int]]:
    found = []
    for m in range(graph.n_edges):
        for n in range(graph.n_edges):
            same_center = int(graph.edge_center[m]) == int(graph.edge_center[n])
            both = bool(graph.edge_mask[m]) and bool(graph.edge_mask[n])
            if same_center and both and (ordered or m <= n) and (include_self or m != n):
                found.append((m, n))
    return found


@pytest.mark.parametrize("name", graphs())
@pytest.mark.parametrize(("ordered", "include_self"), FLAGS)
def test_both_forms_equal_brute_force(name: str, ordered: bool, include_self: bool) -> None:
    graph = graphs()[name]
    expected = brute_force(graph, ordered, include_self)
    first, second, mask = center_edge_pairs(graph, ordered=ordered, include_self=include_self)
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == expected
    assert mask.all()
    assert len(mask) == len(expected)
    for spare in (0, 2):
        degree = max_degree(graph) + spare
        first, second, mask = center_edge_pairs(graph, ordered=ordered, include_self=include_self, degree=degree)
        assert len(first) == len(second) == len(mask) == graph.n_local * degree**2
        assert list(zip(first[mask].tolist(), second[mask].tolist(), strict=True)) == expected
        assert not first[~mask].any()
        assert not second[~mask].any()


def test_numbers_of_pairs() -> None:
    graph = graphs()["mixed"]
    degrees = (graph.ptr[1:] - graph.ptr[:-1]).tolist()
    assert max(degrees) > 3
    for (ordered, include_self), count in zip(
        FLAGS, [lambda d: d * d, lambda d: d * (d - 1), lambda d: d * (d + 1) // 2, lambda d: d * (d - 1) // 2], strict=True
    ):
        first, _, _ = center_edge_pairs(graph, ordered=ordered, include_self=include_self)
        assert len(first) == sum(count(d) for d in degrees)


def test_a_degree_that_is_too_small_is_an_error() -> None:
    graph = graphs()["mixed"]
    largest = max_degree(graph)
    with pytest.raises(InputError, match=rf"a centre has {largest} edges, more than degree={largest - 1}"):
        center_edge_pairs(graph, degree=largest - 1)
