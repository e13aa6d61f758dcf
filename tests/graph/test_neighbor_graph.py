"""The graph type: its convention, its checks, and what is made of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from carryall.errors import InputError
from carryall.graph import NeighborGraph, PotentialSpec, concatenate, edge_vectors, graph_from_structures, validate
from carryall.graph.neighbor_graph import center_slots, max_degree, select_edges
from structures import CUTOFF, add_ghosts, edge_set, geometries, lengths, structure, structures

TYPES = ["O", "H"]


def graph_of(*names: str) -> NeighborGraph:
    return graph_from_structures([structure(name, TYPES) for name in names], CUTOFF, TYPES)


def test_edge_vectors_follow_the_convention() -> None:
    graph = graph_of("tilted", "slab", "open")
    vectors = edge_vectors(graph)
    for edge in range(0, graph.n_edges, 7):
        i, j = int(graph.edge_center[edge]), int(graph.edge_neighbor[edge])
        shift = sum(int(graph.edge_shift[edge, k]) * graph.cell[graph.system[i], k] for k in range(3))
        assert torch.allclose(vectors[edge], graph.positions[j] + shift - graph.positions[i], rtol=0, atol=1e-14)


def test_edge_vectors_are_differentiable_in_positions_and_cell() -> None:
    graph = graph_of("tiny_triclinic", "one_atom_periodic")

    def function(positions: Tensor, cell: Tensor) -> Tensor:
        return edge_vectors(graph.replace(positions=positions, cell=cell))

    inputs = (graph.positions.clone().requires_grad_(), graph.cell.clone().requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)


def test_the_graph_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        graph_of("open").positions = torch.zeros(1, 3)  # type: ignore[misc]


def test_to_changes_floating_point_fields_only() -> None:
    moved = graph_of("periodic").to(dtype=torch.float32)
    assert (moved.positions.dtype, moved.cell.dtype) == (torch.float32, torch.float32)
    assert (moved.edge_center.dtype, moved.edge_shift.dtype, moved.edge_mask.dtype) == (torch.int64, torch.int32, torch.bool)
    assert edge_vectors(moved).dtype == torch.float32


def test_center_slots_hold_the_edges_of_each_centre() -> None:
    graph = graph_of("slab", "one_atom", "wire")
    edge, real = center_slots(graph)
    assert edge.shape == real.shape == (graph.n_local, max_degree(graph))
    assert edge[real].tolist() == list(range(graph.n_edges))
    assert not edge[~real].any()
    assert real.sum(1).tolist() == (graph.ptr[1:] - graph.ptr[:-1]).tolist()


def test_selecting_edges_keeps_order_and_remakes_ptr() -> None:
    graph = graph_of("periodic", "one_atom", "tilted")
    near = lengths(graph) < 3.0
    kept = select_edges(graph, near)
    validate(kept)
    assert 0 < kept.n_edges < graph.n_edges
    assert edge_set(kept) == edge_set(
        graph_from_structures([structure(n, TYPES) for n in ("periodic", "one_atom", "tilted")], 3.0, TYPES)
    )


def test_concatenate_equals_the_graph_of_the_batch() -> None:
    items = structures(TYPES)
    joined, batched = (
        concatenate([graph_from_structures([one], CUTOFF, TYPES) for one in items]),
        graph_from_structures(items, CUTOFF, TYPES),
    )
    for field in dataclasses.fields(NeighborGraph):
        a, b = getattr(joined, field.name), getattr(batched, field.name)
        assert (a is None and b is None) or torch.equal(a, b), field.name
    assert joined.n_systems == len(geometries())
    validate(joined)


def test_what_does_not_concatenate() -> None:
    with pytest.raises(InputError, match="empty list"):
        concatenate([])
    ghosted = add_ghosts(graph_of("periodic"))
    with pytest.raises(InputError, match=r"graph 1 has \d+ ghost atoms"):
        concatenate([graph_of("open"), ghosted])


def test_ghosts_leave_the_edge_vectors_as_they_are() -> None:
    graph = graph_of("tilted")
    ghosted = validate(add_ghosts(graph))
    assert ghosted.n_local == graph.n_atoms < ghosted.n_atoms
    assert torch.allclose(edge_vectors(ghosted), edge_vectors(graph), rtol=0, atol=1e-12)


def with_entry(values: Tensor, index: int, value: int) -> Tensor:
    changed = values.clone()
    changed[index] = value
    return changed


def broken(graph: NeighborGraph, name: str) -> NeighborGraph:
    order = torch.arange(graph.n_edges)
    order[[4, 40]] = order[[40, 4]]
    changes = {
        "neighbour too large": {"edge_neighbor": with_entry(graph.edge_neighbor, 5, graph.n_atoms)},
        "neighbour negative": {"edge_neighbor": with_entry(graph.edge_neighbor, 6, -1)},
        "centre is a ghost": {"edge_center": with_entry(graph.edge_center, graph.n_edges - 1, graph.n_local)},
        "system": {"system": with_entry(graph.system, 1, 3)},
        "type": {"atom_types": with_entry(graph.atom_types, 2, -1)},
        "unsorted": {"edge_center": graph.edge_center[order], "edge_neighbor": graph.edge_neighbor[order]},
        "ptr": {"ptr": with_entry(graph.ptr, 1, int(graph.ptr[1]) + 1)},
        "shift shape": {"edge_shift": graph.edge_shift[:-1]},
        "mask shape": {"edge_mask": graph.edge_mask[:, None]},
        "cell shape": {"cell": graph.cell[0]},
        "ptr of other atoms": {"ptr": torch.cat([graph.ptr, graph.ptr[-1:]])},
    }
    return graph.replace(**changes[name])


MESSAGES = {
    "neighbour too large": r"edge_neighbor\[5\] is 8, expected 0 to 7",
    "neighbour negative": r"edge_neighbor\[6\] is -1, expected 0 to 7",
    "centre is a ghost": r"edge_center\[\d+\] is 8, expected 0 to 7",
    "system": r"system\[1\] is 3, expected 0 to 0",
    "type": r"atom_types\[2\] is negative",
    "unsorted": r"edge 5 has a smaller centre than the edge before it",
    "ptr": r"ptr does not match edge_center",
    "shift shape": r"edge_shift has shape \(\d+, 3\), expected",
    "mask shape": r"edge_mask has shape",
    "cell shape": r"cell has shape",
    "ptr of other atoms": r"ptr is for 9 centres but there are only 8 atoms",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_validate_names_what_is_wrong_and_where(name: str) -> None:
    graph = graph_of("periodic")
    assert validate(graph) is graph
    with pytest.raises(InputError, match=MESSAGES[name]):
        validate(broken(graph, name))


def test_spec_round_trip_and_bad_values() -> None:
    spec = PotentialSpec(cutoff=5.0, type_map=("O", "H"), message_passing=True, dtype="float32")
    assert PotentialSpec.from_dict({**spec.to_dict(), "from_a_later_version": 1}) == spec
    for bad, message in (
        ({"cutoff": 0.0}, "cutoff must be positive"),
        ({"cutoff": float("nan")}, "cutoff must be positive"),
        ({"dtype": "half"}, "dtype must be one of"),
        ({"type_map": ()}, "type_map must name each element once"),
        ({"type_map": ("O", "O")}, "type_map must name each element once"),
    ):
        with pytest.raises(InputError, match=message):
            PotentialSpec(**{"cutoff": 5.0, "type_map": ("O",), **bad})  # type: ignore[arg-type]
