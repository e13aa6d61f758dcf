"""Lists that live for many steps always equal a fresh search, and are searched again only where they must be.

Each test runs twice: by machine code, and in torch, as on a GPU or without a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from carryall.data import AtomicData, Batch
from carryall.errors import InputError
from carryall.graph import (
    NeighborGraph,
    SkinNeighborList,
    Systems,
    UnsearchableError,
    build_graph,
    edge_vectors,
    graph_from_batch,
    neighbor_search,
    skin,
    skin_torch,
    validate,
)
from carryall.native import library
from structures import CUTOFF, edge_set, fcc, structure

TYPES = ["O", "H"]
EDGES = ("edge_center", "edge_neighbor", "edge_shift", "edge_mask", "ptr")


@pytest.fixture(params=["native", "torch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How lists are kept and searched."""
    if request.param == "native" and library() is None:
        pytest.skip("no C++ compiler")
    if request.param == "torch":
        monkeypatch.setattr(skin, "library", lambda: None)
    return str(request.param)


def batch_of(*names: str) -> Batch:
    return Batch.from_data_list([structure(name, TYPES) for name in names])


def assert_fresh(neighbors: SkinNeighborList, batch: Batch) -> None:
    kept, fresh = neighbors.graph(batch), graph_from_batch(batch, CUTOFF, TYPES)
    assert edge_set(kept) == edge_set(fresh)
    validate(kept)
    assert torch.equal(kept.positions, batch.positions)
    assert torch.equal(kept.cell, batch.cell)
    assert torch.allclose(edge_vectors(kept), edge_vectors(fresh), rtol=0, atol=1e-12)


def moved(batch: Batch, displacement: torch.Tensor) -> Batch:
    new = batch.clone()
    new.positions = batch.positions + displacement
    return new


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**31), st.floats(0.0, 0.2), st.floats(0.0, 0.03))
def test_equals_a_fresh_search_on_any_road(seed: int, step: float, strain: float) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    batch = batch_of("periodic", "slab", "tilted")
    neighbors = SkinNeighborList(CUTOFF, TYPES, skin=0.7)
    for _ in range(6):
        assert_fresh(neighbors, batch)
        deformation = torch.eye(3, dtype=torch.float64) + strain * random(3, 3, 3)
        batch = moved(batch, step * random(batch.n_atoms, 3))
        batch.cell = torch.einsum("sij,sjk->sik", batch.cell, deformation)
        if float(random(1)) > 0:
            batch.positions = torch.einsum("ni,nij->nj", batch.positions, deformation[batch.system])


def test_small_moves_and_small_strains_reuse_the_list() -> None:
    batch = batch_of("periodic", "open")
    neighbors = SkinNeighborList(CUTOFF, TYPES, skin=0.5)
    neighbors.graph(batch)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        direction = torch.nn.functional.normalize(
            torch.randn(batch.n_atoms, 3, generator=generator, dtype=torch.float64), dim=1
        )
        assert_fresh(neighbors, moved(batch, 0.24 * direction))
    assert neighbors.n_searches == 2
    assert_fresh(neighbors, moved(batch, torch.full((batch.n_atoms, 3), 0.5)))  # together, but the list does not know
    assert neighbors.n_searches == 4


def test_two_atoms_that_approach_each_other_use_the_skin_twice() -> None:
    apart = AtomicData([[0, 0, 0], [CUTOFF + 0.55, 0, 0]], [8, 1])
    batch = Batch.from_data_list([apart])
    neighbors = SkinNeighborList(CUTOFF, TYPES, skin=0.5)
    assert neighbors.graph(batch).n_edges == 0
    closer = moved(batch, torch.tensor([[0.3, 0.0, 0.0], [-0.3, 0.0, 0.0]], dtype=torch.float64))
    assert_fresh(neighbors, closer)
    assert neighbors.graph(closer).n_edges == 2


def test_a_strained_crystal_reuses_the_list_while_the_strain_is_small() -> None:
    batch = batch_of("periodic")
    neighbors = SkinNeighborList(CUTOFF, TYPES, skin=0.5)
    neighbors.graph(batch)
    for strain, searches in ((0.02, 1), (0.05, 1), (0.2, 2)):
        strained = batch.clone()
        strained.cell, strained.positions = batch.cell * (1 - strain), batch.positions * (1 - strain)
        assert_fresh(neighbors, strained)
        assert neighbors.n_searches == searches


def wrap(batch: Batch) -> Batch:
    fractional = torch.linalg.solve(batch.cell[0].T, batch.positions.T).T + 0.37
    return moved(batch, (fractional - fractional.floor()) @ batch.cell[0] - batch.positions)


def swap_elements(batch: Batch) -> Batch:
    new = batch.clone()
    new.atomic_numbers = batch.atomic_numbers.flip(0)
    return new


