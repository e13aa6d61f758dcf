"""Pairs of edges that share a centre: all forms against brute force, and the angles between them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from graphs import random_graphs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

from carryall.errors import InputError
from carryall.graph import NeighborGraph, center_edge_pairs, edge_vectors, graph_from_structures, pointer, segment_sum
from carryall.graph.neighbor_graph import max_degree
from carryall.graph.pairs import edge_pair_cosines
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


def pair_list(pairs: tuple[Tensor, Tensor, Tensor]) -> list[tuple[int, int]]:
    first, second, mask = pairs
    return list(zip(first[mask].tolist(), second[mask].tolist(), strict=True))


@settings(max_examples=80, deadline=None)
@given(random_graphs(), st.booleans(), st.booleans(), st.integers(0, 3))
def test_all_forms_on_random_graphs(graph: NeighborGraph, ordered: bool, include_self: bool, spare: int) -> None:
    flags = {"ordered": ordered, "include_self": include_self}
    expected = brute_force(graph, ordered, include_self)
    degree = max_degree(graph) + spare
    assert pair_list(center_edge_pairs(graph, **flags)) == expected
    assert pair_list(center_edge_pairs(graph, degree=degree, **flags)) == expected
    assert pair_list(center_edge_pairs(graph, degree="rank", **flags)) == expected
    carried = graph.replace(rank=torch.arange(degree), local=torch.arange(graph.n_local))
    first, second, mask = center_edge_pairs(carried, degree="rank", **flags)
    assert len(mask) == graph.n_local * degree**2
    assert pair_list((first, second, mask)) == expected


def star(degrees: list[int]) -> NeighborGraph:
    """Centres of these degrees; every edge leads to one atom more, each to another image of it."""
    center = torch.repeat_interleave(torch.arange(len(degrees)), torch.tensor(degrees, dtype=torch.int64))
    n_atoms = len(degrees) + 1
    return NeighborGraph(
        positions=torch.arange(3.0 * n_atoms, dtype=torch.float64).reshape(-1, 3),
        atom_types=torch.zeros(n_atoms, dtype=torch.int64),
        system=torch.zeros(n_atoms, dtype=torch.int64),
        cell=4 * torch.eye(3, dtype=torch.float64)[None],
        edge_center=center,
        edge_neighbor=torch.full_like(center, len(degrees)),
        edge_shift=torch.arange(len(center), dtype=torch.int32)[:, None].repeat(1, 3),
        edge_mask=torch.ones(len(center), dtype=torch.bool),
        ptr=pointer(center, len(degrees)),
    )


@pytest.mark.parametrize("degrees", [[0], [1], [500], [0, 1, 0, 500, 1]])
def test_degrees_zero_one_and_five_hundred(degrees: list[int]) -> None:
    graph = star(degrees)
    compact, static = center_edge_pairs(graph), center_edge_pairs(graph, degree="rank")
    assert len(compact[0]) == sum(d * d for d in degrees)
    assert torch.equal(compact[0], static[0][static[2]])
    assert torch.equal(compact[1], static[1][static[2]])
    assert torch.equal(graph.edge_center[compact[0]], graph.edge_center[compact[1]])
    keys = compact[0] * graph.n_edges + compact[1]
    assert bool((keys[1:] > keys[:-1]).all())


def shuffled(graph: NeighborGraph) -> NeighborGraph:
    order = torch.arange(graph.n_edges)
    order[[0, -1]] = order[[-1, 0]]
    return graph.replace(edge_center=graph.edge_center[order], edge_neighbor=graph.edge_neighbor[order])


BAD_LAYOUTS = {
    "edges not sorted by centre": (shuffled, "edges must be sorted by centre: edge 1 "),
    "ptr of another graph": (
        lambda g: g.replace(ptr=g.ptr.clamp_max(2)),
        r"ptr does not match edge_center: ptr\[1\] is 2, expected 3",
    ),
    "ptr too short": (
        lambda g: g.replace(ptr=g.ptr[:-1]),
        r"edge_center\[3\] is 2, expected 0 to 1 \(it belongs to edge 3: centre 2",
    ),
    "centres beyond ptr": (lambda g: g.replace(edge_center=g.edge_center + 1), r"edge_center\[3\] is 3, expected 0 to 2"),
    "another local": (lambda g: g.replace(local=torch.arange(2)), "local has 2 entries, but ptr makes it 3"),
    "local that is no count": (lambda g: g.replace(local=torch.tensor([0, 2, 1])), "local must be 0, 1, 2"),
    "rank too short": (lambda g: g.replace(rank=torch.arange(2)), "rank has 2 entries, but ptr makes it 3"),
}


@pytest.mark.parametrize("degree", [None, 3, "rank"])
@pytest.mark.parametrize("name", BAD_LAYOUTS)
def test_a_layout_that_does_not_match_is_an_error(name: str, degree: int | str | None) -> None:
    change, message = BAD_LAYOUTS[name]
    graph = star([3, 0, 2])
    center_edge_pairs(graph, degree=degree)
    with pytest.raises(InputError, match=message):
        center_edge_pairs(change(graph), degree=degree)


class StaticPairs(torch.nn.Module):
    """Sum over all pairs of a centre of their cosine, as a model would use the axis."""

    def forward(
        self, vectors: Tensor, center: Tensor, mask: Tensor, ptr: Tensor, local: Tensor, rank: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        none = torch.zeros_like(center)
        graph = NeighborGraph(
            vectors, none, none, vectors[None], center, none, none[:, None], mask, ptr, local=local, rank=rank
        )
        first, second, real = center_edge_pairs(graph, ordered=False, include_self=False, degree="rank")
        cosine = edge_pair_cosines(vectors, first, second, real)
        owner = local[:, None].expand(-1, rank.shape[0] ** 2).reshape(-1)
        return first, second, real, segment_sum(cosine, owner, local.shape[0], real)


def inputs_of(graph: NeighborGraph, spare: int = 0) -> tuple[Tensor, ...]:
    rank = torch.arange(max_degree(graph) + spare)
    return edge_vectors(graph), graph.edge_center, graph.edge_mask, graph.ptr, torch.arange(graph.n_local), rank


def test_the_static_form_traces_for_every_size() -> None:
    edges, ptr, local, rank = (Dim(name, min=0, max=2**30) for name in ("edges", "ptr", "local", "rank"))
    shapes = ({0: edges}, {0: edges}, {0: edges}, {0: ptr}, {0: local}, {0: rank})
    sample = inputs_of(star([7, 0, 5, 2, 3]))
    exported = torch.export.export(StaticPairs(), sample, dynamic_shapes=shapes, strict=False).module()
    flat = make_fx(StaticPairs(), tracing_mode="symbolic")(*sample)
    half = star([4, 1, 6]).replace(edge_mask=torch.arange(11) % 3 != 0)
    for graph in (star([7, 0, 5, 2, 3]), star([2]), star([1, 1]), star([0, 0]), star([]), half):
        for spare in (0, 2):
            inputs = inputs_of(graph, spare)
            expected = StaticPairs()(*inputs)
            first, second, _ = center_edge_pairs(graph, ordered=False, include_self=False)
            assert torch.equal(expected[0][expected[2]], first)
            assert torch.equal(expected[1][expected[2]], second)
            for program in (exported, flat):
                for found, wanted in zip(program(*inputs), expected, strict=True):
                    assert torch.equal(found, wanted)


@pytest.mark.parametrize("degree", [None, "rank"])
def test_what_cannot_be_traced_says_so(degree: str | None) -> None:
    graph = star([2, 1])

    def program(ptr: Tensor) -> Tensor:
        return center_edge_pairs(graph.replace(ptr=ptr), degree=degree)[0]

    with pytest.raises(InputError, match=r"cannot look at degrees: give degree='rank' and a graph with `rank`"):
        make_fx(program)(graph.ptr)


def test_angles_of_a_tetrahedron_and_a_line() -> None:
    corners = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1], [-3, -3, -3]], dtype=torch.float64)
    graph = star([5]).replace(edge_mask=torch.tensor([True, True, True, True, True]))
    first, second, mask = center_edge_pairs(graph, ordered=False, include_self=False)
    cosine = dict(zip(pair_list((first, second, mask)), edge_pair_cosines(corners, first, second).tolist(), strict=True))
    for pair, value in cosine.items():
        line, against = pair == (0, 4), 4 in pair
        assert value == pytest.approx(-1.0 if line else 1 / 3 if against else -1 / 3, abs=1e-15)
    assert math.degrees(math.acos(cosine[0, 1])) == pytest.approx(109.4712206344907, abs=1e-11)


@settings(max_examples=40, deadline=None)
@given(random_graphs(), st.booleans())
def test_cosines_equal_the_law_of_cosines(graph: NeighborGraph, static: bool) -> None:
    first, second, mask = center_edge_pairs(graph, degree="rank" if static else None)
    vectors = edge_vectors(graph)
    poisoned = torch.where(graph.edge_mask[:, None], vectors, torch.nan)
    found = edge_pair_cosines(poisoned, first, second, mask).numpy()
    assert not found[~mask.numpy()].any()
    a, b = vectors[first[mask]].numpy(), vectors[second[mask]].numpy()
    sides = [np.sqrt((side**2).sum(1)) for side in (a, b, a - b)]
    expected = (sides[0] ** 2 + sides[1] ** 2 - sides[2] ** 2) / (2 * sides[0] * sides[1])
    assert np.allclose(found[mask.numpy()], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("poison", [0.0, torch.nan, torch.inf])
def test_cosines_are_differentiable_twice_whatever_masked_edges_hold(poison: float) -> None:
    graph = star([3, 0, 2]).replace(edge_mask=torch.tensor([False, True, True, True, True]))
    pairs = center_edge_pairs(graph, degree=4)
    generator = torch.Generator().manual_seed(2)

    def function(vectors: Tensor) -> Tensor:
        full = torch.where(graph.edge_mask[:, None], vectors, torch.full_like(vectors, poison))
        return edge_pair_cosines(full, *pairs)

    vectors = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (vectors,))
    assert torch.autograd.gradgradcheck(function, (vectors,))
