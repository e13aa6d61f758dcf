"""The graph type: its convention, its checks, and what is made of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from graphs import random_graphs
from hypothesis import given, settings
from torch import Tensor

from carryall.errors import InputError
from carryall.graph import (
    NeighborGraph,
    PotentialSpec,
    concatenate,
    edge_vectors,
    graph_from_structures,
    neighbor_graph,
    validate,
)
from carryall.graph.neighbor_graph import center_slots, edge_name, max_degree, select_edges, squared_lengths
from carryall.graph.ordering import edge_order, group_ranks
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


def test_extra_inputs_follow_selection_and_concatenation() -> None:
    names = ("open", "slab")
    graphs = [
        graph_of(name).replace(fparam=torch.rand(1, 2), aparam=torch.rand(n, 3)) for name, n in zip(names, (7, 8), strict=True)
    ]
    graphs = [graph.replace(spin=torch.rand(graph.n_atoms, 3), charge_spin=torch.rand(1, 2)) for graph in graphs]
    joined = validate(concatenate(graphs))
    assert torch.equal(joined.spin, torch.cat([g.spin for g in graphs]))
    assert torch.equal(joined.charge_spin, torch.cat([g.charge_spin for g in graphs]))
    assert torch.equal(joined.fparam, torch.cat([g.fparam for g in graphs]))
    assert torch.equal(joined.aparam, torch.cat([g.aparam for g in graphs]))
    near = select_edges(joined, lengths(joined) < 3.0)
    assert near.fparam is joined.fparam
    assert near.aparam is joined.aparam
    assert concatenate([graph_of("open"), graph_of("slab")]).fparam is None
    moved = joined.to(dtype=torch.float64)
    assert moved.aparam is not None
    assert moved.aparam.dtype == torch.float64


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"fparam": 2}, {}, "graph 1 has no fparam but graph 0 has fparam of width 2"),
        ({}, {"aparam": 1}, "graph 1 has aparam of width 1 but graph 0 has no aparam"),
        ({"fparam": 2}, {"fparam": 3}, "graph 1 has fparam of width 3 but graph 0 has fparam of width 2"),
        ({"spin": 3}, {}, "graph 1 has no spin but graph 0 has spin of width 3"),
        ({"charge_spin": 2}, {}, "graph 1 has no charge_spin but graph 0 has charge_spin of width 2"),
    ],
)
def test_extra_inputs_belong_to_all_graphs_or_none(first: dict[str, int], second: dict[str, int], message: str) -> None:
    rows = {"fparam": 1, "aparam": 7, "spin": 7, "charge_spin": 1}
    graphs = [
        graph_of("open").replace(**{name: torch.rand(rows[name], width) for name, width in widths.items()})
        for widths in (first, second)
    ]
    with pytest.raises(InputError, match=message):
        concatenate(graphs)


def test_squared_lengths_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of("tilted", "slab", "open")
    expected = edge_vectors(graph).square().sum(1)
    for block in (1, 7, graph.n_edges, graph.n_edges + 1):
        monkeypatch.setattr(neighbor_graph, "EDGES_AT_ONCE", block)
        assert torch.equal(squared_lengths(graph), expected)
    single = graph.to(dtype=torch.float32).replace(positions=graph.positions.float().requires_grad_())
    assert squared_lengths(single).dtype == torch.float64
    assert not squared_lengths(single).requires_grad
    assert torch.allclose(squared_lengths(single), expected, rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(random_graphs())
def test_order_and_ranks_equal_sorting_in_python(graph: NeighborGraph) -> None:
    center, neighbor, shift = graph.edge_center.flip(0), graph.edge_neighbor.flip(0), graph.edge_shift.flip(0)
    rows = list(zip(center.tolist(), neighbor.tolist(), shift.tolist(), strict=True))
    order = edge_order(center, neighbor, shift, graph.n_atoms).tolist()
    assert order == sorted(range(len(rows)), key=lambda row: rows[row])  # stable: duplicates stay in order
    seen: dict[int, int] = {}
    for group, rank in zip(neighbor.tolist(), group_ranks(neighbor, graph.n_atoms).tolist(), strict=True):
        assert rank == seen.setdefault(group, 0)
        seen[group] += 1


@settings(max_examples=50, deadline=None)
@given(random_graphs())
def test_validate_takes_every_graph_that_keeps_the_rules(graph: NeighborGraph) -> None:
    """Duplicates, masks, ghosts, interleaved systems, empty centres."""
    assert validate(graph) is graph
    carried = graph.replace(local=torch.arange(graph.n_local), rank=torch.arange(max_degree(graph) + 2))
    assert validate(carried) is carried


def broken(graph: NeighborGraph, name: str) -> NeighborGraph:
    order = torch.arange(graph.n_edges)
    order[[4, 40]] = order[[40, 4]]
    nan = graph.positions.clone()
    nan[3, 1] = torch.nan
    close = graph.positions.clone()
    far = int(graph.edge_neighbor[9])
    close[far] = close[0] - graph.edge_shift[9].double() @ graph.cell[0]
    changes: dict[str, dict[str, Any]] = {
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
        "no ptr": {"ptr": graph.ptr[:0]},
        "mask dtype": {"edge_mask": graph.edge_mask.long()},
        "shift dtype": {"edge_shift": graph.edge_shift.long()},
        "ptr dtype": {"ptr": graph.ptr.int()},
        "positions dtype": {"positions": graph.positions.long()},
        "two dtypes": {"cell": graph.cell.float()},
        "nan": {"positions": nan},
        "infinite cell": {"cell": graph.cell * torch.inf},
        "itself": {"edge_neighbor": with_entry(graph.edge_neighbor, 8, 0), "edge_shift": with_entry(graph.edge_shift, 8, 0)},
        "coincident": {"positions": close},
        "two systems": {"system": with_entry(graph.system, 7, 1), "cell": graph.cell.repeat(2, 1, 1), "pbc": None},
        "no cell": {"cell": graph.cell * torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)[:, None]},
        "local": {"local": torch.arange(7)},
        "rank": {"rank": torch.arange(3)},
        "rank order": {"rank": torch.arange(60).flip(0)},
        "owners": {"ghost_owner": torch.tensor([0])},
        "fparam": {"fparam": torch.zeros(2, 1)},
        "aparam": {"aparam": torch.zeros(8)},
        "aparam nan": {"aparam": torch.full((8, 1), torch.nan)},
        "aparam integer": {"aparam": torch.zeros(8, 1, dtype=torch.int64)},
        "spin": {"spin": torch.zeros(8)},
        "spin width": {"spin": torch.zeros(8, 2)},
        "spin nan": {"spin": torch.full((8, 3), torch.nan)},
        "charge_spin": {"charge_spin": torch.zeros(8, 2)},
    }
    return graph.replace(**changes[name])


MESSAGES = {
    "neighbour too large": r"edge_neighbor\[5\] is 8, expected 0 to 7 \(it belongs to edge 5: centre 0, neighbour 8, shift \[",
    "neighbour negative": r"edge_neighbor\[6\] is -1, expected 0 to 7 \(it belongs to edge 6: centre 0, neighbour -1",
    "centre is a ghost": r"edge_center\[\d+\] is 8, expected 0 to 7",
    "system": r"system\[1\] is 3, expected 0 to 0$",
    "type": r"atom_types\[2\] is negative",
    "unsorted": r"edge 5 has a smaller centre than the edge before it \(0 after \d\)",
    "ptr": r"ptr does not match edge_center: ptr\[1\] is \d+, expected \d+",
    "shift shape": r"edge_shift has shape \(\d+, 3\), expected \(n_edges, 3\) with n_edges = \d+",
    "mask shape": r"edge_mask has shape \(\d+, 1\), expected \(n_edges\)",
    "cell shape": r"cell has shape \(3, 3\), expected \(n_systems, 3, 3\)",
    "ptr of other atoms": r"ptr is for 9 centres but there are only 8 atoms",
    "no ptr": "ptr is empty",
    "mask dtype": r"edge_mask has dtype torch.int64, expected torch.bool",
    "shift dtype": r"edge_shift has dtype torch.int64, expected torch.int32",
    "ptr dtype": r"ptr has dtype torch.int32, expected torch.int64",
    "positions dtype": r"positions has dtype torch.int64, expected a floating-point one",
    "two dtypes": r"cell has dtype torch.float32 but graph.positions torch.float64",
    "nan": r"positions\[3\] is \[.*nan.*\]: expected finite",
    "infinite cell": r"cell\[0\] is .*expected finite",
    "itself": r"^edge 8: centre 0, neighbour 0, shift \[0, 0, 0\]: an atom is not its own neighbour",
    "coincident": r"^edge \d+: centre 0, neighbour \d, shift \[.*\]: its two atoms coincide",
    "two systems": r"^edge \d+: centre \d, neighbour 7, .* different systems",
    "no cell": r"^edge \d+: centre 0, .* cell vector that is zero",
    "local": "local has 7 entries, but ptr makes it 8",
    "rank": r"rank has 3 entries, but ptr makes it \d+",
    "rank order": "rank must be 0, 1, 2",
    "owners": "ghost_owner has 1 entries but there are 0 ghosts",
    "fparam": r"fparam has shape \(2, 1\), expected \(n_systems, numb_fparam\) with n_systems = 1",
    "aparam": r"aparam has shape \(8,\), expected \(n_atoms, numb_aparam\)",
    "aparam nan": r"aparam\[0\] is \[nan\]: expected finite",
    "aparam integer": r"aparam has dtype torch.int64, expected a floating-point one",
    "spin": r"spin has shape \(8,\), expected \(n_atoms, 3\)",
    "spin width": r"spin has shape \(8, 2\), expected \(n_atoms, 3\)",
    "spin nan": r"spin\[0\] is \[nan, nan, nan\]: expected finite",
    "charge_spin": r"charge_spin has shape \(8, 2\), expected \(n_systems, dim_chg_spin\) with n_systems = 1",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_validate_names_what_is_wrong_and_where(name: str) -> None:
    graph = graph_of("periodic")
    assert validate(graph) is graph
    with pytest.raises(InputError, match=MESSAGES[name]):
        validate(broken(graph, name))


@pytest.mark.parametrize("name", ["itself", "coincident", "two systems", "no cell"])
def test_a_masked_edge_may_be_anything_between_atoms_that_exist(name: str) -> None:
    graph = broken(graph_of("periodic"), name)
    validate(graph.replace(edge_mask=torch.zeros_like(graph.edge_mask)))


def test_the_named_edge_is_the_one() -> None:
    graph = broken(graph_of("periodic"), "coincident")
    with pytest.raises(InputError) as error:
        validate(graph)
    edge = int(str(error.value).split(":")[0].removeprefix("edge "))
    assert float(lengths(graph)[edge]) < 1e-6
    assert str(error.value).startswith(edge_name(graph, edge))
    with pytest.raises(InputError, match=rf"^row {edge} of the list: its two atoms coincide"):
        validate(graph, lambda edge: f"row {edge} of the list")


@pytest.mark.parametrize("name", ["atom_types", "system"])
def test_ghosts_are_like_their_owners(name: str) -> None:
    graph = add_ghosts(graph_of("periodic"))
    values = getattr(graph, name)
    changed = graph.replace(**{name: with_entry(values, 9, 1 - int(values[9]))}, cell=graph.cell.repeat(2, 1, 1), pbc=None)
    with pytest.raises(InputError, match=rf"ghost 1 \(atom 9\) has not the {name} of its owner, atom 0"):
        validate(changed)


def test_owners_are_local_atoms() -> None:
    graph = add_ghosts(graph_of("periodic"))
    assert graph.ghost_owner is not None
    with pytest.raises(InputError, match=r"ghost_owner\[1\] is 8, expected 0 to 7"):
        validate(graph.replace(ghost_owner=with_entry(graph.ghost_owner, 1, 8)))


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