def open_an_axis(batch: Batch) -> Batch:
    new = batch.clone()
    new.pbc = torch.tensor([[True, True, False]])
    return new


def one_atom_less(batch: Batch) -> Batch:
    data = batch.get_data(0)
    return Batch.from_data_list([AtomicData(data.positions[:-1], data.atomic_numbers[:-1], data.cell, data.pbc)])


def two_copies(batch: Batch) -> Batch:
    return Batch.from_data_list([batch.get_data(0)] * 2)


@pytest.mark.parametrize(
    ("change", "searches"), [(wrap, 2), (swap_elements, 1), (open_an_axis, 2), (one_atom_less, 2), (two_copies, 2)]
)
def test_what_must_be_searched_again_is(change: Callable[[Batch], Batch], searches: int) -> None:
    batch = batch_of("tilted")
    neighbors = SkinNeighborList(CUTOFF, TYPES, skin=0.5)
    neighbors.graph(batch)
    changed = change(batch)
    assert_fresh(neighbors, changed)
    assert neighbors.n_searches == searches
    assert torch.equal(neighbors.graph(changed).atom_types, graph_from_batch(changed, CUTOFF, TYPES).atom_types)


def test_systems_of_the_same_sizes_with_atoms_shifted_between_them() -> None:
    one, two = structure("open", TYPES), structure("open_with_cell", TYPES)
    neighbors = SkinNeighborList(CUTOFF, TYPES)
    neighbors.graph(Batch.from_data_list([one.replace(cell=two.cell, pbc=two.pbc), two]))
    assert_fresh(neighbors, Batch.from_data_list([two, one.replace(cell=two.cell, pbc=two.pbc)]))


def test_a_cell_that_appears_is_noticed() -> None:
    neighbors = SkinNeighborList(CUTOFF, TYPES)
    batch = batch_of("wire")
    neighbors.graph(batch)
    longer = batch.clone()
    longer.cell = batch.cell * 1.3
    assert_fresh(neighbors, longer)


@pytest.mark.parametrize("cutoff", [3.6, 3.6 / 2**0.5, 3.6 * 1.5**0.5])
def test_a_shell_of_neighbours_on_the_cutoff_is_the_same_in_both(cutoff: float) -> None:
    positions, cell = fcc((2, 2, 2), jitter=0.0)
    batch = Batch.from_data_list([AtomicData(positions + 0.1234567, [8] * len(positions), cell, True)])
    fresh = graph_from_batch(batch, cutoff, TYPES)
    inside = graph_from_batch(batch, cutoff - 1e-6, TYPES)
    assert fresh.n_edges > inside.n_edges  # rounding decides for each edge of the shell, but once
    kept = SkinNeighborList(cutoff, TYPES, skin=0.4).graph(batch)
    for name in ("edge_center", "edge_neighbor", "edge_shift", "ptr"):
        assert torch.equal(getattr(kept, name), getattr(fresh, name))
    assert float(edge_vectors(fresh).square().sum(1).max()) <= cutoff**2


def test_positions_that_became_nan_are_an_error_not_an_empty_list() -> None:
    batch = batch_of("periodic")
    neighbors = SkinNeighborList(CUTOFF, TYPES)
    neighbors.graph(batch)
    with pytest.raises(InputError, match="position of atom 3"):
        neighbors.graph(moved(batch, torch.tensor([[0.0], [0], [0], [float("nan")], [0], [0], [0], [0]])))


def test_the_callers_tensors_are_not_kept() -> None:
    batch = batch_of("periodic")
    neighbors = SkinNeighborList(CUTOFF, TYPES, skin=0.5)
    graph = neighbors.graph(batch)
    before = graph.positions.clone()
    batch.positions += 3 * torch.arange(batch.n_atoms)[:, None]
    assert torch.equal(graph.positions, before)
    assert_fresh(neighbors, batch)


def test_a_list_without_skin_is_searched_at_every_move() -> None:
    batch = batch_of("periodic")
    neighbors = SkinNeighborList(CUTOFF, TYPES, skin=0.0)
    for step in range(3):
        assert_fresh(neighbors, moved(batch, 1e-3 * step * torch.eye(8, 3, dtype=torch.float64)))
    assert neighbors.n_searches == 3
    with pytest.raises(InputError, match="skin must not be negative"):
        SkinNeighborList(CUTOFF, TYPES, skin=-0.1)


# -- lists of single systems, found again by their ids


def named(names: Sequence[str], ids: Sequence[int]) -> Batch:
    batch = batch_of(*names)
    batch.set("system_id", torch.tensor(ids), level="system")
    return batch


def crystals(n: int) -> Batch:
    """Jittered crystals named 0, 1, ...; atoms of no two are alike."""
    generator = torch.Generator().manual_seed(n)
    batch = named(["periodic"] * n, range(n))
    batch.positions = batch.positions + 0.1 * torch.randn(batch.n_atoms, 3, generator=generator, dtype=torch.float64)
    return batch


