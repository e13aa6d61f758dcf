"""Lists by machine code hold the edges of vesin's search, in the same order, for every way that they are searched."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carryall.data import AtomicData, Batch
from carryall.graph import NeighborGraph, SkinNeighborList, Systems, UnsearchableError, graph_from_batch, validate
from carryall.native import library
from carryall.native.lists import Arrays, NativeLists
from structures import CUTOFF, fcc, geometries

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")
TYPES = ["H"]


def atoms(positions: np.ndarray, cell: object = None, pbc: object = None) -> AtomicData:
    return AtomicData(positions, [1] * len(positions), cell, pbc)  # type: ignore[arg-type]


def assert_same(found: NeighborGraph, expected: NeighborGraph) -> None:
    for name in ("edge_center", "edge_neighbor", "edge_shift", "edge_mask", "ptr"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert getattr(found, name).dtype == getattr(expected, name).dtype


def check(items: list[AtomicData], cutoff: float, skin: float = 0.0) -> int:
    batch = Batch.from_data_list(items)
    neighbors = SkinNeighborList(cutoff, TYPES, skin)
    assert neighbors.native(Systems.of(batch)) is not None
    found = neighbors.graph(batch)
    assert_same(found, graph_from_batch(batch, cutoff, TYPES))
    validate(found)
    return found.n_edges


def random_structure(seed: int, n_atoms: int, spread: float = 1.5) -> AtomicData:
    """Any cell that is not nearly flat, atoms in and out of it, any periodicity, one atom for each 20 Å^3."""
    rng = np.random.default_rng(seed)
    size = (20.0 * n_atoms) ** (1 / 3)
    cell = np.diag(rng.uniform(0.8, 1.25, 3)) * size + rng.uniform(-0.25, 0.25, (3, 3)) * size
    pbc = rng.random(3) < 0.6
    if rng.random() < 0.3:
        cell[0] = -cell[0]  # left-handed
    fractional = rng.uniform(-spread, spread + 1, (n_atoms, 3)) * pbc + rng.uniform(0, 1, (n_atoms, 3)) * ~pbc
    positions = fractional @ cell
    if rng.random() < 0.5:
        cell[~pbc] = 0.0
    return atoms(positions, cell if cell.any() else None, pbc)


@pytest.mark.parametrize("skin", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("cutoff", [2.0, CUTOFF, 7.5])
def test_known_structures(cutoff: float, skin: float) -> None:
    items = [atoms(*geometry) for geometry in geometries().values()]
    assert check(items, cutoff, skin) > (0 if cutoff < 3 else 100)


@settings(max_examples=120, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 8)), min_size=1, max_size=4), st.floats(0.8, 6.0))
def test_small_systems(picks: list[tuple[int, int]], cutoff: float) -> None:
    check([random_structure(seed, n) for seed, n in picks], cutoff, 0.4)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1100, 1700), st.sampled_from([2.5, 4.0, 6.0]), st.sampled_from([0.0, 1.5]))
def test_systems_that_are_binned(seed: int, n_atoms: int, cutoff: float, spread: float) -> None:
    assert check([random_structure(seed, n_atoms, spread)], cutoff, 0.3) > n_atoms


def test_bins_of_which_hardly_any_are_occupied() -> None:
    """Clusters far from each other: a table of all bins would have billions of entries (and vesin has one)."""
    rng = np.random.default_rng(2)
    cluster = rng.uniform(0, 14, (150, 3))
    far = np.concatenate([cluster + rng.uniform(-1e5, 1e5, 3) for _ in range(12)])
    found = SkinNeighborList(5.0, TYPES).graph(Batch.from_data_list([atoms(far)]))
    assert_all_pairs(found, far, 5.0)
    slab = np.concatenate([rng.uniform(0, 30, (1200, 3)), [[3.0, 4.0, 9e6]]])
    periodic = atoms(slab, np.diag([30.0, 30.0, 0.0]), (True, True, False))
    assert_all_pairs(SkinNeighborList(4.0, TYPES).graph(Batch.from_data_list([periodic])), slab, 4.0, 30.0)


def assert_all_pairs(graph: NeighborGraph, positions: np.ndarray, cutoff: float, side: float | None = None) -> None:
    """All pairs, one by one, with the images along x and y in a box of that side."""
    rows = []
    images = [(0, 0)] if side is None else [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    for a, b in images:
        moved = positions + np.array([a, b, 0]) * (side or 0.0)
        near = ((moved[None] - positions[:, None]) ** 2).sum(-1) <= cutoff**2
        i, j = np.nonzero(near & ~(np.eye(len(positions), dtype=bool) & (a == b == 0)))
        rows.append(np.stack([i, j, np.full_like(i, a), np.full_like(i, b)], 1))
    expected = sorted(map(tuple, np.concatenate(rows).tolist()))
    found = torch.cat([graph.edge_center[:, None], graph.edge_neighbor[:, None], graph.edge_shift[:, :2]], 1)
    assert list(map(tuple, found.tolist())) == expected
    assert len(expected) > len(positions)


def test_one_cell_of_many_images() -> None:
    cell = np.array([[1.1, 0, 0], [0.2, 1.2, 0], [-0.3, 0.1, 1.3]])
    assert check([atoms(np.array([[0.3, 0.1, 0.2]]), cell)], 9.0, 1.0) > 1700


def test_atoms_that_drifted_apart_by_whole_cells() -> None:
    """Each atom in another image: shifts are many, and edges are the same."""
    rng = np.random.default_rng(4)
    positions, cell = fcc((2, 2, 2))
    check([atoms(positions + rng.integers(-3, 4, (32, 3)) @ cell, cell)], 5.0, 1.0)
    check([atoms(positions + rng.integers(-1000, 1000, (32, 3)) @ cell, cell)], 5.0, 1.0)
    many, box = fcc((6, 6, 6))
    check([atoms(many + rng.integers(-40, 40, (864, 3)) @ box, box)], 4.0, 0.5)


def test_an_atom_that_flew_out_of_reach_of_numbers_is_named() -> None:
    positions, cell = fcc((2, 1, 1))
    positions[5, 1] = 1e13
    batch = Batch.from_data_list([atoms(fcc((2, 1, 1))[0], cell), atoms(positions, cell)])
    with pytest.raises(UnsearchableError, match="system 1: atom 5 is more than 1e9 cells away"):
        SkinNeighborList(4.0, TYPES).graph(batch)


def test_sizes_at_the_ends() -> None:
    one = atoms(np.zeros((1, 3)))
    batch = Batch.from_data_list([one, one])
    assert SkinNeighborList(3.0, TYPES).graph(batch).n_edges == 0
    none = batch.index_select([])
    graph = SkinNeighborList(3.0, TYPES).graph(none)
    assert (graph.n_systems, graph.n_atoms, graph.n_edges) == (0, 0, 0)
    hollow = Arrays.of(
        torch.tensor([0, 0, 1, 1]), None, torch.zeros(1, 3), torch.zeros(3, 3, 3), torch.zeros(3, 3, dtype=torch.bool)
    )
    (center, _, _, ptr), problems = NativeLists(3.0, 0.5).edges(hollow)
    assert (len(center), ptr.tolist(), problems) == (0, [0, 0], {})


def test_float32_and_strided_input_is_read_as_it_is() -> None:
    positions, cell = fcc((2, 2, 2))
    batch = Batch.from_data_list([atoms(positions, cell)])
    expected = SkinNeighborList(4.0, TYPES).graph(batch)
    systems = Systems.of(batch)
    wide = torch.zeros(32, 6, dtype=torch.float64)
    wide[:, ::2] = batch.positions
    strided = Systems(wide[:, ::2], *(getattr(systems, name) for name in ("atomic_numbers", "system", "ptr", "cell", "pbc")))
    assert_same(SkinNeighborList(4.0, TYPES).graph(strided), expected)
    assert_same(SkinNeighborList(4.0, TYPES).graph(batch.to(dtype=torch.float32)), expected)


def test_sizes_that_do_not_fit_are_refused() -> None:
    good = (torch.tensor([0, 1]), None, torch.zeros(1, 3), torch.zeros(1, 3, 3), torch.zeros(1, 3, dtype=torch.bool))
    Arrays.of(*good)
    for k, bad in (
        (0, torch.tensor([0, 2])),
        (0, torch.tensor([0])),
        (1, torch.zeros(2)),
        (2, torch.zeros(2, 3)),
        (4, torch.zeros(3)),
    ):
        with pytest.raises(ValueError, match="sizes do not fit"):
            Arrays.of(*good[:k], bad, *good[k + 1 :])  # type: ignore[arg-type]


def test_copies_start_without_lists() -> None:
    positions, cell = fcc((2, 2, 2))
    batch = Batch.from_data_list([atoms(positions, cell)])
    neighbors = SkinNeighborList(4.0, TYPES)
    expected = neighbors.graph(batch)
    for other in (copy.deepcopy(neighbors), pickle.loads(pickle.dumps(neighbors))):
        assert other.n_searches == 0
        assert_same(other.graph(batch), expected)
        assert other.n_searches == 1


def test_threads_change_nothing() -> None:
    items = [random_structure(seed, 300) for seed in range(6)]
    batch = Batch.from_data_list(items)
    before = torch.get_num_threads()
    expected = SkinNeighborList(5.0, TYPES).graph(batch)
    try:
        torch.set_num_threads(3)
        neighbors = SkinNeighborList(5.0, TYPES)
        assert_same(neighbors.graph(batch), expected)
        assert neighbors.n_searches == 6
    finally:
        torch.set_num_threads(before)
