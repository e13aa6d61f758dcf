"""Graphs from `i, j, S` triples in any order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from graphs import random_structure
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carryall.data import AtomicData, Batch
from carryall.errors import InputError
from carryall.graph import NeighborGraph, edge_vectors, graph_from_batch, graph_from_structures
from carryall.graph.triples import graph_from_triples
from structures import CUTOFF, add_ghosts, structure

TYPES = ["H", "O"]


def assert_same(found: NeighborGraph, expected: NeighborGraph) -> None:
    for name in ("edge_center", "edge_neighbor", "edge_shift", "edge_mask", "ptr", "system", "atom_types", "positions"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert getattr(found, name).dtype == getattr(expected, name).dtype, name


def again(graph: NeighborGraph, order: Tensor, **changes: Any) -> NeighborGraph:
    """The graph built anew from its edges in another order."""
    n_local = graph.n_local if graph.n_local < graph.n_atoms else None
    given = {"system": graph.system, "n_local": n_local, **changes}
    i, j, shift = graph.edge_center[order], graph.edge_neighbor[order], graph.edge_shift[order]
    return graph_from_triples(graph.positions, graph.atom_types, graph.cell, i, j, shift, **given)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.builds(random_structure, st.integers(0, 2**32 - 1)), min_size=1, max_size=3),
    st.floats(0.8, 4.0),
    st.integers(0, 2**31),
)
def test_any_order_gives_the_graph_of_the_search(items: list[AtomicData], cutoff: float, seed: int) -> None:
    expected = graph_from_structures(items, cutoff, TYPES)
    order = torch.randperm(expected.n_edges, generator=torch.Generator().manual_seed(seed))
    found = again(expected, order)
    assert_same(found, expected)
    assert torch.equal(edge_vectors(found), edge_vectors(expected))


@pytest.mark.parametrize("name", ["tilted", "slab", "open", "one_atom", "tiny_triclinic"])
def test_triples_of_ase_in_numpy(name: str) -> None:
    neighborlist = pytest.importorskip("ase.neighborlist")
    data = structure(name, TYPES)
    atoms = data.to_ase()
    i, j, shift = neighborlist.neighbor_list("ijS", atoms, CUTOFF)
    order = np.random.default_rng(0).permutation(len(i))
    expected = graph_from_batch(Batch.from_data_list([data]), CUTOFF, TYPES)
    cell = None if data.cell is None else data.cell
    found = graph_from_triples(data.positions, expected.atom_types, cell, i[order], j[order], shift[order])
    assert_same(found, expected)
    assert torch.allclose(found.cell, expected.cell)


def test_ghosts_stay_ghosts() -> None:
    graph = add_ghosts(graph_from_structures([structure("tilted", TYPES)], CUTOFF, TYPES))
    found = again(graph, torch.arange(graph.n_edges).flip(0))
    order = torch.argsort(graph.edge_center * graph.n_atoms + graph.edge_neighbor)
    assert found.n_local == graph.n_local < found.n_atoms
    assert torch.equal(found.edge_neighbor, graph.edge_neighbor[order])
    assert torch.equal(edge_vectors(found), edge_vectors(graph)[order])


def test_edge_vectors_are_differentiable() -> None:
    graph = graph_from_structures([structure("tiny_triclinic", TYPES)], 3.0, TYPES)

    def function(positions: Tensor, cell: Tensor) -> Tensor:
        args = (graph.atom_types, cell, graph.edge_center, graph.edge_neighbor, graph.edge_shift)
        return edge_vectors(graph_from_triples(positions, *args))

    assert torch.autograd.gradcheck(
        function, (graph.positions.clone().requires_grad_(), graph.cell[0].clone().requires_grad_())
    )


def test_duplicates_are_kept_and_extra_inputs_go_along() -> None:
    graph = graph_from_structures([structure("periodic", TYPES)] * 2, 3.0, TYPES)
    fparam, aparam = torch.rand(2, 3), torch.rand(graph.n_atoms, 1)
    twice = again(graph, torch.arange(graph.n_edges).repeat(2), fparam=fparam, aparam=aparam)
    assert twice.n_edges == 2 * graph.n_edges
    assert torch.equal(twice.edge_shift[::2], graph.edge_shift)
    assert twice.fparam is fparam
    assert twice.aparam is aparam


def test_shifts_too_large_for_one_number_still_sort() -> None:
    """(centre, neighbour, shift) does not fit 63 bits when the shifts span billions."""
    big = 2**31 - 1
    shift = torch.tensor([[big, 0, -big], [-big, 0, big], [0, big, 0], [0, -big, 0], [0, 0, 1], [0, 0, -1]])
    i, j = torch.tensor([0, 1, 0, 1, 0, 1]), torch.tensor([1, 0, 1, 0, 1, 0])
    positions = torch.tensor([[0.0, 0, 0], [1, 1, 1]], dtype=torch.float64)
    found = graph_from_triples(positions, torch.zeros(2, dtype=torch.int64), torch.eye(3, dtype=torch.float64), i, j, shift)
    expected = sorted(zip(i.tolist(), j.tolist(), *shift.T.tolist(), strict=True))
    rows = torch.cat([found.edge_center[:, None], found.edge_neighbor[:, None], found.edge_shift.long()], dim=1)
    assert [tuple(row) for row in rows.tolist()] == expected


def half(graph: NeighborGraph) -> Tensor:
    """Each pair once, as half lists have it."""
    rows = torch.cat([graph.edge_center[:, None], graph.edge_neighbor[:, None], graph.edge_shift.long()], dim=1).tolist()
    return torch.tensor([i < j or (i == j and shift > [0, 0, 0]) for i, j, *shift in rows]).nonzero().squeeze(1)


@pytest.mark.parametrize("name", ["tiny_triclinic", "one_atom_periodic", "open"])
def test_a_half_list_is_refused_and_made_full_as_the_message_says(name: str) -> None:
    graph = graph_from_structures([structure(name, TYPES)], CUTOFF, TYPES)
    pick = half(graph)
    assert 2 * len(pick) == graph.n_edges
    message = r"triple 0 \(i = 0, j = \d, S = .*a half list\? Give the full list, i, j, S = cat\(\[i, j\]\)"
    with pytest.raises(InputError, match=message):
        again(graph, pick)
    i, j, shift = graph.edge_center[pick], graph.edge_neighbor[pick], graph.edge_shift[pick]
    both = (torch.cat([i, j]), torch.cat([j, i]), torch.cat([shift, -shift]))
    assert_same(graph_from_triples(graph.positions, graph.atom_types, graph.cell, *both), graph)


def test_one_edge_that_is_missing_is_named_and_a_directed_list_is_taken() -> None:
    graph = graph_from_structures([structure("periodic", TYPES)], 3.0, TYPES)
    rows = torch.arange(graph.n_edges)
    back = (graph.edge_center[7], graph.edge_neighbor[7], (-graph.edge_shift[7]).tolist())
    alone = int(next(e for e in rows if (graph.edge_neighbor[e], graph.edge_center[e], graph.edge_shift[e].tolist()) == back))
    kept = torch.cat([rows[:7], rows[8:]])
    with pytest.raises(InputError, match=rf"triple {alone - (alone > 7)} \("):
        again(graph, kept)
    assert again(graph, kept, directed=True).n_edges == graph.n_edges - 1


BAD = {
    "centre": ({"i": [0, 5]}, r"triple 1 \(i = 5, j = 0, S = \[0, 0, 0\]\): i must be 0 to 2$"),
    "neighbour": ({"j": [-1, 0]}, r"triple 0 \(i = 0, j = -1, .*j must be 0 to 2$"),
    "ghost as centre": ({"n_local": 1}, r"triple 1 .*i must be 0 to 0 \(only local atoms are centres\)"),
    "n_local": ({"n_local": 4}, "n_local is 4, expected 0 to 3"),
    "floats": ({"S": np.zeros((2, 3))}, "S has dtype torch.float64: expected integers"),
    "shapes": ({"S": [[0, 0, 0]]}, r"shapes \(2,\), \(2,\) and \(1, 3\): expected \(n,\), \(n,\) and \(n, 3\)"),
    "itself": ({"i": [1, 0, 1], "j": [0, 1, 1], "S": [[0, 0, 0]] * 3}, r"triple 2 \(i = 1, j = 1, .*not its own neighbour"),
    "coincident": ({"i": [2, 0], "j": [0, 2]}, r"triple 1 \(i = 0, j = 2, .*coincide"),
    "no cell": ({"S": [[1, 0, 0], [-1, 0, 0]], "cell": None}, r"triple 0 .*cell vector that is zero"),
    "another system": ({"system": [0, 1, 0], "cell": [np.eye(3) * 3] * 2}, r"triple 0 .*different systems"),
    "too far": ({"S": [[2**40, 0, 0], [-(2**40), 0, 0]]}, "triple 0 .*does not fit 32 bits"),
    "type": ({"atom_types": [0, -1, 0]}, r"atom_types\[1\] is negative"),
    "cell shape": ({"cell": np.eye(3)[:2]}, r"cell has shape \(1, 2, 3\), expected \(n_systems, 3, 3\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named_by_its_place_in_the_input(name: str) -> None:
    changes, message = BAD[name]
    values: dict[str, Any] = {
        "positions": torch.tensor([[0.0, 0, 0], [1, 1, 1], [0, 0, 1e-8]], dtype=torch.float64),
        "atom_types": torch.zeros(3, dtype=torch.int64),
        "cell": torch.eye(3, dtype=torch.float64) * 3,
        "i": [0, 1],
        "j": [1, 0],
        "S": [[0, 0, 0]] * 2,
    }
    graph_from_triples(**values)
    for key, value in changes.items():
        tensor = key in ("cell", "system", "atom_types") and value is not None
        values[key] = torch.as_tensor(np.array(value)) if tensor else value
    with pytest.raises(InputError, match=message):
        graph_from_triples(**values)


def test_no_triples() -> None:
    none = np.zeros(0, dtype=np.int64)
    graph = graph_from_triples(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), None, none, none, none.reshape(0, 3))
    assert (graph.n_edges, graph.n_local, graph.ptr.tolist()) == (0, 2, [0, 0, 0])