def assert_exact(neighbors: SkinNeighborList, batch: Batch) -> None:
    """The same tensors as a fresh search of vesin's."""
    found, fresh = neighbors.graph(batch), graph_from_batch(batch, CUTOFF, TYPES)
    for name in EDGES:
        assert torch.equal(getattr(found, name), getattr(fresh, name)), name


def push(batch: Batch, system: int, by: float = 1.0) -> Batch:
    """One atom of a system moves."""
    new = batch.clone()
    new.positions = batch.positions.clone()
    new.positions[int(batch.ptr[system]) + 1, 2] += by
    return new


def test_only_the_system_that_needs_it_is_searched() -> None:
    neighbors, batch = SkinNeighborList(CUTOFF, TYPES, 0.5), crystals(6)
    assert_exact(neighbors, batch)
    assert neighbors.n_searches == 6
    batch = push(batch, 3)
    assert_exact(neighbors, batch)
    assert neighbors.n_searches == 7
    batch = push(push(batch, 0), 5)
    batch.cell = batch.cell.clone()
    batch.cell[2] *= 1.2
    assert_exact(neighbors, batch)
    assert neighbors.n_searches == 10
    assert_exact(neighbors, batch)
    assert neighbors.n_searches == 10


def test_lists_follow_systems_that_change_places_leave_and_return() -> None:
    neighbors, batch = SkinNeighborList(CUTOFF, TYPES, 0.5), crystals(6)
    neighbors.graph(batch)
    for chosen in ([5, 3, 1, 0, 2, 4], [1, 2], [2], [5, 1, 2], [0, 1, 2, 3, 4, 5]):
        assert_exact(neighbors, batch.index_select(chosen))
    # those away for long were dropped: at no time more atoms are kept than twice those of a call
    assert 6 < neighbors.n_searches <= 6 + 4
    before = neighbors.n_searches
    new = named(["tilted"], [17])
    assert_exact(neighbors, batch.index_select([4, 0, 5]).append(new).append(batch.index_select([1])))
    assert neighbors.n_searches == before + 1


def test_two_batches_in_turn_keep_their_lists() -> None:
    neighbors, batch = SkinNeighborList(CUTOFF, TYPES, 0.5), crystals(6)
    one, two = batch.index_select([0, 1, 2]), batch.index_select([3, 4, 5])
    for _ in range(4):
        assert_exact(neighbors, one)
        assert_exact(neighbors, two)
    assert neighbors.n_searches == 6


def test_an_id_that_names_something_else_now() -> None:
    neighbors = SkinNeighborList(CUTOFF, TYPES, 0.5)
    assert_exact(neighbors, named(["periodic", "tilted", "open"], [4, 5, 6]))
    assert_exact(neighbors, named(["tilted", "periodic", "slab"], [4, 5, 6]))
    assert neighbors.n_searches == 6


def test_one_id_for_two_systems_of_a_call() -> None:
    neighbors, batch = SkinNeighborList(CUTOFF, TYPES, 0.5), named(["periodic", "tilted", "periodic"], [3, 3, 3])
    for _ in range(2):
        assert_exact(neighbors, batch)
    assert neighbors.n_searches == 3


def test_memory_is_bounded(way: str) -> None:
    neighbors = SkinNeighborList(CUTOFF, TYPES, 0.5)
    batch = crystals(2)
    for first in range(0, 200, 2):
        batch.set("system_id", torch.tensor([first, first + 1]))
        neighbors.graph(batch)
    native = neighbors.native(Systems.of(batch))
    assert neighbors.n_searches == 200
    assert (len(neighbors._torch._kept) if native is None else native.n_kept) <= 4


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**31))
def test_any_road_of_refills_moves_and_strains(seed: int) -> None:
    """Atoms walk through walls, cells breathe, systems come and go: the graph is a fresh one, to the bit."""
    generator = torch.Generator().manual_seed(seed)
    pool = named(["periodic", "slab", "tilted", "open", "tiny_triclinic", "left_handed", "one_atom_periodic"], range(7))
    neighbors = SkinNeighborList(CUTOFF, TYPES, 0.6)
    for _ in range(8):
        chosen = torch.randperm(7, generator=generator)[: int(torch.randint(1, 8, (1,), generator=generator))]
        assert_exact(neighbors, pool.index_select(chosen.tolist()))
        size = float(torch.rand(1, generator=generator)) ** 4
        pool = moved(pool, size * torch.randn(pool.n_atoms, 3, generator=generator, dtype=torch.float64))
        pool.cell = pool.cell * (1 + 0.02 * torch.randn(7, 1, 1, generator=generator, dtype=torch.float64))


