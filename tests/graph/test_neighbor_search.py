"""The neighbour search against brute force and against ASE."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carryall.data import AtomicData, Batch
from carryall.errors import InputError
from carryall.graph import build_graph, graph_from_batch, graph_from_structures, pointer, validate
from carryall.graph.neighbor_search import complete_cell, neighbor_edges, type_indices
from structures import CUTOFF, edge_set, geometries, lengths, structure, structures


def brute_force(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float) -> dict[tuple[int, ...], float]:
    """Distance of every (centre, neighbour, shift): all pairs, all images that could reach."""
    reach = [0, 0, 0]
    if pbc.any():
        fractional = positions @ np.linalg.inv(complete_cell(cell, pbc))
        spread = np.ptp(fractional, axis=0)
        heights = 1 / np.linalg.norm(np.linalg.inv(complete_cell(cell, pbc)), axis=0)
        reach = [int(np.ceil(cutoff / heights[k] + spread[k])) if pbc[k] else 0 for k in range(3)]
    found = {}
    for shift in itertools.product(*[range(-n, n + 1) for n in reach]):
        delta = positions[None] + np.array(shift) @ cell - positions[:, None]
        distance = np.sqrt((delta**2).sum(-1))
        for i, j in zip(*np.nonzero(distance <= cutoff), strict=True):
            if i != j or any(shift):
                found[(int(i), int(j), *shift)] = float(distance[i, j])
    return found


def clear_of(distances: dict[tuple[int, ...], float], cutoff: float) -> set[tuple[int, ...]]:
    """Edges that are not within round-off of the cutoff."""
    return {edge for edge, d in distances.items() if abs(d - cutoff) > 1e-9}


def check(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float) -> None:
    expected = brute_force(positions, cell, pbc, cutoff + 1e-6)
    center, neighbor, shift = neighbor_edges(positions, cell, pbc, cutoff)
    found = set(zip(center.tolist(), neighbor.tolist(), *shift.T.tolist(), strict=True))
    assert len(found) == len(center), "an edge is there twice"
    inside = {edge for edge, d in expected.items() if d <= cutoff}
    boundary = set(expected) - clear_of(expected, cutoff)
    assert found - boundary == inside - boundary


@pytest.mark.parametrize("name", geometries())
@pytest.mark.parametrize("cutoff", [2.0, CUTOFF, 7.5])
def test_search_equals_brute_force(name: str, cutoff: float) -> None:
    positions, cell, pbc = geometries()[name]
    data = AtomicData(positions, [1] * len(positions), cell, pbc)
    check(positions, np.zeros((3, 3)) if cell is None else cell, data.pbc.numpy(), cutoff)


@pytest.mark.parametrize("name", geometries())
def test_search_equals_ase(name: str) -> None:
    ase = pytest.importorskip("ase")
    neighborlist = pytest.importorskip("ase.neighborlist")
    positions, cell, pbc = geometries()[name]
    atoms = ase.Atoms(f"H{len(positions)}", positions, cell=cell, pbc=(cell is not None) if pbc is None else pbc)
    i, j, shift, distance = neighborlist.neighbor_list("ijSd", atoms, CUTOFF)
    graph = graph_from_structures([AtomicData.from_ase(atoms)], CUTOFF, ["H"])
    assert edge_set(graph) == set(zip(i.tolist(), j.tolist(), *shift.T.tolist(), strict=True))
    assert np.allclose(np.sort(lengths(graph).numpy()), np.sort(distance), rtol=0, atol=1e-12)


@st.composite
def random_systems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Any cell that is not nearly flat, atoms in and out of it, any periodicity."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_atoms = draw(st.integers(1, 6))
    pbc = np.array(draw(st.tuples(st.booleans(), st.booleans(), st.booleans())))
    size = draw(st.floats(1.5, 6.0))
    cell = np.diag(rng.uniform(0.7, 1.3, 3)) * size + rng.uniform(-0.35, 0.35, (3, 3)) * size
    if draw(st.booleans()):
        cell[0] = -cell[0]  # left-handed
    if draw(st.booleans()):
        cell = cell[[2, 0, 1]]
    if draw(st.booleans()):
        cell[~pbc] = 0.0
    positions = rng.uniform(-1.5, 2.5, (n_atoms, 3)) * size
    return positions, cell, pbc, draw(st.floats(0.8, 5.0))


@settings(max_examples=200, deadline=None)
@given(random_systems())
def test_random_systems(system: tuple[np.ndarray, np.ndarray, np.ndarray, float]) -> None:
    positions, cell, pbc, cutoff = system
    box = complete_cell(cell, pbc)
    if abs(np.linalg.det(box)) < 0.2 * np.prod(np.linalg.norm(box, axis=1)):
        return  # a nearly flat cell has thousands of images for the slow reference
    check(positions, cell, pbc, cutoff)


def test_edges_are_sorted_and_ptr_delimits_each_centre() -> None:
    graph = graph_from_structures(structures(["O", "H"]), CUTOFF, ["O", "H"])
    validate(graph)
    rows = torch.cat([graph.edge_center[:, None], graph.edge_neighbor[:, None], graph.edge_shift.long()], dim=1).tolist()
    assert rows == sorted(rows)
    for center in range(graph.n_local):
        assert (graph.edge_center[graph.ptr[center] : graph.ptr[center + 1]] == center).all()
    assert int(graph.ptr[-1]) == graph.n_edges == len(rows)
    assert float(lengths(graph).max()) <= CUTOFF
    assert (graph.system[graph.edge_center] == graph.system[graph.edge_neighbor]).all()


def test_every_edge_has_its_reverse() -> None:
    edges = edge_set(graph_from_structures([structure("tiny_triclinic", ["O"])], CUTOFF, ["O"]))
    assert len(edges) > 50
    assert edges == {(j, i, -a, -b, -c) for i, j, a, b, c in edges}


def test_batch_equals_single_graphs() -> None:
    items = structures(["O", "H"])
    batched = graph_from_structures(items, CUTOFF, ["H", "O"])
    offset = 0
    for item in items:
        single = graph_from_structures([item], CUTOFF, ["H", "O"])
        rows = (batched.edge_center >= offset) & (batched.edge_center < offset + item.n_atoms)
        assert torch.equal(batched.edge_center[rows] - offset, single.edge_center)
        assert torch.equal(batched.edge_neighbor[rows] - offset, single.edge_neighbor)
        assert torch.equal(batched.edge_shift[rows], single.edge_shift)
        offset += item.n_atoms
    assert batched.n_local == batched.n_atoms == offset
    assert batched.atom_types[:2].tolist() == [1, 0]


def test_a_batch_without_systems_gives_a_graph_without_edges() -> None:
    empty = Batch.from_data_list([structure("open", ["O"])]).index_select([])
    graph = graph_from_batch(empty, CUTOFF, ["O"])
    assert (graph.n_systems, graph.n_atoms, graph.n_edges) == (0, 0, 0)
    validate(graph)


def test_neighbours_are_the_same_whether_atoms_are_wrapped_or_not() -> None:
    inside, outside = (graph_from_structures([structure(name, ["O"])], CUTOFF, ["O"]) for name in ("periodic", "outside_cell"))
    assert torch.allclose(lengths(inside).sort().values, lengths(outside).sort().values, rtol=0, atol=1e-12)
    assert inside.n_edges > 0


def test_pointer_of_centres_without_edges() -> None:
    assert pointer(torch.tensor([1, 1, 3]), 5).tolist() == [0, 0, 2, 2, 3, 3]
    assert pointer(torch.zeros(0, dtype=torch.int64), 2).tolist() == [0, 0, 0]


@pytest.mark.parametrize("missing", [[0], [1], [2], [0, 1], [1, 2], [0, 1, 2]])
def test_missing_cell_vectors_become_unit_normals(missing: list[int]) -> None:
    cell = np.array([[3.0, 0.1, 0.2], [0.5, 4.0, -0.3], [-0.2, 0.6, 5.0]])
    cell[missing] = 0
    box = complete_cell(cell, np.array([axis not in missing for axis in range(3)]))
    kept = [axis for axis in range(3) if axis not in missing]
    assert np.array_equal(box[kept], cell[kept])
    for axis in missing:
        assert np.allclose(np.delete(box, axis, axis=0) @ box[axis], 0, atol=1e-12)
        assert np.isclose(np.linalg.norm(box[axis]), 1)


def graph_of(positions: object, cell: object, pbc: object) -> None:
    n_atoms = len(positions)  # type: ignore[arg-type]
    build_graph(
        torch.tensor(positions, dtype=torch.float64),
        torch.zeros(n_atoms, dtype=torch.int64),
        torch.zeros(n_atoms, dtype=torch.int64),
        torch.tensor([cell], dtype=torch.float64),
        torch.tensor([pbc]),
        3.0,
    )


BAD = {
    "not finite": ([[0.0, 0, 0], [0, float("nan"), 0]], np.eye(3) * 4, [True] * 3, r"system 0: position of atom 1"),
    "coincident": ([[0.0, 0, 0], [1, 1, 1], [0, 0, 1e-9]], np.eye(3) * 4, [True] * 3, r"system 0: atoms 0 and 2 coincide"),
    "coincident across the boundary": ([[0.0, 0, 0], [4, 0, 0]], np.eye(3) * 4, [True] * 3, r"atoms 0 and 1 coincide"),
    "flat cell": ([[0.0, 0, 0]], [[1.0, 0, 0], [2, 0, 0], [0, 0, 1]], [True] * 3, r"no volume"),
    "no cell vector": ([[0.0, 0, 0]], np.diag([1.0, 0, 1]), [True] * 3, r"cell vector 1 is zero"),
    "infinite cell": ([[0.0, 0, 0]], np.diag([1.0, np.inf, 1]), [True] * 3, r"expected finite numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_geometry_is_named(name: str) -> None:
    positions, cell, pbc, message = BAD[name]
    with pytest.raises(InputError, match=message):
        graph_of(positions, np.asarray(cell).tolist(), pbc)


def test_unknown_element_is_named_with_what_is_known() -> None:
    with pytest.raises(InputError, match=r"atom 2 is Cu \(Z = 29\).*knows O, H"):
        type_indices(torch.tensor([8, 1, 29]), ["O", "H"])


def test_no_structures() -> None:
    with pytest.raises(InputError, match="no structures"):
        graph_from_structures([], CUTOFF, ["H"])
