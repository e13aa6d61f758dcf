"""DeePMD's padded form: against brute force over explicit images, and there and back."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from graphs import random_graphs, random_structure
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carryall.data import AtomicData
from carryall.errors import InputError
from carryall.graph import NeighborGraph, build_graph, edge_vectors, graph_from_structures, validate
from carryall.graph.neighbor_graph import max_degree, select_edges
from carryall.graph.neighbor_search import complete_cell
from carryall.graph.padded import PaddedNeighbors, graph_from_padded, padded_from_graph
from carryall.graph.selection import limit_neighbors
from structures import CUTOFF, add_ghosts, lengths, structure

TYPES = ["H", "O"]
structures_lists = st.lists(st.builds(random_structure, st.integers(0, 2**32 - 1)), min_size=1, max_size=3)


def brute_force(items: list[AtomicData], cutoff: float, seed: int) -> PaddedNeighbors:
    """The quartet by copying whole cells and comparing all distances; rows in random order, virtual atoms among the owned."""
    rng = np.random.default_rng(seed)
    frames = []
    nloc = max(one.n_atoms for one in items) + 2
    for one in items:
        xyz, pbc = one.positions.numpy(), one.pbc.numpy()
        cell = np.zeros((3, 3)) if one.cell is None else one.cell.numpy()
        slots = np.sort(rng.permutation(nloc)[: len(xyz)])  # the others are virtual
        box = complete_cell(cell, pbc)
        spread = np.ptp(xyz @ np.linalg.inv(box), axis=0)
        heights = 1 / np.linalg.norm(np.linalg.inv(box), axis=0)
        reach = [int(np.ceil(cutoff / heights[k] + spread[k])) if pbc[k] else 0 for k in range(3)]
        coord, atype = np.zeros((nloc, 3)), np.full(nloc, -1)
        coord[slots], atype[slots] = xyz, [TYPES.index({1: "H", 8: "O"}[int(z)]) for z in one.atomic_numbers]
        parts = [(coord, atype, np.arange(nloc))]
        for image in itertools.product(*[range(-n, n + 1) for n in reach]):
            if any(image):
                moved = xyz + np.array(image) @ cell
                near = np.sqrt(((moved[:, None] - xyz) ** 2).sum(-1)).min(1) <= cutoff
                parts.append((moved[near], atype[slots][near], slots[near]))
        frames.append(tuple(np.concatenate([part[k] for part in parts]) for k in range(3)))
    nall = max(len(frame[0]) for frame in frames) + 1
    rows = [[_row(frame, c, nloc, cutoff, rng) for c in range(nloc)] for frame in frames]
    nnei = max(len(row) for frame_rows in rows for row in frame_rows) + 2
    padded = [[np.r_[row, [-1] * (nnei - len(row))] for row in frame_rows] for frame_rows in rows]
    nlist = [[rng.permutation(row) for row in frame_rows] for frame_rows in padded]
    fill = [(0.0, -1, 0), (0.0, -1, -1)][seed % 2]  # what virtual ghosts hold does not matter
    arrays = [
        np.stack([np.concatenate([f[k], np.full((nall - len(f[k]), *f[k].shape[1:]), fill[k])]) for f in frames])
        for k in range(3)
    ]
    coord, atype, mapping = (torch.from_numpy(array) for array in arrays)
    return PaddedNeighbors(coord, atype.long(), torch.from_numpy(np.array(nlist)).long(), mapping.long())


def _row(frame: tuple[np.ndarray, ...], center: int, nloc: int, cutoff: float, rng: np.random.Generator) -> np.ndarray:
    coord, atype, _ = frame
    if atype[center] < 0:
        return np.flatnonzero(atype < 0)[:1]  # an entry of a virtual atom is no edge
    distance = np.sqrt(((coord - coord[center]) ** 2).sum(1))
    near = (distance <= cutoff) & (np.arange(len(coord)) != center) & (atype >= 0)
    virtual = np.flatnonzero(atype < 0)[:1] if rng.random() < 0.3 else []  # nor is one to a virtual atom
    return np.concatenate([np.flatnonzero(near), virtual]).astype(int)


def cells(items: list[AtomicData]) -> Tensor:
    zero = torch.zeros(3, 3, dtype=torch.float64)
    return torch.stack([zero if one.cell is None else one.cell for one in items])


EDGES = ("edge_center", "edge_neighbor", "edge_shift", "ptr")


@settings(max_examples=60, deadline=None)
@given(structures_lists, st.floats(0.8, 3.5), st.integers(0, 2**31))
def test_folding_images_of_brute_force_gives_the_graph_of_the_search(items: list[AtomicData], cutoff: float, seed: int) -> None:
    expected = graph_from_structures(items, cutoff, TYPES)
    quartet = brute_force(items, cutoff, seed)
    found = graph_from_padded(*quartet, cell=cells(items))
    for name in (*EDGES, "atom_types", "system", "positions"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(edge_vectors(found), edge_vectors(expected))
    # and without the cell, as ghosts: the same vectors from the same centres to atoms of the same owner
    ghosted = graph_from_padded(*quartet)
    assert ghosted.n_local == expected.n_local
    assert ghosted.ghost_owner is not None
    home = torch.cat([torch.arange(ghosted.n_local), ghosted.ghost_owner])
    assert torch.equal(ghosted.ptr, expected.ptr)
    assert_same_content(ghosted, home, expected)


def assert_same_content(graph: NeighborGraph, home: Tensor, expected: NeighborGraph) -> None:
    """The same edges whatever their order and whatever row an image has."""

    def content(one: NeighborGraph, owner: Tensor) -> np.ndarray:
        columns = [one.edge_center[:, None], owner[one.edge_neighbor][:, None], edge_vectors(one)]
        table = torch.cat([column.double() for column in columns], dim=1).numpy()
        return table[np.lexsort(np.round(table, 6).T[::-1])]

    assert np.allclose(content(graph, home), content(expected, torch.arange(expected.n_atoms)), rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(structures_lists, st.floats(0.8, 4.0))
def test_there_and_back_is_the_same_graph(items: list[AtomicData], cutoff: float) -> None:
    graph = graph_from_structures(items, cutoff, TYPES)
    quartet = padded_from_graph(graph)
    back = graph_from_padded(*quartet, cell=graph.cell)
    for name in (*EDGES, "atom_types", "system", "positions", "cell", "edge_mask"):
        assert torch.equal(getattr(back, name), getattr(graph, name)), name
    ghosted = graph_from_padded(*quartet)
    validate(ghosted)
    assert ghosted.ghost_owner is not None
    assert_same_content(ghosted, torch.cat([torch.arange(graph.n_atoms), ghosted.ghost_owner]), graph)
    twice = padded_from_graph(ghosted)
    for a, b in zip(twice, quartet, strict=True):
        assert torch.equal(torch.as_tensor(a.shape), torch.as_tensor(b.shape))
    assert_same_content(graph_from_padded(*twice, cell=graph.cell), torch.arange(graph.n_atoms), graph)


@settings(max_examples=80, deadline=None)
@given(random_graphs())
def test_any_graph_survives_as_ghosts(graph: NeighborGraph) -> None:
    """Systems interleaved, duplicates, masked edges, ghosts that are images of no lattice vector."""
    quartet = padded_from_graph(graph)
    assert quartet.nlist.shape[2] == max_degree(select_edges(graph, graph.edge_mask))
    back = graph_from_padded(*quartet)
    assert (back.n_local, back.n_systems) == (graph.n_local, graph.n_systems)
    order = graph.system[: graph.n_local].sort(stable=True).indices  # frame after frame
    place = torch.empty_like(order)
    place[order] = torch.arange(graph.n_local)
    expected = select_edges(graph, graph.edge_mask)
    owner = torch.arange(graph.n_local)
    owner = owner if graph.ghost_owner is None else torch.cat([owner, graph.ghost_owner])
    moved = expected.replace(edge_center=place[expected.edge_center])
    assert back.ghost_owner is not None
    home = torch.cat([torch.arange(graph.n_local), back.ghost_owner])

    def content(center: Tensor, neighbor: Tensor, vectors: Tensor) -> np.ndarray:
        table = torch.cat([center[:, None].double(), neighbor[:, None].double(), vectors], dim=1).numpy()
        return table[np.lexsort(np.round(table, 6).T[::-1])]

    found = content(back.edge_center, home[back.edge_neighbor], edge_vectors(back))
    wanted = content(moved.edge_center, place[owner[expected.edge_neighbor]], edge_vectors(expected))
    assert np.allclose(found, wanted, rtol=0, atol=1e-12)
    assert torch.equal(back.atom_types[: back.n_local], graph.atom_types[order])


def test_rows_are_nearest_first_and_limited_to_sel() -> None:
    graph = graph_from_structures([structure("tilted", TYPES), structure("slab", TYPES)], CUTOFF, TYPES)
    whole, cut = padded_from_graph(graph), padded_from_graph(graph, 5)
    assert whole.nlist.shape == (2, 8, max_degree(graph))
    assert cut.nlist.shape == (2, 8, 5)
    for quartet in (whole, cut):
        distance = row_distances(quartet)
        assert bool((distance[:, :, 1:] >= distance[:, :, :-1] - 1e-12).all())
    assert torch.equal(row_distances(whole)[:, :, :5], row_distances(cut))
    wide = padded_from_graph(graph, [40, 30])
    assert wide.nlist.shape == (2, 8, 70)
    assert torch.equal(row_distances(wide)[:, :, : whole.nlist.shape[2]], row_distances(whole))


def row_distances(quartet: PaddedNeighbors) -> Tensor:
    """(nf, nloc, nnei), infinite where empty."""
    coord, _, nlist, _ = quartet
    frame = torch.arange(len(nlist))[:, None, None]
    delta = coord[frame, nlist.clamp_min(0)] - coord[:, : nlist.shape[1], None]
    return torch.where(nlist >= 0, delta.norm(dim=-1), torch.inf)


def test_slots_of_each_type() -> None:
    graph = graph_from_structures([structure("periodic", TYPES)], CUTOFF, TYPES)
    quartet = padded_from_graph(graph, [4, 9], mixed=False)
    assert quartet.nlist.shape == (1, 8, 13)
    for t, slots in ((0, quartet.nlist[0, :, :4]), (1, quartet.nlist[0, :, 4:])):
        assert bool((quartet.extended_atype[0][slots[slots >= 0]] == t).all())
    assert bool((quartet.nlist[0, :, :4] >= 0).all())
    assert (quartet.nlist[0, 0, 4:] >= 0).tolist() == [True] * 8 + [False]
    distance = row_distances(quartet)[0]
    for center in range(8):
        rows = slice(int(graph.ptr[center]), int(graph.ptr[center + 1]))
        near = lengths(graph)[rows]
        types = graph.atom_types[graph.edge_neighbor[rows]]
        for t, begin, room in ((0, 0, 4), (1, 4, 9)):
            expected = near[types == t].sort().values[:room]
            assert torch.allclose(distance[center, begin : begin + len(expected)], expected, rtol=0, atol=1e-12)
            assert bool(distance[center, begin + len(expected) : begin + room].isinf().all())
    with pytest.raises(InputError, match="sel has 1 entries but there are neighbours of type 1"):
        padded_from_graph(graph, [4], mixed=False)


def test_derivatives_pass_through_both_ways() -> None:
    graph = graph_from_structures([structure("tiny_triclinic", TYPES)], 2.8, TYPES)

    def there_and_back(positions: Tensor, cell: Tensor) -> Tensor:
        quartet = padded_from_graph(graph.replace(positions=positions, cell=cell))
        return torch.cat([edge_vectors(graph_from_padded(*quartet)), edge_vectors(graph_from_padded(*quartet, cell=cell))])

    inputs = (graph.positions.clone().requires_grad_(), graph.cell.clone().requires_grad_())
    assert torch.autograd.gradcheck(there_and_back, inputs)


def test_a_list_with_a_skin_and_extra_inputs() -> None:
    items = [structure("periodic", TYPES), structure("open", TYPES)]
    wide, near = (graph_from_structures(items, cutoff, TYPES) for cutoff in (CUTOFF, 3.0))
    quartet = padded_from_graph(wide)
    fparam, aparam = torch.rand(2, 3), torch.rand(2, 8, 2)
    found = graph_from_padded(*quartet, cell=wide.cell, cutoff=3.0, fparam=fparam, aparam=aparam)
    for name in EDGES:
        assert torch.equal(getattr(found, name), getattr(near, name))
    assert torch.equal(found.fparam, fparam)
    assert torch.equal(found.aparam, torch.cat([aparam[0], aparam[1, :7]]))  # 8 and 7 atoms, one is virtual
    ghosted = graph_from_padded(*quartet, aparam=aparam)
    assert torch.equal(ghosted.aparam[:15], found.aparam)
    assert not ghosted.aparam[15:].any()
    validate(ghosted)


def test_spins_of_owned_atoms_and_of_ghosts() -> None:
    items = [structure("periodic", TYPES), structure("open", TYPES)]
    graph = graph_from_structures(items, CUTOFF, TYPES)
    quartet, state = padded_from_graph(graph), torch.rand(2, 2, dtype=torch.float64)
    own = torch.rand(2, 8, 3, dtype=torch.float64)
    spins = own.gather(1, quartet.mapping[..., None].expand(-1, -1, 3))
    folded = graph_from_padded(*quartet, cell=graph.cell, extended_spin=spins, charge_spin=state)
    assert torch.equal(folded.spin, torch.cat([own[0], own[1, :7]]))
    assert torch.equal(folded.charge_spin, state)
    ghosted = validate(graph_from_padded(*quartet, extended_spin=spins))
    assert torch.equal(ghosted.spin[:15], folded.spin)
    assert torch.equal(ghosted.spin[15:], folded.spin[ghosted.ghost_owner])


def test_ghosts_of_other_ranks() -> None:
    graph = add_ghosts(graph_from_structures([structure("tilted", TYPES)], CUTOFF, TYPES))
    quartet = padded_from_graph(graph)
    found = graph_from_padded(*quartet[:3])
    assert found.ghost_owner is None
    assert torch.allclose(lengths(found).sort().values, lengths(graph).sort().values, rtol=0, atol=1e-13)
    with pytest.raises(InputError, match="ghosts of unknown owners"):
        padded_from_graph(graph.replace(ghost_owner=None))
    with pytest.raises(InputError, match="needs mapping"):
        graph_from_padded(*quartet[:3], cell=graph.cell)


def test_frames_without_atoms_or_edges() -> None:
    lone = graph_from_structures([structure("one_atom", TYPES), structure("two_far", TYPES)], CUTOFF, TYPES)
    quartet = padded_from_graph(lone)
    assert [tuple(one.shape) for one in quartet] == [(2, 2, 3), (2, 2), (2, 2, 0), (2, 2)]
    assert quartet.extended_atype.tolist() == [[0, -1], [0, 1]]
    assert graph_from_padded(*quartet).n_atoms == 3
    none = torch.zeros(2, 0, dtype=torch.int64)
    empty = graph_from_padded(torch.zeros(2, 0, 3), none, none[..., None], none)
    assert (empty.n_atoms, empty.n_systems, empty.n_edges) == (0, 2, 0)
    assert [tuple(one.shape) for one in padded_from_graph(empty)] == [(2, 0, 3), (2, 0), (2, 0, 0), (2, 0)]


def entry(values: Tensor, index: tuple[int, ...], value: float) -> Tensor:
    changed = values.clone()
    changed[index] = value
    return changed


BAD = {
    "beyond the frame": ("nlist", (0, 2, 1), 99, r"nlist\[0, 2, 1\] is 99, expected -1 to \d+"),
    "itself": ("nlist", (0, 2, 0), 2, r"nlist\[0, 2, 0\]: an atom is not its own neighbour"),
    "no owner": ("mapping", (0, 9), 8, r"mapping\[0, 9\] is 8: expected 0 to 7, an owned atom"),
    "owner of another type": ("mapping", (0, 0), 1, r"mapping\[0, 0\] is 1: but an owned atom is its own owner"),
    "type": ("extended_atype", (0, 9), 1, r"mapping\[0, 9\] is \d: an atom of another type"),
    "place": ("extended_coord", (0, 10, 0), 0.123, r"nlist\[0, \d, \d+\] is atom 10, .* Å away from any image of its owner"),
    "not finite": ("extended_coord", (0, 3, 2), float("nan"), r"extended_coord\[0, 3\] is .*expected finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_entries_are_named(name: str) -> None:
    field, index, value, message = BAD[name]
    graph = graph_from_structures([structure("periodic", ["H"])], CUTOFF, ["H"])
    quartet = padded_from_graph(graph)
    changed = quartet._replace(**{field: entry(getattr(quartet, field), index, value)})
    with pytest.raises(InputError, match=message):
        graph_from_padded(*changed, cell=graph.cell)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nlist": torch.zeros(1, 8)}, r"expected \(nf, nall\) and \(nf, nloc, nnei\)"),
        ({"nlist": torch.zeros(2, 8, 3)}, r"nlist has shape \(2, 8, 3\), expected \(1, 8, 3\)"),
        ({"nlist": torch.zeros(1, 500, 3)}, r"nlist is for 500 owned atoms but extended_coord holds only"),
        ({"mapping": torch.zeros(1, 8)}, r"mapping has shape \(1, 8\), expected"),
        ({"extended_coord": torch.zeros(1, 24)}, r"extended_coord has shape \(1, 24\), expected"),
        ({"cell": torch.zeros(3, 3)}, r"cell has shape \(3, 3\), expected \(1, 3, 3\)"),
        ({"cell": torch.ones(1, 3, 3)}, "frame 0: cell has no volume"),
        ({"aparam": torch.zeros(1, 7, 2)}, r"aparam has shape \(1, 7, 2\), expected \(1, 8, numb_aparam\)"),
        ({"extended_spin": torch.zeros(1, 8, 3)}, r"extended_spin has shape \(1, 8, 3\), expected \(1, \d+, 3\)"),
    ],
)
def test_bad_shapes_are_named(change: dict[str, Tensor], message: str) -> None:
    graph = graph_from_structures([structure("periodic", TYPES)], CUTOFF, TYPES)
    given = {**padded_from_graph(graph)._asdict(), "cell": graph.cell, **change}
    with pytest.raises(InputError, match=message):
        graph_from_padded(**given)


@pytest.mark.peer
@pytest.mark.parametrize("sel", [[200, 200], [3, 2]])
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("periodic", [True, False])
def test_equals_the_lists_that_deepmd_builds(periodic: bool, mixed: bool, sel: list[int]) -> None:
    """Random frames that are never stored, with virtual atoms: the same edges, and the same distance in every slot."""
    build = pytest.importorskip("deepmd.dpmodel.utils.nlist").extend_input_and_build_neighbor_list
    rng = np.random.default_rng()
    coord, atype = rng.uniform(-3, 9, (3, 12, 3)), rng.integers(0, 2, (3, 12))
    atype[:, -2] = -1
    # no atom sees its own image: two of them would be at the same distance
    box = np.eye(3) * 7 + rng.uniform(-1, 1, (3, 3, 3)) if periodic else np.zeros((3, 3, 3))
    found = build(coord, atype, 3.7, sel, mixed_types=mixed, box=box.reshape(3, 9) if periodic else None)
    theirs = PaddedNeighbors(*(torch.from_numpy(np.array(found[k])) for k in (0, 1, 3, 2)))
    folded = graph_from_padded(*theirs, cell=torch.from_numpy(box))
    whole = build_graph(folded.positions, folded.atom_types, folded.system, folded.cell, torch.full((3, 3), periodic), 3.7)
    mine = limit_neighbors(limit_neighbors(whole, sel), sel, mixed=mixed)
    for name in EDGES:
        assert torch.equal(getattr(mine, name), getattr(folded, name)), name
    ours = padded_from_graph(mine, sel, mixed=mixed)
    rows = [row_distances(one)[one.extended_atype[:, : one.nlist.shape[1]] >= 0] for one in (ours, theirs)]
    assert torch.equal(*(row.isinf() for row in rows))
    assert torch.allclose(*(row.nan_to_num(posinf=-1.0) for row in rows), rtol=0, atol=1e-12)