def test_both_ways_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    if library() is None:
        pytest.skip("no C++ compiler")
    batch = named(["periodic", "slab", "tilted", "wire", "open", "tiny_triclinic", "outside_cell"], range(7))
    graphs: list[NeighborGraph] = []
    for found in (library(), None):
        monkeypatch.setattr(skin, "library", lambda found=found: found)
        neighbors = SkinNeighborList(CUTOFF, TYPES, 0.5)
        neighbors.graph(batch)
        graphs.append(neighbors.graph(moved(batch, 0.1 * torch.sin(torch.arange(batch.n_atoms * 3).double()).reshape(-1, 3))))
    for name in (*EDGES, "positions", "cell", "atom_types", "system"):
        one, other = (getattr(graph, name) for graph in graphs)
        assert torch.equal(one, other), name
        assert one.dtype == other.dtype


def test_every_system_without_a_graph_is_named() -> None:
    batch = crystals(6)
    neighbors = SkinNeighborList(CUTOFF, TYPES, 0.5)
    neighbors.graph(batch)
    bad = batch.clone()
    bad.positions = batch.positions.clone()
    bad.positions[8 + 3, 0] = torch.inf
    bad.positions[16 + 2] = bad.positions[16 + 7] + 1e-9
    bad.cell = batch.cell.clone()
    bad.cell[4, 1] = 0.0
    bad.cell[5, 1] = 2 * bad.cell[5, 0]
    with pytest.raises(UnsearchableError, match=r"^system 1: position of atom 3 is") as caught:
        neighbors.graph(bad)
    reasons = caught.value.reasons
    assert list(reasons) == [1, 2, 4, 5]
    assert "atoms 2 and 7 coincide" in reasons[2] or "atoms 7 and 2 coincide" in reasons[2]
    assert reasons[4].startswith("cell vector 1 is zero although the structure is periodic")
    assert reasons[5].startswith("cell has no volume")
    with pytest.raises(InputError, match="system 0: position of atom 3"):
        neighbors.graph(bad.index_select([1, 0]))
    assert_exact(neighbors, bad.index_select([0, 3]))
    assert_exact(neighbors, batch)


def test_a_pair_that_collides_within_a_valid_list_is_caught() -> None:
    neighbors = SkinNeighborList(CUTOFF, TYPES, 1.0)
    apart, together = (Batch.from_data_list([AtomicData([[0.0, 0, 0], [x, 0, 0]], [8, 1])] * 2) for x in (0.4, 1e-8))
    neighbors.graph(apart)
    with pytest.raises(UnsearchableError, match="system 0: atoms 0 and 1 coincide") as caught:
        neighbors.graph(together)
    assert list(caught.value.reasons) == [0, 1]
    assert neighbors.n_searches == 2


def test_systems_are_what_a_batch_holds() -> None:
    batch = named(["periodic", "open"], [9, 4])
    batch.set("fparam", torch.tensor([[1.0], [2.0]]), level="system")
    systems = Systems.of(batch)
    assert (systems.n_systems, systems.n_atoms) == (2, batch.n_atoms)
    assert systems.ids is not None
    assert systems.ids.tolist() == [9, 4]
    graph = SkinNeighborList(CUTOFF, TYPES).graph(systems)
    assert graph.fparam is not None
    assert graph.fparam.tolist() == [[1.0], [2.0]]
    fields = (batch.positions, graph.atom_types, batch.system, batch.cell, batch.pbc)
    assert torch.equal(graph.edge_center, build_graph(*fields, CUTOFF).edge_center)
    assert Systems.of(batch_of("open")).ids is None


def test_systems_searched_together_on_a_gpu_are_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """With vesin in the place of the search on a GPU."""
    monkeypatch.setattr(skin_torch, "search_on_gpu", neighbor_search._search_each)
    batch = batch_of("periodic", "one_atom", "slab", "open", "two_far", "tiny_triclinic")
    systems, chosen = Systems.of(batch), [0, 1, 3, 4, 5]
    alone = skin_torch.search(systems, chosen, CUTOFF)
    together = skin_torch.search_together(systems, chosen, CUTOFF)
    assert len(together) == len(chosen)
    for one, other in zip(alone, together, strict=True):
        assert not isinstance(one, InputError)
        assert not isinstance(other, InputError)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_lists_on_a_gpu(way: str) -> None:
    batch = crystals(5)
    there, here = SkinNeighborList(CUTOFF, TYPES, 0.5), SkinNeighborList(CUTOFF, TYPES, 0.5)
    for system in (None, 2, 4):
        batch = batch if system is None else push(batch, system)
        found, expected = there.graph(batch.to("cuda")), here.graph(batch)
        assert found.device.type == "cuda"
        assert edge_set(found.to("cpu")) == edge_set(expected)
    assert there.n_searches == here.n_searches == 7
